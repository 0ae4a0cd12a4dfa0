"""Rewards of completions as plain functions of text: what a critic rates directly (d-RLAIF, Lee et al. 2023)."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from laif_jax.config import RewardSource
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.client import LabelClient
from laif_jax.labeling.critic import load_critic
from laif_jax.labeling.errors import LabelError
from laif_jax.labeling.jobs import JobStatus
from laif_jax.parallel import distributed
from laif_jax.records import Completion, Prompt, Rating, Status
from laif_jax.stages import patience
from laif_jax.stages.artifact import StageError
from laif_jax.stages.context import Context
from laif_jax.stages.progress import BUDGET, job_lines
from laif_jax.stages.usage import usage_of

logger = logging.getLogger(__name__)


class RewardFn(Protocol):
    """The reward of completions, as reinforcement learning asks for it.

    Attributes:
      metrics: numbers of the last call, for the iteration's row of metrics; {} before the first.
    """

    metrics: Mapping[str, float]

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores of n completions, each with its prompt.

        All processes of a multi-host run call it together, with the same rows, and get the same.

        Returns:
          scores: float32 [n], 0 where there is none. ok: bool [n]: which rows have a score; the others must not count.

        Raises:
          StageError: there is not one score, and waiting longer is of no use. Raised in every process (as a
            DistributedError in those beside the first). Save, then let it end the run: run again, it goes on.
        """
        ...


def critic_reward(ctx: Context, source: RewardSource) -> "CriticReward":
    """The reward of the critic `source.critic` (`source.weight` is the caller's).

    Raises:
      StageError: it is no critic that rates.
    """
    return CriticReward(ctx, source)


