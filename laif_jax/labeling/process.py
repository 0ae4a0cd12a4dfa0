"""Child processes that never outlive their parent: the child ends when its standard input closes."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from laif_jax.labeling.errors import LabelServiceError


def end_with_parent() -> None:
    """In a child: send SIGTERM to this process once the parent's end of our standard input closes, however it died."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def guarded(command: Sequence[str]) -> list[str]:
    """`command` under a guard that ends it when our standard input closes, for programs that do not watch it."""
    return [sys.executable, "-m", "laif_jax.labeling.process", *command]


class Child:
    """A child process as a context manager: started on entry; on exit SIGTERM, and SIGKILL after `grace` seconds.

    Args:
      name: for messages. log_file: gets its standard output and error.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_file: Path,
        env: dict[str, str] | None = None,
        grace: float = 20.0,
    ) -> None:
        self.name, self.command, self.log_file, self.grace = name, list(command), log_file, grace
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=self._env
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        process.terminate()
        try:
            process.wait(self.grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdin.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def death(self) -> str:
        """How it died, with the end of its log; "" while it lives."""
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return ""
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"the {self.name} {how}. Its log, {self.log_file}, ends:\n{self._log_end()}"

    def _log_end(self) -> str:
        with contextlib.suppress(OSError):
            return self.log_file.read_bytes()[-2000:].decode("utf-8", "replace").strip()
        return "(no log)"

    def wait_until(self, ready: Callable[[], bool], timeout: float) -> None:
        """Waits until `ready()`.

        Raises:
          LabelServiceError: it died, or is not ready after `timeout` seconds.
        """
        limit = time.monotonic() + timeout
        while not ready():
            if death := self.death():
                raise LabelServiceError(death)
            if time.monotonic() > limit:
                raise LabelServiceError(
                    f"the {self.name} is not ready after {timeout:g} s. Its log, {self.log_file}, ends:\n"
                    f"{self._log_end()}"
                )
            time.sleep(0.02)


def _guard(command: Sequence[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def stop(*_: object) -> None:
        child.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    end_with_parent()
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(_guard(sys.argv[1:]))
