"""Who takes part in a side-by-side run: each is a process of its own, in a virtual environment of its own."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "peers"
OURS = "laif_jax"


@dataclass(frozen=True)
class Peer:
    """One of a peer's releases: the folder of its environment, what that holds, its script, and the tasks it has."""

    folder: str
    packages: tuple[str, ...]
    script: str
    tasks: tuple[str, ...]


# TRL 1.12 is the last release that has PPO.
PEERS = {
    "trl": (
        Peer("trl", ("trl==1.16.0", "torch==2.13.0"), "trl_train.py", ("sft", "dpo", "reward", "generate")),
        Peer("trl-ppo", ("trl==1.12.0", "torch==2.13.0"), "trl_ppo.py", ("ppo",)),
    ),
    "tunix": (
        Peer("tunix", ("google-tunix==0.1.7",), "tunix_train.py", ("sft", "dpo", "generate", "compile")),
    ),
}


def find_peer(name: str, task: str) -> Peer | None:
    """The release of the peer that has the task; None: it does not have it."""
    return next((peer for peer in PEERS[name] if task in peer.tasks), None)


def environment(peer: Peer, folder: Path) -> Path:
    """The interpreter of a peer's virtual environment, which is made if it is not there."""
    python = folder / peer.folder / "bin" / "python"
    if not python.exists():
        print(f"making the environment of {peer.folder} in {folder / peer.folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder / peer.folder)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *peer.packages]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return python


def scripts(task: str, against: list[str], envs: Path) -> dict[str, tuple[Path, Path]]:
    """Name -> (interpreter, script) of all that take part in a task, this package first."""
    ours = HERE / ("laif_ppo.py" if task == "ppo" else "laif.py")
    found = {OURS: (Path(sys.executable), ours)}
    for name in against:
        peer = find_peer(name, task)
        if peer is not None:
            found[name] = (environment(peer, envs), HERE / peer.script)
    return found


class Contender:
    """A running contender: started, told to run passes, and ended.

    Raises:
      RuntimeError: its process failed; the message ends with what it said.
    """

    def __init__(self, name: str, python: Path, script: Path, job: Path, folder: Path):
        self.name = name
        self._log = (folder / f"{name}.log").open("w+")
        begin = time.monotonic()
        self._process = subprocess.Popen(
            [str(python), str(script), str(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_variables(),
        )
        self.ready = self._read() | {"ready_seconds": time.monotonic() - begin}

    def passes(self, count: int) -> dict[str, float]:
        """Seconds of `count` passes over the work (-1: of one step), and of its parts where it tells them."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> int:
        """Ends it; its peak of memory in bytes."""
        peak = int(self.passes(0)["peak_bytes"])
        self._process.wait()
        self._log.close()
        return peak

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"{self.name} failed:\n{self._log.read()[-3000:]}")
        return json.loads(line)


def _variables() -> dict[str, str]:
    """Of the environment. On an accelerator JAX would take most of the memory at once, though several share it."""
    root = str(Path(__file__).parent.parent)
    return dict(os.environ) | {"PYTHONPATH": root, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
