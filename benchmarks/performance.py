"""All measurements of docs/results/performance.md, and the page.

    python -m benchmarks.performance run --envs FOLDER --data teachers/train.jsonl.gz [--only NAME ...] [--again]
    python -m benchmarks.performance page

`run` goes through the tasks in order, each with a limit of minutes of its own, and writes each one's result to
benchmarks/results/speed as soon as it is there; what is there is not measured again. The page is written from these
files, and from those of `benchmarks.growth`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.roofline import ROOT, describe_machine
from benchmarks.run import SAVED
from benchmarks.workload import real_lengths

PAGE = ROOT / "docs" / "results" / "performance.md"


@dataclass(frozen=True)
class Task:
    """One measurement: `command` after `python -m`, and its limit of minutes, after twice which it is ended."""

    name: str
    command: str
    minutes: float

    @property
    def path(self) -> Path:
        return SAVED / f"{self.name}.json"

    @property
    def key(self) -> str:
        """Of the harness's result, the task's name in it."""
        return self.command.split("--task ")[1].split()[0] if "--task" in self.command else ""


_RUN = "benchmarks.run --json --starts 1"
_REAL = "--lengths real --data DATA"
# In the order in which they are run. Of DPO, Tunix computes the reference in every step and has no packing: TRL is the
# better peer by far, and Tunix's turns would take most of the time.
TASKS = (
    Task("compile", f"{_RUN} --task compile --against tunix --repeats 3", 2),
    Task("sft", f"{_RUN} --task sft --against trl,tunix --steps 1 --repeats 5 --warmups 0", 3),
    Task("sft-real", f"{_RUN} --task sft --against trl,tunix {_REAL} --steps 12 --repeats 2 --warmups 0", 6),
    Task("generate", f"{_RUN} --task generate --against trl,tunix --steps 1 --repeats 5", 2),
    Task("dpo-real", f"{_RUN} --task dpo --against trl {_REAL} --steps 2 --repeats 3 --warmups 0", 4),
    Task("reward-real", f"{_RUN} --task reward --against trl {_REAL} --steps 2 --repeats 3 --warmups 0", 3),
    Task(
        "ppo",
        f"{_RUN} --task ppo --against trl --sequence 128 --new 64 --steps 1 --epochs 4 --repeats 5 --warmups 0",
        7,
    ),
    Task("sweep", "benchmarks.sweep --json", 8),
    Task(
        "generate-mixed",
        f"{_RUN} --task generate --against trl,tunix --lengths real --batch 32 --steps 4 --sequence 320 --new 256"
        " --repeats 2 --warmups 0",
        10,
    ),
)


def measure(task: Task, options: argparse.Namespace) -> None:
    """Runs a task that has no result yet; one that fails or takes too long is told, and the others go on."""
    if task.path.exists() and not options.again:
        print(f"{task.name}: there", flush=True)
        return
    command = task.command.replace("DATA", str(options.data)).split()
    if "--against" in command:
        command += ["--envs", str(options.envs), "--minutes", str(task.minutes)]
    begin, machine = time.monotonic(), describe_machine()
    SAVED.mkdir(parents=True, exist_ok=True)
    with (SAVED / f"{task.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # so that it can be ended with all its contenders
        )
        try:
            printed, _ = process.communicate(timeout=120 * task.minutes)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            print(f"{task.name}: ended after {2 * task.minutes:g} minutes", file=sys.stderr, flush=True)
            return
    seconds = time.monotonic() - begin
    if process.returncode:
        print(f"{task.name}: failed, see {log.name}", file=sys.stderr, flush=True)
        return
    found = json.loads(printed.splitlines()[-1])
    found.pop("arguments", None)  # with folders of this machine; `command` is what can be repeated
    kept = {"command": _shown(task), "took_seconds": round(seconds, 1)} | {"machine": machine} | found
    kept["machine"].setdefault("load_after", round(os.getloadavg()[0], 1))
    task.path.write_text(json.dumps(kept, indent=1) + "\n")
    Path(log.name).unlink()
    print(f"{task.name}: {seconds:.0f} s", flush=True)


def _shown(task: Task) -> str:
    """The command as it can be repeated anywhere."""
    return f"python -m {task.command}".replace("DATA", "teachers/train.jsonl.gz")


def read(task: Task) -> dict[str, Any] | None:
    """A task's result, or None."""
    return json.loads(task.path.read_text()) if task.path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--envs", type=Path, default=Path("runs/peers"), help="the peers' environments")
    parser.add_argument("--data", type=Path, help="teachers/train.jsonl.gz, or its lengths")
    names = [task.name for task in TASKS]
    parser.add_argument("--only", nargs="*", default=[], choices=names, help="these tasks")
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    options = parser.parse_args()
    if options.what == "page":
        from benchmarks.performance_page import page

        PAGE.write_text(page())
        print(PAGE)
        return
    chosen = [task for task in TASKS if not options.only or task.name in options.only]
    if options.data is None and any("DATA" in task.command for task in chosen):
        parser.error("--data FILE is needed, such as teachers/train.jsonl.gz")
    options.envs = options.envs.resolve()
    if options.data is not None:
        options.data = _lengths(options.data.resolve())
    for task in chosen:
        measure(task, options)


def _lengths(data: Path) -> Path:
    """The file with the lengths of `data`, which are counted once for all tasks."""
    path = ROOT / "build" / "lengths.json"
    if data.suffix == ".json":
        return data
    if not path.exists() or path.stat().st_mtime < data.stat().st_mtime:
        print("counting tokens", flush=True)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(real_lengths(data)))
    return path


if __name__ == "__main__":
    main()
