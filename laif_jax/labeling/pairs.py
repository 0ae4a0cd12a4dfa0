"""Labels for a file of pairs, from a configuration: what is asked, asking it, and writing what came."""

import contextlib
import math
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from laif_jax.config.endpoints import LabelingSpec
from laif_jax.config.label import LabelConfig
from laif_jax.config.schema import SymbolsSpec
from laif_jax.labeling.access import read_token
from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.client import LabelClient, Progress
from laif_jax.labeling.critic import load_critic
from laif_jax.labeling.database import is_address
from laif_jax.labeling.errors import LabelServiceError
from laif_jax.labeling.jobs import JudgeJob
from laif_jax.labeling.local_servers import running
from laif_jax.labeling.pair_files import LabelledPair, read_pairs
from laif_jax.labeling.prices import cost, price_of
from laif_jax.labeling.probe import ask_probe
from laif_jax.labeling.service import start_service
from laif_jax.labeling.store import Store
from laif_jax.records import DataError, Judgement, Usage, write_jsonl
from laif_jax.worlds import symbols


@dataclass(frozen=True)
class LabelledFile:
    """What a run gave.

    Attributes:
      counts: pairs by status. agreement: share of the pairs with a label on both sides, ties of either left out, that
        agree; None without such pairs. agreed_on: how many those are. calls: made now. cached: answered from the store.
    """

    path: str
    counts: dict[str, int]
    agreement: float | None
    agreed_on: int
    calls: int
    cached: int


def label_pairs(
    config: LabelConfig, on_start: Callable[[str], None] | None = None, on_progress: Progress | None = None
) -> LabelledFile:
    """Labels the pairs and writes the file `config.labels`. What is stored already is not asked again.

    Args:
      on_start: gets the address of the service, whose dashboard can be looked at meanwhile.

    Raises:
      DataError: see `read_pairs`. CriticError, EndpointError: the critic or the endpoint cannot be used.
      LabelServiceError: the service failed or is out of budget; answers already given are kept.
    """
    pairs = read_pairs(config.pairs)
    comparisons = [pair.comparison for pair in pairs]
    critic = load_critic(config.critic)
    with client_of(config.labeling, config.budget) as client, running(config.endpoint) as endpoint:
        if on_start is not None:
            on_start(client.url)
        judgements = client.judge(
            endpoint, critic, comparisons, order=config.order, seed=config.seed, on_progress=on_progress
        )
        status = client.status(client.last_job)
        ask_probe(client, endpoint, critic, config.labeling.probe)
    write_jsonl(config.labels, _labelled(pairs, judgements, endpoint))
    agreement, count = _agreement(pairs, judgements)
    return LabelledFile(
        path=config.labels,
        counts=dict(Counter(str(judgement.status.value) for judgement in judgements)),
        agreement=agreement,
        agreed_on=count,
        calls=status.calls,
        cached=status.cached,
    )


