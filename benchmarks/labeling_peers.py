"""The labelling service beside a peer on the same endpoint: python -m benchmarks.labeling_peers [--json].

The simulated provider is served over HTTP by a process of its own (`benchmarks.labeling_endpoint`), with 50 ms of
latency. Ours and the peer are asked, one after the other, for the same judgements: the same messages, one order, at
most `--in-flight` at once. Each is a process of its own that reads a file and writes a file.

`throughput` is measured at the endpoint: requests over the seconds from the first one's arrival to the last answer.
`total_seconds` and `cpu_seconds` are of the whole process with its children: imports and, of ours, the service and its
store on disk are in them. `ratio` is ours over the peer's throughput, `ratio_total` the peer's over our total seconds,
`ratio_cpu` the peer's over our CPU seconds: above 1, ours is faster.

distilabel needs an environment of its own, which is made in `--peer-folder` if it is not there (uv, or venv and pip):
no torch is in it. `--peer-python` names the interpreter of one that you have.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.labeling_endpoint import CRITIC
from laif_jax.config.schema import SimulatedSpec
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.critic import load_critic
from laif_jax.labeling.judge import JudgeWork
from laif_jax.records import Comparison, Completion, Prompt, write_jsonl

HERE = Path(__file__).parent / "peers"
PEER_FOLDER = Path("build") / "peers" / "distilabel"
# The last release, with packages of its time: newer ones break it.
PACKAGES = (
    *("distilabel[openai]==1.5.3", "requests", "openai<1.66", "pydantic<2.11", "datasets<3.4"),
    *("huggingface_hub<0.30", "httpx<0.29", "pyarrow<20", "setuptools<76"),
)


def comparisons(count: int) -> list[Comparison]:
    """Pairs whose texts tell their planted quality."""
    items = []
    for number in range(count):
        prompt = Prompt.from_text(f"Question {number}: what is {number} + {number}, and why does it matter?")
        texts = [
            f"[quality {quality:.3f}] Answer {name} of {number}. " + "It has a few more words. " * 4
            for name, quality in (("a", 0.2 + 0.6 * (number % 2)), ("b", 0.5))
        ]
        a, b = (
            Completion(prompt_id=prompt.id, generator=g, text=t) for g, t in zip("ab", texts, strict=True)
        )
        items.append(Comparison(prompt=prompt, a=a, b=b))
    return items


def messages_of(items: Sequence[Comparison]) -> list[tuple[dict[str, str], ...]]:
    """What our service sends for them, in one order, drawn by seed 0."""
    endpoint = Endpoint(provider="simulated", simulated=SimulatedSpec(world="planted"))
    work = JudgeWork(endpoint, load_critic(CRITIC), items, "seeded", 0)
    return [work.calls(position)[0].messages for position in range(len(items))]


def peer_python(folder: Path = PEER_FOLDER) -> Path:
    """The interpreter of an environment with distilabel, made if it is not there.

    Raises:
      RuntimeError: it could not be made.
    """
    python, done = folder / "bin" / "python", folder / "made"
    if done.exists():
        return python
    print(f"making an environment for distilabel in {folder} ...", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    uv = shutil.which("uv")
    if uv:
        commands = [
            [uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
            [uv, "pip", "install", "--quiet", "--python", str(python), *PACKAGES],
        ]
    else:
        commands = [
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", *PACKAGES],
        ]
    for command in commands:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{made.stderr[-2000:]}")
    done.touch()
    return python


@contextlib.contextmanager
def endpoint(latency: float, folder: Path) -> Iterator[str]:
    """The address of the simulated endpoint, while it runs."""
    ready = folder / "url"
    command = [
        sys.executable,
        "-m",
        "benchmarks.labeling_endpoint",
        "--latency",
        str(latency),
        "--ready",
        str(ready),
    ]
    process = subprocess.Popen(command)
    try:
        while not ready.exists():
            if process.poll() is not None:
                raise RuntimeError(f"the endpoint ended with code {process.returncode}")
            time.sleep(0.05)
        yield ready.read_text()
    finally:
        process.terminate()
        process.wait()


def measure(url: str, command: Sequence[str], out: Path) -> tuple[dict[str, Any], list[str | None]]:
    """(figures, answers) of one side.

    Raises:
      RuntimeError: it failed, and the message ends with what it said; or it did not answer everything.
    """
    httpx.post(f"{url}/reset").raise_for_status()
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        total = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{said.read()[-3000:]}")
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    seen = httpx.get(f"{url}/stats").json()
    if not all(answers) or seen["requests"] < len(answers):
        raise RuntimeError(
            f"{sum(map(bool, answers))} of {len(answers)} were answered by {' '.join(command)}"
        )
    figures = {
        "throughput": round(seen["requests"] / seen["seconds"], 1),
        "requests": seen["requests"],
        "most_in_flight": seen["most"],
        "seconds": round(seen["seconds"], 3),
        "total_seconds": round(total, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
    }
    return figures, answers


def compare(
    python: Path, *, judgements: int, in_flight: int, latency: float = 0.05, client: str = "sdk"
) -> dict[str, Any]:
    """Figures of both sides and their ratios; see the module's text.

    Args:
      python: an interpreter that has distilabel. client: how our service speaks to the endpoint.
    """
    critic, items = load_critic(CRITIC), comparisons(judgements)
    with tempfile.TemporaryDirectory() as name, endpoint(latency, folder := Path(name)) as url:
        write_jsonl(folder / "comparisons.jsonl", items)
        lines = (json.dumps(list(messages)) + "\n" for messages in messages_of(items))
        (folder / "messages.jsonl").write_text("".join(lines))
        shared = ["--url", f"{url}/v1", "--in-flight", str(in_flight)]
        tokens = str(critic.params["max_tokens"])
        peer = [str(python), str(HERE / "distilabel_judge.py"), *shared, "--max-tokens", tokens]
        peer += ["--messages", f"{folder}/messages.jsonl", "--out", f"{folder}/peer.jsonl"]
        ours = [sys.executable, str(HERE / "laif_judge.py"), *shared, "--critic", CRITIC, "--client", client]
        ours += ["--comparisons", f"{folder}/comparisons.jsonl", "--out", f"{folder}/ours.jsonl"]
        theirs, their_answers = measure(url, peer, folder / "peer.jsonl")
        mine, our_answers = measure(url, ours, folder / "ours.jsonl")
    return {
        "in_flight": in_flight,
        "judgements": judgements,
        "bound": round(in_flight / latency, 1),
        "client": client,
        "ours": mine,
        "distilabel": theirs,
        "ratio": round(mine["throughput"] / theirs["throughput"], 2),
        "ratio_total": round(theirs["total_seconds"] / mine["total_seconds"], 2),
        "ratio_cpu": round(theirs["cpu_seconds"] / mine["cpu_seconds"], 2),
        "same_answers": sum(a == b for a, b in zip(our_answers, their_answers, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--judgements", type=int, default=4000)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[64])
    parser.add_argument("--latency", type=float, default=0.05, help="seconds per call")
    parser.add_argument("--client", choices=("sdk", "plain"), default="sdk", help="of our service")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has distilabel")
    parser.add_argument(
        "--peer-folder", type=Path, default=PEER_FOLDER, help=f"else it is made here (default: {PEER_FOLDER})"
    )
    options = parser.parse_args()
    python = options.peer_python or peer_python(options.peer_folder)
    for in_flight in options.in_flight:
        result = compare(
            python,
            judgements=options.judgements,
            in_flight=in_flight,
            latency=options.latency,
            client=options.client,
        )
        print(json.dumps(result) if options.json else "\n".join(f"{k:14} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
