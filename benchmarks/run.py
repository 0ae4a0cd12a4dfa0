"""This package beside its peers on the same work: python -m benchmarks.run --task sft --against trl,tunix [--json].

Every contender is a process of its own, in its own virtual environment, which this harness makes under --envs. All get
the same tokens, shape, dtype and optimiser; they take turns, a pass over the work each, while the others wait; what is
told are medians over --repeats turns, and the ratio with a 95% interval over the turns. The machine's own limits, a big
matrix product and a big copy, are measured in the same run. See docs/reference/benchmarks.md.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.roofline import measure_machine
from benchmarks.workload import (
    SHAPES,
    Shape,
    generation_work,
    real_tokens,
    training_work,
    work_flops,
)

TASKS = ("sft", "dpo", "reward", "generate")
HERE = Path(__file__).parent / "peers"


@dataclasses.dataclass(frozen=True)
class Peer:
    """A contender: its script, what its environment holds, and the tasks that it has."""

    script: str
    packages: tuple[str, ...]
    tasks: tuple[str, ...]


PEERS = {
    "trl": Peer("trl_train.py", ("trl==1.16.0", "torch==2.13.0"), TASKS),
    "tunix": Peer("tunix_train.py", ("google-tunix==0.1.7",), ("sft", "dpo", "generate")),
}


class Contender:
    """A running contender: started, told to run passes, and ended.

    Raises:
      RuntimeError: its process failed; the message ends with what it said.
    """

    def __init__(self, name: str, python: Path, script: Path, job: Path, folder: Path):
        self.name = name
        self._log = (folder / f"{name}.log").open("w+")
        self._process = subprocess.Popen(
            [str(python), str(script), str(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(),
        )
        self.ready = self._read()

    def passes(self, count: int) -> dict[str, float]:
        """Seconds of `count` passes over the work."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> int:
        """Ends it; its peak of memory in bytes."""
        peak = int(self.passes(0)["peak_bytes"])
        self._process.wait()
        return peak

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"{self.name} failed:\n{self._log.read()[-3000:]}")
        return json.loads(line)


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    return dict(os.environ) | {"PYTHONPATH": root}


