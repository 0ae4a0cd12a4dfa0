"""Jobs as they are submitted: a list of items put to one endpoint; and where a job stands. `runner` runs them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

from laif_jax.config.endpoints import TOKENS_MOST
from laif_jax.labeling.budget import parse_money
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.complete import CompleteWork
from laif_jax.labeling.critic import Critic, load_critic, shipped_critics
from laif_jax.labeling.errors import CriticError
from laif_jax.labeling.judge import JudgeWork
from laif_jax.labeling.judge_lists import ListJudgeWork
from laif_jax.labeling.rate import RateWork
from laif_jax.labeling.revise import Reviser, ReviseWork
from laif_jax.labeling.store import Row
from laif_jax.labeling.work import Work
from laif_jax.records import Comparison, Completion, Prompt


class _JobModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _PaidJob(_JobModel):
    """`budget`: what the job may cost, over all its runs, as in "2.50USD"; None: only the service's budget counts."""

    endpoint: Endpoint
    budget: str | None = None

    @field_validator("budget")
    @classmethod
    def _amount(cls, budget: str | None) -> str | None:
        if budget is not None:
            parse_money(budget)
        return budget

    @property
    def cap(self) -> int | None:
        """The budget in nano-dollars."""
        return None if self.budget is None else parse_money(self.budget)


class CompleteJob(_PaidJob):
    """Completions of prompts. `generator`: the name that the completions carry."""

    kind: Literal["complete"] = "complete"
    prompts: tuple[Prompt, ...]
    generator: str
    system: str | None = None
    temperature: float = Field(default=1.0, ge=0)
    max_tokens: int = Field(default=512, gt=0, le=TOKENS_MOST)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int = Field(default=1, gt=0, le=10_000)
    seed: int | None = None

    def work(self) -> Work:
        params: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.top_p is not None:
            params["top_p"] = self.top_p
        return CompleteWork(
            self.endpoint,
            self.prompts,
            generator=self.generator,
            system=self.system,
            params=params,
            n=self.n,
            seed=self.seed,
        )


class JudgeJob(_PaidJob):
    """Judgements of comparisons. `critic`: the name of a shipped critic, or a critic in full. `probe`: the round of a
    drift probe: both orders are asked anew in each, and kept apart from the labels."""

    kind: Literal["judge"] = "judge"
    critic: str | Critic
    comparisons: tuple[Comparison, ...]
    order: Literal["both", "seeded"] = "both"
    seed: int = 0
    probe: str = Field(default="", max_length=64)

    def work(self) -> Work:
        critic = _critic(self.critic)
        if self.probe:
            from laif_jax.labeling.probe import ProbeWork  # reads files of pairs, and so needs numpy

            critic.require("comparison")
            return ProbeWork(self.endpoint, critic, self.comparisons, self.probe)
        if critic.kind == "listwise":
            return ListJudgeWork(self.endpoint, critic, self.comparisons, self.order, self.seed)
        critic.require("comparison")
        return JudgeWork(self.endpoint, critic, self.comparisons, self.order, self.seed)


class RateItem(_JobModel):
    """A completion and the prompt that it answers."""

    prompt: Prompt
    completion: Completion

    @model_validator(mode="after")
    def _check(self) -> "RateItem":
        if self.completion.prompt_id != self.prompt.id:
            raise ValueError(
                f"the completion answers prompt {self.completion.prompt_id}, not {self.prompt.id}"
            )
        return self


class RateJob(_PaidJob):
    """Ratings of single completions. `critic`: the name of a shipped critic that rates, or one in full."""

    kind: Literal["rate"] = "rate"
    critic: str | Critic
    items: tuple[RateItem, ...]

    def work(self) -> Work:
        critic = _critic(self.critic)
        critic.require("rating")
        return RateWork(self.endpoint, critic, [(item.prompt, item.completion) for item in self.items])


class ReviseJob(_PaidJob):
    """Critique and revision of completions, `steps` times over. `generator`: the name that the revisions carry."""

    kind: Literal["revise"] = "revise"
    reviser: Reviser
    items: tuple[RateItem, ...]
    steps: int = Field(default=4, gt=0, le=64)
    seed: int = 0
    generator: str

    def work(self) -> Work:
        items = [(item.prompt, item.completion) for item in self.items]
        return ReviseWork(
            self.endpoint,
            self.reviser,
            items,
            steps=self.steps,
            seed=self.seed,
            generator=self.generator,
        )


def _critic(critic: str | Critic) -> Critic:
    if isinstance(critic, Critic):
        return critic
    if critic not in shipped_critics():  # a path would be one of the service's machine
        raise CriticError(
            f"critic {critic!r} is none of {', '.join(shipped_critics())}; send another one in full"
        )
    return load_critic(critic)


Job = CompleteJob | JudgeJob | RateJob | ReviseJob
JobRequest = Annotated[Job, Field(discriminator="kind")]
job_request: TypeAdapter[Job] = TypeAdapter(JobRequest)


class JobStatus(BaseModel):
    """Where a job stands.

    Attributes:
      state: "running", "out_of_budget" (nothing is lost: it goes on when the budget is raised), "done", "failed" (see
        `reason`) or "interrupted" (the service ended, or the client stopped it: `reason` says which; submit it again
        for the rest).
      done: items whose result is stored. counts: results by status. calls: calls answered or failed in this run.
      cached: calls whose answer was in the store.
      stalled: why nothing can be stored at present (a full disk), "" if all is well.
    """

    id: str
    kind: str
    endpoint: str
    critic: str = ""
    state: Literal["running", "out_of_budget", "done", "failed", "interrupted"]
    reason: str = ""
    total: int
    done: int = 0
    counts: dict[str, int] = Field(default_factory=dict)
    calls: int = 0
    cached: int = 0
    stalled: str = ""
    created: str = ""
    updated: str = ""

    @classmethod
    def from_row(cls, row: Row) -> "JobStatus":
        counts = dict(row["counts"])
        progress = {name: counts.pop(name, 0) for name in ("done", "calls", "cached")}
        fields = {name: row[name] for name in row if name in cls.model_fields and name != "counts"}
        return cls(**fields, counts=counts, **progress)
