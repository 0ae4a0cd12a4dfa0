"""Judgements read back for a report on their quality: from a store, an export, or files of judgements. Nobody is asked.

A critic is a critic data file (by its hash) put to a model: two versions of a prompt are two critics.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from laif_jax.evaluation.quality import Critic, Pair
from laif_jax.labeling import schema
from laif_jax.labeling.pair_facts import pair_facts
from laif_jax.labeling.pair_files import LabelledPair
from laif_jax.labeling.probe import PROBE
from laif_jax.labeling.store import Store
from laif_jax.records import DataError, Judgement, read_rows
from laif_jax.records.io import PathLike

CHUNK = 2000
Round = dict[str, float | None]


@dataclass
class _Group:
    """What one critic gave."""

    name: str
    model: str = ""
    fingerprints: set[str] = field(default_factory=set)
    merged: dict[str, Judgement] = field(default_factory=dict)
    single: dict[str, dict[str, Judgement]] = field(default_factory=dict)
    probes: dict[str, Round] = field(default_factory=dict)
    probe_models: dict[str, set[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeRounds:
    """A critic's answers to a probe set, by round (the oldest first), and the models' fingerprints of each."""

    name: str
    model: str
    rounds: dict[str, Round]
    fingerprints: dict[str, list[str]]


class Judged:
    """Judgements, sorted by critic."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], _Group] = {}
        self.pairs: dict[str, Pair] = {}

    def add(
        self, judgement: Judgement, *, endpoint: str = "", model: str = "", kind: str = "judgement"
    ) -> None:
        """Adds a judgement, in one order or merged.

        Args:
          endpoint: tells endpoints apart; "" for files, where the fingerprint does. model: as it was asked for.
        """
        answered = judgement.provider_fingerprint
        identity = endpoint or answered.split("/")[0]
        group = self._groups.setdefault(
            (judgement.critic_hash or judgement.critic, identity), _Group(judgement.critic)
        )
        group.model = group.model or model or identity
        if answered:
            group.fingerprints.add(answered)
        if kind == PROBE:
            if judgement.order == "both":
                number = str(judgement.meta.get("round", ""))
                group.probes.setdefault(number, {})[judgement.comparison_id] = judgement.p_b
                group.probe_models.setdefault(number, set()).add(answered)
            return
        if (facts := judgement.meta.get("pair")) is not None:
            self.pairs[judgement.comparison_id] = _pair(facts)
        if judgement.order == "both":
            group.merged[judgement.comparison_id] = judgement
        else:
            group.single.setdefault(judgement.comparison_id, {})[judgement.order] = judgement

    def label(self, pairs: Sequence[LabelledPair]) -> int:
        """Adds people's labels, sources and generators to the comparisons whose prompt and texts are the same, in
        whatever order; how many comparisons that were. What an older store does not tell of them is filled in too."""
        by_id = {pair.comparison.id: pair for pair in pairs}
        by_text = {}
        for pair in pairs:
            facts = pair_facts(pair.comparison)
            by_text[facts["prompt"], *facts["texts"]] = pair
        items = {item for group in self._groups.values() for item in (*group.merged, *group.single)}
        found = 0
        for item in items:
            known = self.pairs.get(item)
            turned = False
            pair = by_id.get(item)
            if pair is None and known is not None and known.texts is not None:
                one, other = known.texts
                pair = by_text.get((known.prompt, one, other))
                if pair is None and (pair := by_text.get((known.prompt, other, one))) is not None:
                    turned = True
            if pair is None:
                continue
            found += 1
            self.pairs[item] = _labelled(known, pair, turned)
        return found

    def critics(self, *, only: str = "", own: Collection[str] = ()) -> list[Critic]:
        """The critics, those whose name or model holds `only`.

        Args:
          own: generators that are the critics' own model, beside one of the model's name.
        """
        found = [_critic(group, own) for group in self._groups.values() if group.merged or group.single]
        _tell_apart(found)
        return sorted(
            (critic for critic in found if only in critic.name or only in critic.model), key=lambda c: c.name
        )

    def probes(self, *, only: str = "") -> list[ProbeRounds]:
        """Answers to drift probes of the critics that have any."""
        return [
            ProbeRounds(
                group.name,
                group.model,
                dict(sorted(group.probes.items())),
                {name: sorted(filter(None, models)) for name, models in sorted(group.probe_models.items())},
            )
            for group in self._groups.values()
            if group.probes and (only in group.name or only in group.model)
        ]


def _pair(facts: Mapping[str, Any]) -> Pair:
    return Pair(
        prompt=facts["prompt"],
        texts=tuple(facts["texts"]),
        lengths=tuple(facts["chars"]),
        generators=tuple(facts["generators"]),
    )