def environment(name: str, folder: Path) -> Path:
    """The interpreter of a peer's virtual environment, which is made if it is not there."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        print(f"making the environment of {name} in {folder / name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *PEERS[name].packages]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return python


# ---- one task --------------------------------------------------------------------------------------------------


def compare(task: str, options: argparse.Namespace, machine: dict[str, float]) -> dict[str, Any]:
    """Runs the contenders of a task in turns and gives their figures."""
    shape = options.shape
    count = options.batch * options.steps
    if task == "generate":
        prompt = options.sequence - options.new
        rows = generation_work(options.lengths, count, prompt, options.new, shape)
    else:
        rows = training_work(task, options.lengths, count, options.sequence, shape, options.data)
    names = [name for name in options.against if task in PEERS[name].tasks]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job = _write_job(task, rows, options, folder)
        start = {"laif_jax": (Path(sys.executable), HERE / "laif.py")} | {
            name: (environment(name, options.envs), HERE / PEERS[name].script) for name in names
        }
        return _turns(task, rows, start, job, folder, options, machine)


def _write_job(task: str, rows: Any, options: argparse.Namespace, folder: Path) -> Path:
    (folder / "work.json").write_text(json.dumps(rows))
    job = {
        "task": task,
        "work": str(folder / "work.json"),
        "cache": str(folder / "cache"),
        "shape": dataclasses.asdict(options.shape),
    } | {name: getattr(options, name) for name in ("lengths", "dtype", "batch", "sequence", "new", "remat")}
    (folder / "job.json").write_text(json.dumps(job))
    return folder / "job.json"


def _turns(
    task: str,
    rows: Any,
    start: dict[str, tuple[Path, Path]],
    job: Path,
    folder: Path,
    options: argparse.Namespace,
    machine: dict[str, float],
) -> dict[str, Any]:
    contenders: dict[str, Contender] = {}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in start}
    cold = {}
    try:
        for name, (python, script) in start.items():
            # Once with an empty compilation cache and once with a full one; the second is measured.
            first = Contender(name, python, script, job, folder)
            cold[name] = first.ready
            first.end()
            contenders[name] = Contender(name, python, script, job, folder)
            contenders[name].passes(1)  # what is slow only once is over
        for _ in range(options.repeats):
            for name, contender in contenders.items():
                turns[name].append(contender.passes(1))
        peaks = {name: contender.end() for name, contender in contenders.items()}
    finally:
        for contender in contenders.values():
            contender.kill()
    tokens, flops = real_tokens(task, rows), work_flops(task, rows, options.shape)
    figures = {}
    for name, runs in turns.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        figures[name] = {
            "seconds": round(seconds, 4),
            "cpu_seconds": round(statistics.median(run["cpu_seconds"] for run in runs), 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "mfu": round(flops / seconds / machine["flops"], 4),
            "peak_bytes": peaks[name],
            "first_step_seconds": round(cold[name]["first_step_seconds"], 3),
            "first_step_seconds_warm": round(contenders[name].ready["first_step_seconds"], 3),
            "setup_seconds": round(contenders[name].ready["setup_seconds"], 3),
        }
    return _summary(task, figures, turns, rows, options, machine)


def _summary(
    task: str,
    figures: dict[str, Any],
    turns: dict[str, list[dict[str, float]]],
    rows: Any,
    options: argparse.Namespace,
    machine: dict[str, float],
) -> dict[str, Any]:
    ours = figures["laif_jax"]
    peers = {name: value for name, value in figures.items() if name != "laif_jax"}
    steps = len(rows) / options.batch
    result: dict[str, Any] = {
        "lengths": options.lengths,
        "ours": ours,
        "peers": peers,
        "compile_seconds": round(max(0.0, ours["first_step_seconds"] - ours["seconds"] / steps), 3),
        "compile_seconds_warm": round(max(0.0, ours["first_step_seconds_warm"] - ours["seconds"] / steps), 3),
        "roofline_fraction": round(bound_seconds(task, rows, options, machine) / ours["seconds"], 4),
    }
    if peers:
        better = min(peers, key=lambda name: peers[name]["seconds"])
        logs = [math.log(b["seconds"] / a["seconds"]) for a, b in zip(turns["laif_jax"], turns[better])]
        result |= {
            "better_peer": better,
            "ratio_to_better_peer": round(peers[better]["seconds"] / ours["seconds"], 3),
            "ratio_ci95": interval(logs),
            "peak_memory_ratio": round(ours["peak_bytes"] / peers[better]["peak_bytes"], 3),
        }
    return result


def interval(logs: list[float]) -> list[float] | None:
    """The 95% interval of a ratio from its logarithm in each turn (Student's t); None of fewer than two."""
    if len(logs) < 2:
        return None
    from scipy import stats

    spread = float(stats.t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.mean(logs)
    return [round(math.exp(mean - spread), 3), round(math.exp(mean + spread), 3)]


def bound_seconds(task: str, rows: Any, options: argparse.Namespace, machine: dict[str, float]) -> float:
    """The least time that the machine needs for the work. Training: its operations at the rate of the matrix product.
    Generation: the prompts' operations at that rate, and for every drawn token of a full batch one reading of the
    weights and of the batch's cache at the rate of the copy, if that takes longer than the operations."""
    shape: Shape = options.shape
    if task != "generate":
        return work_flops(task, rows, shape) / machine["flops"]
    width = 2 if options.dtype == "bfloat16" else 4
    prompts = sum(shape.forward_flops(len(row["prompt"])) for row in rows)
    drawn = work_flops(task, rows, shape) - prompts
    steps = sum(row["new"] for row in rows) / options.batch
    weights = shape.matrix_parameters * width
    lengths = [(len(row["prompt"]) + row["new"] / 2) * row["new"] for row in rows]
    cache = 2 * shape.kv_heads * shape.head_dim * shape.layers * width * sum(lengths)
    reading = (steps * weights + cache) / machine["bytes_per_second"]
    return prompts / machine["flops"] + max(drawn / machine["flops"], reading)


# ---- command line ----------------------------------------------------------------------------------------------


def main() -> int:
    options = _options()
    machine = measure_machine(options.dtype)
    result: dict[str, Any] = {"machine": machine, "model": options.model, "dtype": options.dtype}
    result |= {name: getattr(options, name) for name in ("batch", "sequence", "new", "steps", "repeats")}
    for task in options.task:
        result[task] = compare(task, options, machine)
        if not options.json:
            print(f"{task}: {json.dumps(result[task], indent=2)}", flush=True)
    if options.json:
        print(json.dumps(result))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    some = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    parser.add_argument("--task", type=some, default=list(TASKS), help="of sft, dpo, reward, generate")
    parser.add_argument("--model", choices=tuple(SHAPES), default="smollm2-135m")
    parser.add_argument("--against", type=some, default=[], help="of trl, tunix")
    parser.add_argument(
        "--lengths",
        choices=("full", "real"),
        default="full",
        help="real: of --data; for generation 8 to --new tokens",
    )
    parser.add_argument("--data", type=Path, help="teachers/train.jsonl.gz, for --lengths real")
    parser.add_argument(
        "--envs", type=Path, default=Path("runs/peers"), help="folder of the peers' environments"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="none")
    numbers = {"batch": 8, "sequence": 256, "new": 64, "steps": 2, "repeats": 5, "layers": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=0, help="another vocabulary than the model's")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options = parser.parse_args()
    for given, known, name in ((options.task, TASKS, "task"), (options.against, PEERS, "peer")):
        for one in given:
            if one not in known:
                parser.error(f"unknown {name} `{one}`; known: {', '.join(known)}")
    training = [task for task in options.task if task != "generate"]
    if options.lengths == "real" and training and options.data is None:
        parser.error("--lengths real needs --data FILE, such as teachers/train.jsonl.gz")
    if "generate" in options.task and options.new >= options.sequence:
        parser.error(f"--new {options.new} leaves no room for a prompt in --sequence {options.sequence}")
    shape = SHAPES[options.model]
    changes = {name: getattr(options, name) for name in ("layers", "vocab") if getattr(options, name)}
    options.shape = dataclasses.replace(shape, **changes)
    return options


if __name__ == "__main__":
    sys.exit(main())
