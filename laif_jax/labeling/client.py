"""The client of the labelling service, used by the stages. Plain blocking calls; progress through a callback."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import httpx
from pydantic import TypeAdapter

from laif_jax.config.schema import EndpointSpec
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.complete import Failure
from laif_jax.labeling.critic import Critic, load_critic
from laif_jax.labeling.errors import LabelServiceError
from laif_jax.labeling.jobs import CompleteJob, Job, JobStatus, JudgeJob, RateItem, RateJob, ReviseJob
from laif_jax.labeling.keys import Key
from laif_jax.labeling.revise import Reviser, load_reviser
from laif_jax.records import Comparison, Completion, Judgement, Prompt, Rating

log = logging.getLogger(__name__)
Progress = Callable[[JobStatus], None]
RAISED = 1.0  # seconds in which a job notices that its budget was raised
FIRST_LOOK = 0.01  # seconds until the first look at a job; every wait is twice the one before, up to `poll`
_JSON = {"Content-Type": "application/json"}
_completion: TypeAdapter[Completion | Failure] = TypeAdapter(Completion | Failure)


class LabelClient:
    """Submits jobs, waits for them, and reads their results.

    A short outage of the service is waited out; if the service was started again meanwhile, the job is submitted again
    and goes on from the store.

    Args:
      poll: seconds between two looks at a running job; the first looks come sooner, since small jobs end at once.
      patience: seconds without an answer from the service, or without space for its store, that are waited out.
      token: what a service with a token asks for; see `access.read_token`.
      job_budget: what each job may cost, over all its runs, as in "2.50USD".
      death: says how the service died, "" while it lives; then nobody waits for it (see `LabelService.client`).
      sleep: how it waits for a job.
    """

    def __init__(
        self,
        url: str,
        *,
        poll: float = 0.2,
        patience: float = 30.0,
        death: Callable[[], str] | None = None,
        token: Key | None = None,
        job_budget: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        self.last_job = ""
        self._job_budget, self._sleep = job_budget, sleep
        self._poll, self._patience, self._death = poll, patience, death or (lambda: "")
        # No proxy: the service is on this machine, or on one that the user named.
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(120.0, connect=5.0),
            trust_env=False,
            headers={} if token is None else {"Authorization": f"Bearer {token.reveal()}"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # ---- what the stages call ----------------------------------------------------------------------------------

    def complete(
        self,
        endpoint: EndpointSpec | Endpoint,
        requests: Sequence[Prompt],
        *,
        generator: str,
        system: str | None = None,
        temperature: float = 1.0,
        max_tokens: int = 512,
        top_p: float | None = None,
        n: int = 1,
        seed: int | None = None,
        on_progress: Progress | None = None,
    ) -> list[Completion | Failure]:
        """Completions of prompts: prompt 0 sample 0, ..., prompt 0 sample n-1, prompt 1 sample 0, ...

        Args:
          endpoint: who writes; for `llama_cpp` and `checkpoint` use `with running(spec) as endpoint`.
          generator: the name that the completions carry.
          seed: every sample of every prompt is sent with a `seed` of its own, drawn from this one; None: none is sent.

        Raises:
          LabelServiceError: the service is unreachable or refused the job. What an *endpoint* does wrong never
            raises: it is a `Failure` in the list.
        """
        job = CompleteJob(
            endpoint=_endpoint(endpoint),
            prompts=tuple(requests),
            generator=generator,
            system=system,
            temperature=temperature,
            max_tokens=max_tokens,
            top_p=top_p,
            n=n,
            seed=seed,
        )
        status = self._run(job, on_progress)
        return [_completion.validate_json(line) for line in self._lines(status.id)]

    def judge(
        self,
        endpoint: EndpointSpec | Endpoint,
        critic: str | Path | Critic,
        comparisons: Sequence[Comparison],
        *,
        order: Literal["both", "seeded"] = "both",
        seed: int = 0,
        probe: str = "",
        on_progress: Progress | None = None,
    ) -> list[Judgement]:
        """One judgement per comparison, in order; see `laif_jax.labeling.judge` for the rules.

        Args:
          critic: a shipped critic's name, a critic's folder on this machine, or a `Critic`.
          seed: draws the order for `order="seeded"`; no effect on "both".
          probe: the round of a drift probe; see `laif_jax.labeling.probe`.

        Raises:
          CriticError: no such critic. LabelServiceError: see `complete`.
        """
        critic = critic if isinstance(critic, Critic) else load_critic(critic)
        if not critic.judges:
            critic.require("comparison")
        job = JudgeJob(
            endpoint=_endpoint(endpoint),
            critic=critic,
            comparisons=tuple(comparisons),
            order=order,
            seed=seed,
            probe=probe,
        )
        status = self._run(job, on_progress)
        return [Judgement.model_validate_json(line) for line in self._lines(status.id)]

    def judgements(self, job_id: str | None = None) -> list[Judgement]:
        """The single-order judgements behind a job's results (by default the last job of this client)."""
        return [
            Judgement.model_validate_json(line) for line in self._lines(job_id or self.last_job, parts="true")
        ]

    def rate(
        self,
        endpoint: EndpointSpec | Endpoint,
        critic: str | Path | Critic,
        completions: Sequence[tuple[Prompt, Completion]],
        *,
        deadline_s: float | None = None,
        stop: bool = False,
        on_progress: Progress | None = None,
    ) -> list[Rating | None]:
        """One rating per completion, in order; None for those that have not come by the deadline.

        What is late is not lost: the job goes on, its answers are stored, and who asks again gets them unpaid.

        Args:
          critic: a shipped critic that rates, a critic's folder on this machine, or a `Critic`.
          deadline_s: seconds to wait at most; None: until all are there.
          stop: at the deadline the service starts no more calls for this job; the answers under way are still stored.
            For who will not ask again, and shall not pay for what he does not use.

        Raises:
          CriticError: no such critic, or one that compares. LabelServiceError: see `complete`.
        """
        critic = critic if isinstance(critic, Critic) else load_critic(critic)
        critic.require("rating")
        items = tuple(RateItem(prompt=prompt, completion=completion) for prompt, completion in completions)
        job = RateJob(endpoint=_endpoint(endpoint), critic=critic, items=items)
        limit = None if deadline_s is None else time.monotonic() + deadline_s
        status = self._run(job, on_progress, limit)
        found = {}
        for line in self._lines(status.id):
            rating = Rating.model_validate_json(line)
            found[rating.completion_id] = rating
        if stop and status.state in ("running", "out_of_budget"):
            self._request("POST", f"/v1/jobs/{status.id}/stop", headers=_JSON)
        return [found.get(completion.id) for _, completion in completions]

    def revise(
        self,
        endpoint: EndpointSpec | Endpoint,
        completions: Sequence[tuple[Prompt, Completion]],
        *,
        generator: str,
        reviser: str | Path | Reviser = "constitutional",
        steps: int = 4,
        seed: int = 0,
        on_progress: Progress | None = None,
    ) -> list[Completion | Failure]:
        """The last of `steps` revisions of each completion, in order; see `laif_jax.labeling.revise`.

        `meta.steps` holds the principle, the critique and the revision of each step; `revisions()` gives the revisions
        of all steps as completions.

        Args:
          reviser: a shipped reviser's name, a reviser's folder on this machine, or a `Reviser`.
          seed: draws the principles.

        Raises:
          CriticError: no such reviser. LabelServiceError: see `complete`.
        """
        reviser = reviser if isinstance(reviser, Reviser) else load_reviser(reviser)
        items = tuple(RateItem(prompt=prompt, completion=completion) for prompt, completion in completions)
        job = ReviseJob(
            endpoint=_endpoint(endpoint),
            reviser=reviser,
            items=items,
            steps=steps,
            seed=seed,
            generator=generator,
        )
        status = self._run(job, on_progress)
        return [_completion.validate_json(line) for line in self._lines(status.id)]

    def revisions(self, job_id: str | None = None) -> list[Completion]:
        """The revisions of every step of a `revise` job (by default the last job of this client)."""
        lines = self._lines(job_id or self.last_job, parts="true")
        return [Completion.model_validate_json(line) for line in lines]

    def status(self, job_id: str) -> JobStatus:
        """Where a job stands."""
        return JobStatus.model_validate(self._request("GET", f"/v1/jobs/{job_id}").json())

    def stats(self) -> dict[str, Any]:
        """Counts over the whole store."""
        return self._request("GET", "/v1/stats").json()

    def health(self) -> dict[str, Any]:
        return self._request("GET", "/health").json()

    # ---- how -----------------------------------------------------------------------------------------------------

    def _run(self, job: Job, on_progress: Progress | None, limit: float | None = None) -> JobStatus:
        """The status of the job once it is done, or, still running, at the time `limit` (of the monotonic clock)."""
        if self._job_budget is not None and job.budget is None:
            job = job.model_copy(update={"budget": self._job_budget})
        body = job.model_dump_json().encode("utf-8", "surrogatepass")
        submissions, stalled_since, submitted, pause = 0, 0.0, 0.0, min(FIRST_LOOK, self._poll)
        status: JobStatus | None = None
        while True:
            if status is None:
                submissions += 1
                if submissions > 10:
                    raise LabelServiceError(
                        f"the labelling service at {self.url} lost the job 10 times; see its log. "
                        "Answers already given are in its store"
                    )
                status = JobStatus.model_validate(
                    self._request("POST", "/v1/jobs", limit=limit, content=body, headers=_JSON).json()
                )
                self.last_job, submitted = status.id, time.monotonic()
            if on_progress is not None:
                on_progress(status)
            if status.state == "done":
                self.last_job = status.id  # others may have asked while this one waited
                return status
            if status.state == "out_of_budget" and time.monotonic() > submitted + RAISED:
                raise LabelServiceError(
                    f"labelling job {status.id} is out of budget: {status.done} of {status.total} items are done and "
                    "kept. Raise the budget (`labeling.budget` or `labeling.job_budget` in the configuration, or `laif "
                    "label budget AMOUNT --store STORE`) and run the same command again: it goes on from there"
                )
            if status.state == "failed":
                raise LabelServiceError(f"labelling job {status.id} failed: {status.reason}")
            if status.stalled:
                stalled_since = stalled_since or time.monotonic()
                if time.monotonic() - stalled_since > self._patience:
                    raise LabelServiceError(f"labelling job {status.id} cannot go on: {status.stalled}")
            else:
                stalled_since = 0.0
            left = pause if limit is None else min(pause, limit - time.monotonic())
            if left <= 0:
                self.last_job = status.id
                return status
            self._sleep(left)
            pause = min(2 * pause, self._poll)
            status = self._look(status.id, limit)

    def _look(self, job_id: str, limit: float | None) -> JobStatus | None:
        """The job's status; None if it must be submitted again."""
        response = self._request("GET", f"/v1/jobs/{job_id}", limit=limit, accept=(404,))
        if response.status_code == 404:
            return None
        status = JobStatus.model_validate(response.json())
        if status.state == "interrupted":
            log.warning("job %s: %s; it goes on from the store", job_id, status.reason)
            return None
        return status

    def _lines(self, job_id: str, **query: str) -> list[str]:
        response = self._request("GET", f"/v1/jobs/{job_id}/results", params=query)
        return [line for line in response.content.decode("utf-8").split("\n") if line]

    def _request(
        self, method: str, path: str, *, limit: float | None = None, accept: tuple[int, ...] = (), **rest: Any
    ) -> httpx.Response:
        """One exchange with the service; an unreachable service is tried again for `patience` seconds, but not past the
        time `limit`, which leaves at least one second."""
        patience = self._patience
        if limit is not None:
            patience = min(patience, max(1.0, limit - time.monotonic()))
            rest["timeout"] = patience
        end, delay = time.monotonic() + patience, 0.05
        while True:
            try:
                response = self._http.request(method, path, **rest)
                if response.status_code != 429 or time.monotonic() > end:
                    break
                time.sleep(
                    min(float(response.headers.get("retry-after", 1)), max(0.0, end - time.monotonic()))
                )
            except httpx.TransportError as error:
                death = self._death()
                if death or time.monotonic() > end:
                    why = death or f"it does not answer for {patience:.0f} s ({error})"
                    raise LabelServiceError(
                        f"labelling service at {self.url}: {why}\nStart it again (`laif serve labels`) and run again: "
                        "answers already given are in its store and are not asked twice"
                    ) from error
                time.sleep(delay)
                delay = min(2 * delay, 1.0)
        if response.status_code == 401:
            raise LabelServiceError(
                f"labelling service at {self.url}: it asks for a token, and ours is missing or wrong. Set "
                "`labeling.token_env` to the environment variable that holds it"
            )
        if response.status_code >= 400 and response.status_code not in accept:
            raise LabelServiceError(
                f"labelling service at {self.url}: {method} {path} answered {response.status_code}: "
                f"{_detail(response)}"
            )
        return response


def _detail(response: httpx.Response) -> str:
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return response.text[:1000]
    return detail if isinstance(detail, str) else str(detail)[:1000]


def _endpoint(endpoint: EndpointSpec | Endpoint) -> Endpoint:
    return endpoint if isinstance(endpoint, Endpoint) else Endpoint.from_spec(endpoint)
