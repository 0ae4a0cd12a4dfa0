"""This package beside its peers on the same work: python -m benchmarks.run --task sft --against trl,tunix [--json].

Every contender is a process of its own, in its own virtual environment, which this harness makes under --envs. All get
the same tokens, shape, dtype and optimiser; they take turns, a pass over the work each, while the others wait; what is
told are medians over --repeats turns, and the ratio with a 95% interval over the turns. The machine's own limits, a big
matrix product, a big copy and a big read, are measured in the same run. See docs/reference/benchmarks.md.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.contenders import PEERS, Contender, scripts
from benchmarks.figures import contender_figures, summary
from benchmarks.roofline import best_rates, describe_machine, machine_apart
from benchmarks.workload import SHAPES, generation_work, training_work

TASKS = ("sft", "dpo", "reward", "ppo", "generate", "compile")
SAVED = Path(__file__).parent / "results" / "speed"
COMPILED = {"layers": 32, "batch": 1, "sequence": 64, "steps": 1}  # the step whose compilation is timed
NUMBERS = {"batch": 8, "sequence": 256, "new": 64, "steps": 2, "repeats": 5, "layers": 0, "vocab": 0}


def compare(task: str, options: argparse.Namespace, before: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Runs the contenders of a task in turns.

    Args:
      before: the machine's rates.

    Returns:
      (figures, the machine's rates afterwards)
    """
    if task == "compile":
        options = _compile_options(options)
    count = options.batch * options.steps
    if task in ("generate", "ppo"):
        prompt = options.sequence - options.new
        lengths = options.lengths if task == "generate" else "full"
        if lengths == "real":
            count = options.prompts
        rows = generation_work(lengths, count, prompt, options.new, options.shape)
    else:
        kind = "sft" if task == "compile" else task
        rows = training_work(kind, options.lengths, count, options.sequence, options.shape, options.data)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job = _write_job(task, rows, options, folder)
        options.settling = int(task != "generate")
        ran = _take_turns(scripts(task, options.against, options.envs), job, folder, options)
    after = machine_apart(options.dtype)
    machine = best_rates(before, after)
    figures = {name: contender_figures(task, rows, options, machine, one) for name, one in ran.items()}
    return summary(task, rows, options, machine, figures), after


def _compile_options(options: argparse.Namespace) -> argparse.Namespace:
    """A small batch, so that the first step is its compilation; the turns only tell a step's own time."""
    sizes = COMPILED | {"layers": options.layers or COMPILED["layers"]}
    changed = vars(options) | sizes | {"lengths": "full", "starts": 2, "warmups": 0}
    changed["shape"] = dataclasses.replace(options.shape, layers=sizes["layers"])
    return argparse.Namespace(**changed)


def _write_job(task: str, rows: Any, options: argparse.Namespace, folder: Path) -> Path:
    (folder / "work.json").write_text(json.dumps(rows))
    names = ("lengths", "dtype", "batch", "sequence", "new", "remat", "epochs", "minibatches")
    job = {
        "task": "sft" if task == "compile" else task,
        "work": str(folder / "work.json"),
        "cache": str(folder / "cache"),
        "shape": dataclasses.asdict(options.shape),
    } | {name: getattr(options, name) for name in names}
    (folder / "job.json").write_text(json.dumps(job))
    return folder / "job.json"