@contextlib.contextmanager
def client_of(spec: LabelingSpec, budget: str | None = None) -> Generator[LabelClient]:
    """A client of the service at `spec.url`, or of one that runs as long as the block."""
    if spec.url is None:
        with (
            start_service(spec.store or "labels", budget=budget or spec.budget) as service,
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
    pairs: Sequence[LabelledPair], judgements: Sequence[Judgement], endpoint: Endpoint
) -> Iterator[dict[str, Any]]:
    for pair, judgement in zip(pairs, judgements, strict=True):
        yield {
            **pair.row,
            "p_b": judgement.p_b,
            "status": judgement.status.value,
            "reason": judgement.reason,
            "order": judgement.order,
            "critic": judgement.critic,
            "critic_hash": judgement.critic_hash,
            "model": endpoint.model,
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


# ---- an example --------------------------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parent / "example.yaml"


def write_example(folder: str | Path, count: int = 100, seed: int = 0) -> list[Path]:
    """Writes `pairs.jsonl`, answers of a better and a worse simulated model to made-up tasks, and `label.yaml`.

    Each pair has `truth`, the probability that b is better, which is known because the tasks can be solved by program.

    Raises:
      DataError: one of the files is there already.
    """
    folder = Path(folder)
    files = [folder / "pairs.jsonl", folder / "label.yaml"]
    if there := [str(file) for file in files if file.exists()]:
        raise DataError(f"{', '.join(there)}: there already. Choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(seed), []
    skills = (0.9, 0.3)
    for prompt in symbols.make_prompts(SymbolsSpec(max_length=8), 20 * count, seed):
        better, worse = (symbols.teacher_answer(prompt.instruction, skill, rng) for skill in skills)
        qualities = [symbols.quality(prompt.instruction, text) for text in (better, worse)]
        if qualities[0] == qualities[1]:
            continue
        texts = list(zip((better, worse), qualities, skills, strict=True))
        rng.shuffle(texts)
        row: dict[str, Any] = {"prompt": prompt.instruction}
        for side, (text, _, skill) in zip("ab", texts, strict=True):
            row |= {side: text, f"generator_{side}": f"skill-{skill}"}
        rows.append({**row, "truth": float(texts[1][1] > texts[0][1])})
        if len(rows) == count:
            break
    if len(rows) < count:
        raise DataError(f"the example's world has {len(rows)} pairs with these settings; ask for fewer")
    write_jsonl(files[0], rows)
    files[1].write_text(EXAMPLE.read_text("utf-8"), "utf-8")
    return files


# ---- a plan ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairsPlan:
    """What a run will ask. `stored`: calls whose answer is in the store already; the other numbers leave them out.
    `nanos`: nano-dollars; None: the model's price is not known. `notes`: how it was estimated, and warnings."""

    pairs: int
    calls: int
    stored: int
    prompt_tokens: int
    completion_tokens: int
    nanos: int | None
    seconds: float
    notes: list[str]


BYTES_PER_TOKEN = 4
SECONDS_FIRST, TOKENS_PER_SECOND = 0.5, 50.0  # of a model whose latency is not known


def plan_pairs(config: LabelConfig) -> PairsPlan:
    """Counts a run's calls one by one, and estimates their tokens, dollars and time from above. Sends nothing.

    Raises:
      DataError, CriticError, EndpointError: as `label_pairs`.
    """
    spec, today = config.endpoint, datetime.now(UTC).date()
    comparisons = [pair.comparison for pair in read_pairs(config.pairs, labels=False)]
    local = spec.provider in ("llama_cpp", "checkpoint")
    endpoint = Endpoint.from_spec(spec, base_url="http://127.0.0.1/v1" if local else None)
    critic = load_critic(config.critic)
    critic.require("comparison")
    job = JudgeJob(
        endpoint=endpoint, critic=critic, comparisons=tuple(comparisons), order=config.order, seed=config.seed
    )
    work = job.work()
    calls = {call.key: call for position in range(len(work)) for call in work.calls(position)}
    stored = _stored(config.labeling, list(calls))
    left = [call for key, call in calls.items() if key not in stored]
    stages = getattr(work, "stages", 1)
    prompt_tokens = stages * sum(_tokens(call) for call in left)
    completion_tokens = stages * sum(call.max_tokens or 0 for call in left)
    price = price_of(spec, today)
    used = Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    latency = SECONDS_FIRST + completion_tokens / max(stages * len(left), 1) / TOKENS_PER_SECOND
    if spec.simulated is not None:
        latency = spec.simulated.latency
    notes = [
        f"tokens are estimated: {BYTES_PER_TOKEN} bytes each, answers at their longest",
        "time: from `concurrency`; a hosted model's latency is assumed, its rate limits are not known",
    ]
    if stages > 1:
        notes.append("the critic thinks first: both its calls are taken as long as the first")
    if local:
        notes.append("a local model's stored answers are not known before it is started")
    if price is None:
        notes.append(
            "the price is not known: give `prompt_price` and `completion_price`, or no budget can be held"
        )
    elif warning := price.warning(today):
        notes.append(warning)
    return PairsPlan(
        pairs=len(comparisons),
        calls=stages * len(left),
        stored=len(calls) - len(left),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        nanos=None if price is None else cost(price, used, batch=spec.batch),
        seconds=stages * len(left) * latency / spec.concurrency,
        notes=notes,
    )


def _tokens(call: Call) -> int:
    texts = [message["content"].encode("utf-8", "replace") for message in call.messages]
    return sum(4 + math.ceil(len(text) / BYTES_PER_TOKEN) for text in texts)


def _stored(spec: LabelingSpec, keys: list[str]) -> set[str]:
    """Which of these calls are answered in the store that a run would use, if it is on this machine."""
    where = spec.store or "labels"
    if spec.url is not None or not (is_address(where) or (Path(where) / "labels.sqlite").is_file()):
        return set()
    store = Store(where, shared=True)
    try:
        return set(store.answered(keys))
    finally:
        store.close()
