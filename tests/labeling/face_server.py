"""A labelling service as a real process, with what its tests look at."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

TOKEN = "a-token-for-tests-0123456789abcdef"


@contextlib.contextmanager
def served(
    store: Path, *options: str, env: dict[str, str] | None = None
) -> Generator[tuple[str, subprocess.Popen[bytes]]]:
    """The address and the process of `python -m laif_jax.labeling serve`; its log is `serve.log` beside the store."""
    ready = store.with_name(store.name + ".ready")
    log = store.with_name(store.name + ".log")
    command = [sys.executable, "-m", "laif_jax.labeling", "serve", "--store", str(store), "--port", "0"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--ready-file", str(ready), *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
        )
    try:
        end = time.monotonic() + 120
        while not ready.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)
        yield ready.read_text().replace("0.0.0.0", "127.0.0.1"), process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        ready.unlink(missing_ok=True)
