"""Labels for a file of pairs, from a configuration: asking one critic or two tiers, and writing what came."""

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from laif_jax.config import EndpointSpec
from laif_jax.config.endpoints import LabelingSpec
from laif_jax.config.label import LabelConfig
from laif_jax.labeling.access import read_token
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.client import LabelClient, Progress
from laif_jax.labeling.critic import Critic, load_critic
from laif_jax.labeling.database import is_address, shown
from laif_jax.labeling.errors import LabelServiceError
from laif_jax.labeling.local_servers import running
from laif_jax.labeling.pair_files import LabelledPair, read_pairs
from laif_jax.labeling.panel import Voice, ask_panel
from laif_jax.labeling.prices import paid
from laif_jax.labeling.probe import ask_probe
from laif_jax.labeling.service import start_service
from laif_jax.records import Comparison, Judgement, write_jsonl

Role = tuple[str, str]  # "critic" or "probe", and who: the same names as the plan's rows


@dataclass(frozen=True)
class Tier:
    """A critic of a run. `key`: the endpoint's section of the configuration."""

    name: str
    key: str
    spec: EndpointSpec
    critic: Critic
    order: str


def tiers_of(config: LabelConfig) -> list[Tier]:
    """The critic of a configuration, and the strong one behind it where there is one.

    Raises:
      CriticError: there is no such critic, or it does not compare.
    """
    first = load_critic(config.critic)
    tiers = [Tier(first.name, "endpoint", config.endpoint, first, config.order)]
    if config.strong is not None:
        strong = load_critic(config.strong.critic)
        name = f"{first.name} > {strong.name}"
        tiers.append(Tier(name, "strong.endpoint", config.strong.endpoint, strong, config.strong.order))
    for tier in tiers:
        if not tier.critic.judges:
            tier.critic.require("comparison")
    return tiers


@dataclass(frozen=True)
class Said:
    """What one tier said: of all pairs, or of those that the first one was not sure of."""

    tier: Tier
    endpoint: Endpoint
    voice: Voice


@dataclass(frozen=True)
class LabelledFile:
    """What a run gave.

    Attributes:
      path: of the labels. pairs, judgements: one label per pair, in order. said: by tier.
      tiers: what a strong critic behind the first one saved (`panel.tier_summary`); None without one.
      counts: pairs by status. agreement: share of the pairs with a label on both sides, ties of either left out, that
        agree; None without such pairs. agreed_on: how many those are. calls: made now. cached: answered from the store.
    """

    path: str
    pairs: list[LabelledPair]
    judgements: list[Judgement]
    said: list[Said]
    tiers: dict[str, Any] | None
    agreement: float | None
    agreed_on: int
    calls: int
    cached: int

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(str(judgement.status.value) for judgement in self.judgements))


def label_pairs(
    config: LabelConfig,
    on_start: Callable[[str], None] | None = None,
    on_progress: Progress | None = None,
    jobs: dict[Role, str] | None = None,
) -> LabelledFile:
    """Labels the pairs and writes the file `config.labels`. What is stored already is not asked again.

    Args:
      on_start: gets the address of the service, whose dashboard can be looked at meanwhile.
      jobs: gets the job of each role, also where the run ends with an error.

    Raises:
      DataError: see `read_pairs`. CriticError, EndpointError: the critic or the endpoint cannot be used.
      LabelServiceError: the service failed or is out of budget; answers already given are kept.
    """
    pairs, tiers = read_pairs(config.pairs), tiers_of(config)
    with client_of(config.labeling, config.budget) as client:
        if on_start is not None:
            on_start(client.url)
        run = _Run(client, config, tiers, on_progress, {} if jobs is None else jobs)
        below = config.strong.below if config.strong else None
        panel = ask_panel(run.ask, 1, [pair.comparison for pair in pairs], below=below)
    write_jsonl(config.labels, _labelled(pairs, panel.final, run.said))
    agreement, count = _agreement(pairs, panel.final)
    return LabelledFile(
        path=config.labels,
        pairs=pairs,
        judgements=panel.final,
        said=run.said,
        tiers=panel.summary.get("tiers"),
        agreement=agreement,
        agreed_on=count,
        calls=run.calls,
        cached=run.cached,
    )


