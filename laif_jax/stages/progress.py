"""Progress of long waits as plain log lines: they read the same in a terminal, a file and a pod's log."""

import logging
import time
from collections.abc import Callable

from laif_jax.labeling.jobs import JobStatus

logger = logging.getLogger(__name__)
BUDGET = "the budget of the labelling service is used up; calls go on when it is raised"


def progress_lines(what: str, every: float = 15.0) -> Callable[[int, int], None]:
    """A callback `(done, total)` that logs a line with the rate and the time left, at most every `every` seconds."""
    start = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < every or done == 0:
            return
        last = now
        left = (total - done) * (now - start) / done
        logger.info(
            "%s: %d of %d, %.1f per second, %.0f s left", what, done, total, done / (now - start), left
        )

    return report


def job_lines(what: str) -> Callable[[JobStatus], None]:
    """The same for a job of the labelling service; why it is held up, if it is, is logged each time that changes."""
    report = progress_lines(what)
    held = ""

    def look(status: JobStatus) -> None:
        nonlocal held
        report(status.done, status.total)
        why = status.stalled or (BUDGET if status.state == "out_of_budget" else "")
        if why != held:
            held = why
            logger.warning("%s: %s", what, why or "goes on")

    return look