def _labelled(known: Pair | None, pair: LabelledPair, turned: bool) -> Pair:
    base = _pair(pair_facts(pair.comparison))
    human = pair.human
    if turned:
        human = tuple({1: 2, 2: 1}.get(label, 0) for label in human)
        assert base.texts is not None
        assert base.lengths is not None
        assert base.generators is not None
        base = replace(
            base, texts=base.texts[::-1], lengths=base.lengths[::-1], generators=base.generators[::-1]
        )
    if known is not None and base.generators is not None and not set(base.generators) - {"a", "b"}:
        base = replace(base, generators=known.generators)  # the file does not name them
    return replace(base, human=human, source=pair.source)


def _critic(group: _Group, own: Collection[str]) -> Critic:
    answered = {name.rsplit("/", 1)[0] for name in group.fingerprints} | group.fingerprints
    critic = Critic(group.name, model=group.model, own={*own, *filter(None, (group.model, *answered))})
    for item, orders in group.single.items():
        for order, judgement in sorted(orders.items()):
            _add_order(critic, item, order, judgement)
        if item not in group.merged:
            _add_final(critic, item, next(iter(orders.values())))
    for item, judgement in group.merged.items():
        _add_final(critic, item, judgement)
        for order in ("ab", "ba"):  # a file may hold the merged ones alone
            if (p := judgement.meta.get(f"p_{order}")) is not None:
                critic.single[item].setdefault(order, p)
    return critic


def _add_final(critic: Critic, item: str, judgement: Judgement) -> None:
    critic.final[item] = judgement.p_b
    critic.states[judgement.status.value] += 1
    critic.cost += judgement.cost or 0.0
    if "outside" in judgement.meta:
        critic.outside[item] = judgement.meta["outside"]


def _add_order(critic: Critic, item: str, order: str, judgement: Judgement) -> None:
    if judgement.p_b is None or judgement.reason.startswith("identical outputs"):
        return
    critic.single[item][order] = judgement.p_b
    several = [p for p in judgement.meta.get("samples", ()) if p is not None]
    if len(several) > 1:
        critic.samples[item][order] = several


def _tell_apart(critics: Sequence[Critic]) -> None:
    """Names critics by their data file, and by their model where two have the same, and by a number at last."""
    for field_of in (lambda c: c.model, lambda c: ""):
        counts = Counter(critic.name for critic in critics)
        seen: Counter[str] = Counter()
        for critic in critics:
            if counts[critic.name] > 1:
                seen[critic.name] += 1
                more = field_of(critic) or f"#{seen[critic.name]}"
                critic.name = f"{critic.name}, {more}"


# ---- reading -----------------------------------------------------------------------------------------------------


def read_store(
    store: Store,
    judged: Judged | None = None,
    *,
    kinds: Sequence[str] = ("judgement", PROBE),
    critics: Sequence[str] = (),
) -> Judged:
    """Adds the judgements of a store: of some `kinds`, and of the `critics` with these hashes, or of all."""
    judged = judged or Judged()
    c, jobs = schema.results.c, schema.jobs.c
    with store.engine.connect() as connection:
        models = {
            key: name.split(" at ")[0]
            for key, name in connection.execute(sa.select(jobs.endpoint_key, jobs.endpoint))
        }
        query = sa.select(c.kind, c.endpoint_key, c.record).where(c.kind.in_(kinds))
        if critics:
            query = query.where(c.critic_hash.in_(critics))
        rows = connection.execution_options(yield_per=CHUNK).execute(query.order_by(c.id))
        for kind, endpoint, record in rows:
            judgement = Judgement.model_validate_json(record)
            judged.add(judgement, endpoint=endpoint, model=models.get(endpoint, ""), kind=kind)
    return judged


def read_files(paths: Iterable[PathLike], judged: Judged | None = None) -> Judged:
    """Adds the judgements of files: exports of stores, or rows that are judgements.

    Raises:
      DataError: a file cannot be read, or holds no judgement.
    """
    judged = judged or Judged()
    for path in paths:
        if not _read_file(path, judged):
            raise DataError(
                f"{path}: holds no judgement. Give an export (`laif label export`), or a file of judgements such as a "
                "study's judgements.jsonl.gz"
            )
    return judged


def _read_file(path: PathLike, judged: Judged) -> int:
    count, models = 0, {}
    for kind, endpoint, judgement in _judgements(path, models):
        judged.add(judgement, endpoint=endpoint, model=models.get(endpoint, ""), kind=kind)
        count += 1
    return count


def _judgements(path: PathLike, models: dict[str, str]) -> Iterator[tuple[str, str, Judgement]]:
    exported: list[Mapping[str, Any]] = []  # jobs, which name the models, come after results
    for number, row in enumerate(read_rows(path), 1):
        try:
            if "table" not in row:
                yield "judgement", "", Judgement.from_row(row)
            elif row["table"] == "results" and row["kind"] in ("judgement", PROBE):
                exported.append(row)
            elif row["table"] == "jobs":
                models[row["endpoint_key"]] = row["endpoint"].split(" at ")[0]
        except (ValidationError, KeyError) as error:
            raise DataError(f"{path}, row {number}: no judgement: {error}") from error
    for row in exported:
        yield row["kind"], row["endpoint_key"], Judgement.model_validate_json(row["record"])