def _take_turns(
    start: dict[str, tuple[Path, Path]], job: Path, folder: Path, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Name -> {cold, warm: what it told at its starts, turns, peak_bytes}; `warm` is missing of one start."""
    begin = time.monotonic()
    ran: dict[str, dict[str, Any]] = {name: {"turns": []} for name in start}
    running: dict[str, Contender] = {}
    try:
        for name, (python, script) in start.items():
            for state in ("cold", "warm")[
                : options.starts
            ]:  # of the compilation cache; the last one is measured
                if name in running:
                    running[name].end()
                running[name] = Contender(name, python, script, job, folder)
                ran[name][state] = running[name].ready
                # A contender may compile once more after its first step, when its state comes out laid otherwise.
                # Generation has no state, and its step may take minutes.
                counts = [-1] * options.settling + [1] * options.warmups
                before = [running[name].passes(count) for count in counts]
                ran[name][state] |= {"warmup_seconds": sum(told["seconds"] for told in before)}
        for turn in range(options.repeats):
            since = time.monotonic()
            for name, contender in running.items():
                ran[name]["turns"].append(contender.passes(1))
            now = time.monotonic()
            if options.minutes and turn > 0 and now - begin + (now - since) > 60 * options.minutes:
                break
        for name, contender in running.items():
            ran[name]["peak_bytes"] = contender.end()
    finally:
        for contender in running.values():
            contender.kill()
    return ran


# ---- command line ----------------------------------------------------------------------------------------------


def main() -> int:
    options = _options()
    names = ("model", "dtype", "batch", "sequence", "new", "steps", "repeats", "epochs", "minibatches")
    result: dict[str, Any] = {name: getattr(options, name) for name in names}
    result |= {"machine": describe_machine(), "arguments": sys.argv[1:]}
    rates = machine_apart(options.dtype)
    for task in options.task:
        result[task], rates = compare(task, options, rates)
        result["machine"]["load_after"] = round(os.getloadavg()[0], 1)
        if options.save:
            SAVED.mkdir(parents=True, exist_ok=True)
            (SAVED / f"{options.save}.json").write_text(json.dumps(result, indent=1) + "\n")
        if not options.json:
            print(f"{task}: {json.dumps(result[task], indent=2)}", flush=True)
    if options.json:
        print(json.dumps(result))
    return 0


def _options() -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args()
    for given, known, name in ((options.task, TASKS, "task"), (options.against, PEERS, "peer")):
        for one in given:
            if one not in known:
                parser.error(f"unknown {name} `{one}`; known: {', '.join(known)}")
    training = [task for task in options.task if task in ("sft", "dpo", "reward")]
    if options.lengths == "real" and training and options.data is None:
        parser.error("--lengths real needs --data FILE, such as teachers/train.jsonl.gz")
    if {"generate", "ppo"} & set(options.task) and options.new >= options.sequence:
        parser.error(f"--new {options.new} leaves no room for a prompt in --sequence {options.sequence}")
    if options.batch % options.minibatches:
        parser.error(f"--batch {options.batch} is not a multiple of --minibatches {options.minibatches}")
    shape = SHAPES[options.model]
    changes = {name: getattr(options, name) for name in ("layers", "vocab") if getattr(options, name)}
    options.shape = dataclasses.replace(shape, **changes)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    some = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    parser.add_argument("--task", type=some, default=list(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--model", choices=tuple(SHAPES), default="smollm2-135m")
    parser.add_argument("--against", type=some, default=[], help="of trl, tunix")
    parser.add_argument(
        "--lengths",
        choices=("full", "real"),
        default="full",
        help="real: of --data; for generation 8 to --new tokens",
    )
    parser.add_argument(
        "--data", type=Path, help="teachers/train.jsonl.gz, or its lengths (see benchmarks.workload)"
    )
    parser.add_argument(
        "--envs", type=Path, default=Path("runs/peers"), help="folder of the peers' environments"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="none")
    for name, default in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--epochs", type=int, default=4, help="of PPO over an iteration's responses")
    parser.add_argument("--minibatches", type=int, default=1, help="updates of PPO per epoch")
    parser.add_argument(
        "--starts", type=int, choices=(1, 2), default=2, help="2: with an empty and a full compilation cache"
    )
    parser.add_argument(
        "--prompts", type=int, default=128, help="of generation with --lengths real (else --batch x --steps)"
    )
    parser.add_argument(
        "--warmups", type=int, default=1, help="passes (after a step or two) before those that are measured"
    )
    parser.add_argument(
        "--minutes", type=float, default=0, help="fewer turns, but two, if a task takes longer"
    )
    parser.add_argument("--save", metavar="NAME", help="also write benchmarks/results/speed/NAME.json")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
