"""What a person sees of a run: a live line on a terminal, plain log lines elsewhere."""

import logging
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from laif_jax.parallel import is_main

log = logging.getLogger(__name__)
PLAIN_EVERY = 10.0  # seconds between log lines


@contextmanager
def open_progress(title: str, total: int, done: int, *, enabled: bool = True) -> Generator[Any, None, None]:
    """A progress display with `.update(step, row)`: rich on a terminal, log lines elsewhere, nothing if not enabled."""
    if not enabled or not is_main():
        yield Silent()
    elif sys.stderr.isatty():
        with RichProgress(title, total, done) as display:
            yield display
    else:
        yield PlainProgress(title, total, done)


class Silent:
    """Shows nothing."""

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        del step, row


class PlainProgress:
    """A log line at most every `PLAIN_EVERY` seconds, and at the end."""

    def __init__(self, title: str, total: int, done: int):
        self.title, self.total, self.done = title, total, done
        self.started = self.last = time.monotonic()

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if step < self.total and now - self.last < PLAIN_EVERY:
            return
        self.last = now
        left = (now - self.started) / max(1, step - self.done) * (self.total - step)
        log.info("%s: step %d/%d, %s, %s left", self.title, step, self.total, describe(row), clock(left))


class RichProgress:
    """A bar with loss, tokens per second and time left."""

    def __init__(self, title: str, total: int, done: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(title, total=total, completed=done, numbers="")

    def __enter__(self) -> "RichProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        self._progress.update(self._task, completed=step, numbers=describe(row))


def describe(row: Mapping[str, Any]) -> str:
    """What tells whether it learns (PPO's score and KL, loss, preference accuracy; those that there are), and speed."""
    parts = []
    if row.get("objective/scores") is not None:
        parts.append(f"score {row['objective/scores']:.4f}")
    if row.get("objective/kl") is not None:
        parts.append(f"KL {row['objective/kl']:.3f}")
    if row.get("loss") is not None:
        parts.append(f"loss {row['loss']:.4f}")
    if row.get("rewards/accuracies") is not None:
        parts.append(f"accuracy {row['rewards/accuracies']:.2f}")
    if row.get("perf/tokens_per_second_per_device") is not None:
        parts.append(f"{row['perf/tokens_per_second_per_device']:,.0f} tokens/s/device")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """A duration as "m:ss" or "h:mm:ss"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
