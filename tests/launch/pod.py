"""A Cloud TPU service in a folder, and a checkout to launch from, for the tests of `launch/`."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAKES = Path(__file__).parent / "fakes"


class Cloud:
    """What a test does to the service, and what the service was given.

    Args:
      folder: a new one; it holds the service, a small git checkout with the launchers, and the user's home.
      workers: per slice. patience: looks at a request until its slices are there.
    """

    def __init__(self, folder: Path, workers: int = 2, patience: int = 1) -> None:
        self.cloud, self.home, self.checkout = folder / "cloud", folder / "home", folder / "checkout"
        self.fakes = folder / "bin"
        shutil.copytree(FAKES, self.fakes)
        for path in self.fakes.iterdir():  # this Python, without what it would import at its start
            path.write_text(path.read_text().replace("/usr/bin/env python3", f"{sys.executable} -IS"))
        self.cloud.mkdir(parents=True)
        self.home.mkdir()
        state = {"request": None, "nodes": {}, "names": [], "workers": workers, "patience": patience}
        self.set(**state, created=0, fail={})
        shutil.copytree(
            ROOT / "launch", self.checkout / "launch", ignore=shutil.ignore_patterns("pod.env", "__pycache__")
        )
        (self.checkout / "requirements").mkdir()
        shutil.copy(ROOT / "requirements" / "py312.txt", self.checkout / "requirements")
        self.git("init", "--quiet")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "code")

    def git(self, *arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=self.checkout, check=True, capture_output=True)

    @property
    def state(self) -> dict:
        return json.loads((self.cloud / "state.json").read_text())

    def set(self, **values) -> None:
        path = self.cloud / "state.json"
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))

    @property
    def calls(self) -> list[list[str]]:
        path = self.cloud / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def calls_of(self, *verb: str) -> list[list[str]]:
        return [call for call in self.calls if tuple(call[2 : 2 + len(verb)]) == verb]

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": f"{self.fakes}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "FAKE_CLOUD": str(self.cloud),
            "LAIF_POD_PROJECT": "project",
            "LAIF_POD_ZONE": "us-west4-a",
            "LAIF_POD_NAME": "pod",
            "LAIF_POD_TYPE": "v5litepod-16",
        } | more

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.checkout / "launch" / "tpu_pod.sh"), *arguments],
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """launch/tpu_pod.sh ARGUMENTS, which must end with `code`."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def preempt(self, node: str = "PREEMPTED", request: str = "SUSPENDED") -> None:
        subprocess.run(
            [str(self.fakes / "gcloud"), "compute", "tpus", "test", "preempt", node, request],
            env=self.environment(),
            check=True,
        )

    def workers(self) -> list[Path]:
        """The workers' home folders, slice by slice."""
        state = self.state
        return [self.cloud / name / str(i) for name in state["names"] for i in range(state["workers"])]

    def end(self) -> None:
        """Nothing that a test started on a worker stays."""
        for name in self.state["names"]:
            for record in (self.cloud / name).glob("*/laif-runs/*/supervisor"):
                try:
                    os.killpg(int(record.read_text().split()[0]), 9)
                except ProcessLookupError:
                    continue


def real_gcloud() -> str | None:
    """The Google Cloud CLI, if it is installed here."""
    found = shutil.which("gcloud")
    return (
        found if found and Path(found).resolve().parent.parent.joinpath("lib", "surface").is_dir() else None
    )


def no_account(command: Sequence[str], folder: Path) -> tuple[int, str]:
    """(exit code, errors) of the real gcloud in a configuration without any account, far from any service.

    It reads the arguments, then refuses: exit code 2 is a wrong argument, 1 is that there is no account.
    """
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "CLOUDSDK_CONFIG": str(folder / "config")}
    switches = {"CHECK_GCE_METADATA": "false", "DISABLE_PROMPTS": "1", "DISABLE_USAGE_REPORTING": "true"}
    environment |= {f"CLOUDSDK_CORE_{name}": value for name, value in switches.items()}
    services = ("TPU", "COMPUTE", "CONTAINER", "STORAGE", "IAM", "AIPLATFORM", "CLOUDRESOURCEMANAGER")
    nowhere = "http://127.0.0.1:9/"
    environment |= {f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{name}": nowhere for name in services}
    environment["CLOUDSDK_CORE_PROJECT"] = "project"
    gcloud = real_gcloud()
    assert gcloud is not None
    done = subprocess.run([gcloud, *command], env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr
