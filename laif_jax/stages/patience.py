"""Waiting for an endpoint that died in mid-run: whoever mends it need not start the run again."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from laif_jax.config import LabelingSpec
from laif_jax.labeling.complete import Failure
from laif_jax.records import Completion, Judgement
from laif_jax.training import together

logger = logging.getLogger(__name__)
PAUSE_FIRST, PAUSE_MOST = 1.0, 30.0  # seconds before an endpoint that does not answer is asked again
Answer = TypeVar("Answer", bound=Judgement | Completion | Failure)


def ask_patiently(ask: Callable[[], list[Answer]], name: str, spec: LabelingSpec, what: str) -> list[Answer]:
    """What `ask` gives, asked for again while too little came and the rest failed in a way that may pass.

    Answers are kept by the labelling service: asking again asks for the rest only.

    Args:
      name, what: of the endpoint, and of what it is asked for ("comparisons"), for the log.
    """
    pause, most, end = PAUSE_FIRST, -1, 0.0
    while True:
        found = ask()
        decided = sum(_came(answer) for answer in found)
        passing = [reason for reason in map(_passing, found) if reason is not None]
        if decided >= spec.min_coverage * len(found) or not passing:
            return found
        if decided > most:  # it lives: the time counts from here
            most, end, pause = decided, time.monotonic() + spec.max_wait, PAUSE_FIRST
        left = end - time.monotonic()
        if left <= 0:
            return found
        logger.warning(
            "%d of %d %s have no answer of %s (%s); waiting for it, up to %.0f s",
            *(len(found) - decided, len(found), what, name, passing[0], left),
        )
        together.pause(min(pause, left))
        pause = min(2 * pause, PAUSE_MOST)


def _came(answer: Judgement | Completion | Failure) -> bool:
    """Whether it is of use: a label, or a text."""
    if isinstance(answer, Judgement):
        return answer.p_b is not None
    return isinstance(answer, Completion) and bool(answer.text.strip())


def _passing(answer: Judgement | Completion | Failure) -> str | None:
    """Why it did not come, if that may pass; else None."""
    if isinstance(answer, Judgement):
        return answer.reason if answer.meta.get("passing") else None
    return answer.reason if isinstance(answer, Failure) and answer.passing else None
