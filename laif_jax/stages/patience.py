"""Waiting for an endpoint that died in mid-run: whoever mends it need not start the run again."""

import logging
import time
from collections.abc import Callable

from laif_jax.config import LabelingSpec
from laif_jax.records import Judgement

logger = logging.getLogger(__name__)
PAUSE_FIRST, PAUSE_MOST = 1.0, 30.0  # seconds before an endpoint that does not answer is asked again


def ask_patiently(ask: Callable[[], list[Judgement]], name: str, spec: LabelingSpec) -> list[Judgement]:
    """The judgements that `ask` gives, asked for again while too few came and the rest failed in a way that may pass.

    Answers are kept by the labelling service: asking again asks for the rest only.

    Args:
      name: of the endpoint, for the log.
    """
    pause, most, end = PAUSE_FIRST, -1, 0.0
    while True:
        found = ask()
        decided = sum(judgement.p_b is not None for judgement in found)
        passing = [judgement for judgement in found if judgement.meta.get("passing")]
        if decided >= spec.min_coverage * len(found) or not passing:
            return found
        if decided > most:  # it lives: the time counts from here
            most, end, pause = decided, time.monotonic() + spec.max_wait, PAUSE_FIRST
        left = end - time.monotonic()
        if left <= 0:
            return found
        logger.warning(
            "%d of %d comparisons have no answer of %s (%s); waiting for it, up to %.0f s",
            *(len(found) - decided, len(found), name, passing[0].reason, left),
        )
        time.sleep(min(pause, left))
        pause = min(2 * pause, PAUSE_MOST)