class _Run:
    """Asks the tiers, and notes what each of them was asked."""

    def __init__(
        self,
        client: LabelClient,
        config: LabelConfig,
        tiers: Sequence[Tier],
        on_progress: Progress | None,
        jobs: dict[Role, str],
    ) -> None:
        self._client, self._config, self._tiers = client, config, tiers
        self._on_progress, self._jobs = on_progress, jobs
        self.said: list[Said] = []
        self.calls = self.cached = 0

    def ask(self, number: int, comparisons: Sequence[Comparison]) -> Voice:
        """The judgements of one tier, and of its drift probe where one is asked for."""
        client, tier = self._client, self._tiers[number]
        with running(tier.spec) as endpoint:
            with self._noting("critic", tier):
                final = client.judge(
                    endpoint,
                    tier.critic,
                    comparisons,
                    order=tier.order,  # ty: ignore[invalid-argument-type]
                    seed=self._config.seed,
                    on_progress=self._on_progress,
                )
            status = client.status(client.last_job)
            self.calls, self.cached = self.calls + status.calls, self.cached + status.cached
            single = client.judgements()
            if self._config.labeling.probe is not None and tier.critic.kind == "comparison":
                with self._noting("probe", tier):
                    ask_probe(client, endpoint, tier.critic, self._config.labeling.probe)
        voice = Voice(_priced(final, endpoint), single)
        self.said.append(Said(tier, endpoint, voice))
        return voice

    @contextlib.contextmanager
    def _noting(self, role: str, tier: Tier) -> Generator[None]:
        before = self._client.last_job
        try:
            yield
        finally:
            if self._client.last_job != before:
                self._jobs[role, tier.name] = self._client.last_job


def _priced(judgements: Sequence[Judgement], endpoint: Endpoint) -> list[Judgement]:
    return [
        j.model_copy(update={"cost": paid(endpoint, j.usage, calls=j.meta.get("calls") or 1)})
        for j in judgements
    ]


@contextlib.contextmanager
def client_of(spec: LabelingSpec, budget: str | None = None) -> Generator[LabelClient]:
    """A client of the service at `spec.url`, or of one that runs as long as the block."""
    if spec.url is None:
        store = spec.store or "labels"
        if is_address(store):
            raise LabelServiceError(
                f"labeling.store: a run starts a service over a folder alone. Start one over {shown(store)} (`laif "
                "serve labels --store ADDRESS`), and give the service's address in `labeling.url`"
            )
        with (
            start_service(store, budget=budget or spec.budget) as service,
            service.client(spec.poll, spec.job_budget) as client,
        ):
            yield client
        return
    token = read_token(spec.token_env)
    if spec.token_env is not None and token is None:
        raise LabelServiceError(f"labeling.token_env: the environment variable {spec.token_env} is not set")
    with LabelClient(spec.url, poll=spec.poll, token=token, job_budget=spec.job_budget) as client:
        yield client


def _labelled(
    pairs: Sequence[LabelledPair], judgements: Sequence[Judgement], said: Sequence[Said]
) -> Iterator[dict[str, Any]]:
    tiered = any("tier" in judgement.meta for judgement in judgements)
    for pair, judgement in zip(pairs, judgements, strict=True):
        tier = judgement.meta.get("tier", 1)
        yield {
            **pair.row,
            "p_b": judgement.p_b,
            "status": judgement.status.value,
            "reason": judgement.reason,
            "order": judgement.order,
            "critic": judgement.critic,
            "critic_hash": judgement.critic_hash,
            "model": said[tier - 1].endpoint.model,
            **({"tier": tier} if tiered else {}),
            "comparison_id": judgement.comparison_id,
        }


def _agreement(pairs: Sequence[LabelledPair], judgements: Sequence[Judgement]) -> tuple[float | None, int]:
    """(share of the pairs with a label on both sides, ties left out, that agree; how many those are)."""
    agreed = [
        (pair.p_b > 0.5) == (judgement.p_b > 0.5)
        for pair, judgement in zip(pairs, judgements, strict=True)
        if pair.p_b is not None and judgement.p_b is not None and 0.5 not in (pair.p_b, judgement.p_b)
    ]
    return (sum(agreed) / len(agreed) if agreed else None), len(agreed)
