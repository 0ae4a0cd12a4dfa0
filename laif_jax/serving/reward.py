"""A reward model as a critic: it answers pairwise questions over the chat protocol from two scores.

The messages of a question are read back into the instruction and two responses (`laif_jax.serving.questions`); both are
scored as in training, and P(first) = sigmoid(score of the first - score of the second) (Bradley & Terry 1952). The
answer is in the form that the critic's parser reads: the letter, list or JSON object, with log-probs of both options
where they are asked for.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from fastapi import FastAPI

from laif_jax.labeling.critic import Critic
from laif_jax.labeling.parsers import LogprobParser
from laif_jax.models.reward import RewardModel, load_reward_model
from laif_jax.rollout.rewards import RewardScorer, combine, encode_response
from laif_jax.serving.http import fingerprint, http_app
from laif_jax.serving.protocol import ApiError, ChatRequest, chat_response, choice, queue_full, token_entry
from laif_jax.serving.questions import Question, QuestionError, QuestionReader

log = logging.getLogger(__name__)


class RewardService:
    """Answers questions: messages -> two scores -> a verdict, no HTTP.

    Args:
      model: the reward model. name: that clients see. critics: whose questions it answers, see `QuestionReader`.
      dtype: of compute. max_batch: responses scored together. max_queue: questions that may wait. window: seconds that
        a batch waits for company.
    """

    def __init__(
        self,
        model: RewardModel,
        *,
        name: str,
        fingerprint: str,
        critics: Sequence[str] | None = None,
        dtype: Any = jnp.float32,
        max_batch: int = 16,
        max_queue: int = 512,
        window: float = 0.01,
    ) -> None:
        self.name, self.fingerprint, self.model = name, fingerprint, model
        self.reader = QuestionReader(critics)
        self.scorer = RewardScorer(model, dtype=dtype, batch_size=max_batch)
        self._window, self._max_batch = window, max_batch
        self._queue: asyncio.Queue[tuple[list[list[int]], asyncio.Future[np.ndarray]]] = asyncio.Queue(
            max_queue
        )
        self.batches = 0

    @property
    def max_length(self) -> int:
        """Tokens that prompt and response may have together."""
        return self.model.max_length or self.model.cfg.max_position

    @property
    def queued(self) -> int:
        """Questions that wait."""
        return self._queue.qsize()

    async def chat(self, request: ChatRequest) -> dict[str, Any]:
        """Answers a request. Raises ApiError."""
        try:
            question = self.reader.read([message.plain() for message in request.messages])
        except QuestionError as error:
            raise ApiError(str(error), param="messages", code=error.code) from error
        sequences = self._sequences(question)
        first, second = await self._scores(sequences)
        content, logprobs = answer(question.critic, float(second) - float(first))
        if not request.logprobs:
            entries = None
        else:
            entries = [_entry(content, logprobs, request.top_logprobs or 0)]
        choices = [choice(i, content, "stop", entries) for i in range(request.n or 1)]
        used = sum(len(sequence) for sequence in sequences)
        body = chat_response(self.name, choices, used, len(choices), self.fingerprint)
        # Clients of the protocol pass over a field that they do not know.
        return body | {"reward": {"critic": question.critic.name, "scores": [float(first), float(second)]}}

    def _sequences(self, question: Question) -> list[list[int]]:
        messages = question.conversation
        try:
            return [encode_response(self.model, messages, text) for text in (question.first, question.second)]
        except ValueError as error:  # the template refuses the messages, or the prompt does not fit
            raise ApiError(str(error), param="messages", code="invalid_question") from error

    # ---- batches ----

    async def _scores(self, sequences: list[list[int]]) -> np.ndarray:
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait((sequences, future))
        except asyncio.QueueFull as error:
            raise queue_full(f"{self._queue.maxsize} questions wait already; ask again later") from error
        return await future

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """While requests may come."""
        worker = asyncio.create_task(self._work())
        yield
        worker.cancel()

    async def _work(self) -> None:
        """Scores what waits, batch by batch, until it is cancelled."""
        while True:
            waiting = [await self._queue.get()]
            await asyncio.sleep(self._window)
            while 2 * len(waiting) < self._max_batch and not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            rows = [sequence for sequences, _ in waiting for sequence in sequences]
            try:
                scores = combine(await asyncio.to_thread(self.scorer.score, rows), "mean")
            except Exception as error:
                log.exception("a batch of %d responses failed", len(rows))
                failure = ApiError(
                    f"scoring failed: {type(error).__name__}: {error}",
                    status=500,
                    kind="server_error",
                    code="scoring",
                )
                for _, future in waiting:
                    if not future.done():
                        future.set_exception(failure)
                continue
            self.batches += 1
            for index, (_, future) in enumerate(waiting):
                if not future.done():  # its client may have gone
                    future.set_result(scores[2 * index : 2 * index + 2])


def answer(critic: Critic, logit: float) -> tuple[str, tuple[tuple[str, float], ...]]:
    """The verdict in the critic's form, and both possible answers with their log-probs, the likelier first.

    Args:
      logit: of "the second response is better".
    """
    reader = critic.reader
    if isinstance(reader, LogprobParser):
        texts = reader.options.tokens
    else:
        texts = (reader.render(-1.0, False).text, reader.render(1.0, False).text)
    both = ((texts[0], _log_sigmoid(-logit)), (texts[1], _log_sigmoid(logit)))
    ranked = both[::-1] if logit > 0 else both
    if isinstance(reader, LogprobParser):
        return ranked[0][0], ranked
    return reader.render(logit, False).text, ranked


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def _entry(content: str, ranked: Sequence[tuple[str, float]], top: int) -> dict[str, Any]:
    """The answer as one token of `logprobs`."""
    options = [token_entry(text, text.encode(), logp) for text, logp in ranked]
    # A tie in a form that has one is neither of the two; its log-prob is then that of an even choice.
    said = dict(ranked).get(content, math.log(0.5))
    return {**token_entry(content, content.encode(), said), "top_logprobs": options[:top]}


# ---- HTTP ------------------------------------------------------------------------------------------------------


def create_reward_app(
    checkpoint: str,
    *,
    model: RewardModel | None = None,
    name: str | None = None,
    critics: Sequence[str] | None = None,
    dtype: str = "float32",
    max_batch: int = 16,
    max_queue: int = 512,
    window: float = 0.01,
) -> FastAPI:
    """The application over a reward model's folder; arguments as `RewardService`. `app.state.service`."""
    loaded = model if model is not None else load_reward_model(checkpoint)
    service = RewardService(
        loaded,
        name=name or Path(checkpoint).absolute().name,
        fingerprint=fingerprint(checkpoint),
        critics=critics,
        dtype=jnp.dtype(dtype),
        max_batch=max_batch,
        max_queue=max_queue,
        window=window,
    )

    return http_app(service, "laif reward server")