class CriticReward:
    """A critic's ratings, rescaled to [-1, 1], through the labelling service: see `critic_reward` and `RewardFn`.

    A call waits `source.max_wait` seconds at most (the start of a local model server, at the first call, apart).

    * What has not come by then is not ok. The service then starts no more calls for it; answers under way are stored,
      and used without a further call if the same completion is rated again.
    * Where less than `labeling.min_coverage` of the rows is rated because calls fail in a way that may pass (nobody
      there, too many calls), they are made again, with growing pauses, as long as the time allows.
    * An answer that is refused or cannot be read is not ok. It is not asked for again.
    * Not one rating: StageError.

    Attributes:
      metrics: `objective/ratings_ok` (share of the rows), `objective/ratings_late`, `_failed`, `_unparsable`,
        `_refused` (shares), `objective/ratings_score` (mean score from 1 to 10), `objective/ratings_mass` (mean
        probability of the ten numbers), `objective/ratings_wait` (seconds), `objective/ratings_prompt_tokens`,
        `_completion_tokens`, and `objective/ratings_cost` (US dollars, where the endpoint has prices). Each request
        counts once in a run, when its answer is first used.
    """

    def __init__(self, ctx: Context, source: RewardSource) -> None:
        assert source.critic is not None  # checked by the schema's users
        self.metrics: Mapping[str, float] = {}
        self._ctx, self._source = ctx, source
        self._spec = ctx.config.critics[source.critic]
        self._counted: set[str] = set()
        problem = distributed.from_main(self._problem)
        if problem:
            raise StageError(f"critics.{source.critic}: {problem}")

    def _problem(self) -> str:
        if self._spec.changes or not self._spec.alone:
            names = [*self._spec.changes, *(n for n in ("ensemble", "strong") if getattr(self._spec, n))]
            return f"{', '.join(names)}: has no effect on a critic that rates; remove it"
        try:
            load_critic(self._spec.critic).require("rating")
        except LabelError as error:
            return str(error)
        return ""

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> tuple[np.ndarray, np.ndarray]:
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions")
        rows = list(zip(prompts, completions))
        found = distributed.from_main(lambda: self._rate(rows))
        self.metrics = found["metrics"]
        scores = np.array([0.0 if r is None else r for r in found["rewards"]], np.float32)
        return scores, np.array([r is not None for r in found["rewards"]], bool)

    # ---- in process 0 --------------------------------------------------------------------------------------------

    def _rate(self, rows: Sequence[tuple[Prompt, Completion]]) -> dict[str, Any]:
        endpoint = self._ctx.services.endpoint(self._spec.endpoint)
        client = self._ctx.services.client
        start = time.monotonic()
        ratings = self._wait(client, endpoint, rows, start + self._source.max_wait)
        metrics = self._measure(ratings) | {"objective/ratings_wait": time.monotonic() - start}
        return {"rewards": [rating and rating.reward for rating in ratings], "metrics": metrics}

    def _wait(
        self, client: LabelClient, endpoint: Endpoint, rows: Sequence[tuple[Prompt, Completion]], end: float
    ) -> list[Rating | None]:
        """One rating per row, or None, at the time `end` at the latest.

        Raises:
          StageError: not one row is rated.
        """
        name, pause, most = self._spec.endpoint, patience.PAUSE_FIRST, 0
        lines, state = job_lines(f"ratings of {name}"), ""

        def look(status: JobStatus) -> None:
            nonlocal state
            state = status.state
            lines(status)

        while True:
            ratings = client.rate(
                endpoint,
                self._spec.critic,
                rows,
                deadline_s=max(0.0, end - time.monotonic()),
                stop=True,
                on_progress=look,
            )
            rated = sum(rating is not None and rating.score is not None for rating in ratings)
            passing = [r for r in ratings if r is not None and r.meta.get("passing")]
            left = end - time.monotonic()
            enough = rated >= self._ctx.config.labeling.min_coverage * len(rows)
            if enough or not passing or left <= 0:
                break
            logger.warning(
                "%d of %d completions have no rating of %s (%s); asking again for up to %.0f s",
                *(len(rows) - rated, len(rows), name, passing[0].reason, left),
            )
            if rated > most:
                most, pause = rated, patience.PAUSE_FIRST
            time.sleep(min(pause, left))
            pause = min(2 * pause, patience.PAUSE_MOST)
        if rows and not rated:
            raise StageError(self._nothing(ratings, BUDGET if state == "out_of_budget" else ""))
        return ratings

    def _nothing(self, ratings: Sequence[Rating | None], why: str) -> str:
        states = Counter("late" if rating is None else str(rating.status) for rating in ratings)
        reason = why or next((rating.reason for rating in ratings if rating is not None), "")
        return (
            f"the critic `{self._source.critic}` rated none of {len(ratings)} completions within `max_wait` "
            f"{self._source.max_wait:g} s: {dict(states)} (first reason: {reason or 'none came'}). Mend or start the "
            f"endpoint `{self._spec.endpoint}`, or raise `max_wait`, and run the same command again: training goes on "
            "from its last checkpoint, and ratings that came are in the labelling store"
        )

    def _measure(self, ratings: Sequence[Rating | None]) -> dict[str, float]:
        """The numbers of one call, except for how long it took."""
        rated = [rating for rating in ratings if rating is not None and rating.score is not None]
        states = Counter(rating.status if rating is not None else None for rating in ratings)
        share = {
            "late": states[None],
            "failed": states[Status.FAILED],
            "unparsable": states[Status.UNPARSABLE],
            "refused": states[Status.REFUSED],
        }
        count = max(1, len(ratings))
        metrics = {"objective/ratings_ok": len(rated) / count}
        metrics |= {f"objective/ratings_{name}": number / count for name, number in share.items()}
        if rated:
            metrics["objective/ratings_score"] = float(np.mean([r.score for r in rated]))
        if mass := [rating.mass for rating in rated if rating.mass is not None]:
            metrics["objective/ratings_mass"] = float(np.mean(mass))
        # Equal texts are one request, which is paid once.
        new = {r.meta["request"]: r for r in ratings if r is not None and r.usage is not None}
        used = usage_of(
            (rating for key, rating in new.items() if key not in self._counted),
            self._ctx.config.endpoints[self._spec.endpoint],
        )
        self._counted |= new.keys()
        return metrics | {f"objective/ratings_{k}": float(v) for k, v in used.items() if v is not None}
