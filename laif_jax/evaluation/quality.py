"""How good a critic's labels are: agreement, biases, consistency, calibration, each with a 95% interval over prompts.

Everything is computed from verdicts that are there already; nobody is asked. Beside what a critic does stands what the
longer text, or a coin, would do on the same rows.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from laif_jax.evaluation import reliability, verdict_model
from laif_jax.evaluation.agreement import human_label, label_from_p
from laif_jax.evaluation.calibration import calibration
from laif_jax.evaluation.consistency import repeats, transitivity
from laif_jax.evaluation.resample import SAMPLES, Floats, mean, plain, share

Orders = Mapping[str, float]


@dataclass(frozen=True)
class Pair:
    """What is known of a comparison; None where it is not.

    Attributes:
      prompt: what rows are clustered by. texts: names of the two texts, equal for equal texts.
      lengths: in characters. generators: who wrote them. human: people's labels, 1 = a, 2 = b, 0 = tie.
      source: where the pair comes from.
    """

    prompt: str
    texts: tuple[str, str] | None = None
    lengths: tuple[int, int] | None = None
    generators: tuple[str, str] | None = None
    human: tuple[int, ...] = ()
    source: str = ""


@dataclass
class Critic:
    """The verdicts of one critic (a prompt put to a model), by comparison.

    Attributes:
      final: the probability that b is better; None: asked, without a label. single: the same per order, "ab" (a shown
        first) and "ba". samples: per order, those of several samples. outside: probability outside the options.
      states: how many comparisons ended how. own: generators that are this critic's own model.
    """

    name: str
    model: str = ""
    final: dict[str, float | None] = field(default_factory=dict)
    single: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    samples: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(dict))
    outside: dict[str, float] = field(default_factory=dict)
    states: Counter[str] = field(default_factory=Counter)
    own: Collection[str] = ()
    cost: float = 0.0


class _Rows:
    """One critic's comparisons as arrays. Labels: 0 tie, 1 a, 2 b, -1 none."""

    def __init__(self, critic: Critic, pairs: Mapping[str, Pair], samples: int, seed: int) -> None:
        self.ids = list(critic.final)
        self.pairs = [pairs.get(name, Pair(prompt=name)) for name in self.ids]
        self.prompts = [pair.prompt for pair in self.pairs]
        self.p = np.array([np.nan if p is None else p for p in critic.final.values()], dtype=np.float64)
        self.label = labels_of(self.p)
        self.human = np.array([human_label(x.human) if x.human else -1 for x in self.pairs], dtype=np.int64)
        lengths = [(np.nan, np.nan) if x.lengths is None else x.lengths for x in self.pairs]
        self.lengths = np.array(lengths, dtype=np.float64).reshape(-1, 2)
        self.longer = longer_label(self.lengths)
        self.options: dict[str, int] = {"samples": samples, "seed": seed}

    def take(self, keep: Any) -> list[str]:
        """Prompts of the rows that `keep` [N] holds for."""
        return [name for name, here in zip(self.prompts, keep, strict=True) if here]

    def share(self, values: Floats, keep: Any) -> dict[str, Any]:
        return share(values[keep], self.take(keep), **self.options).to_dict()


def labels_of(p: Floats) -> np.ndarray:
    """Labels [N] of probabilities [N]: 0 tie, 1 a, 2 b, -1 none (NaN)."""
    labels = [label_from_p(None if np.isnan(x) else float(x)) for x in p]
    return np.array([-1 if label is None else label for label in labels], dtype=np.int64)


def longer_label(lengths: Floats) -> np.ndarray:
    """The label of "the longer text wins" for lengths [N, 2]; -1 where one is not known."""
    difference = lengths[:, 1] - lengths[:, 0]
    label = np.where(difference > 0, 2, np.where(difference < 0, 1, 0))
    return np.where(np.isnan(difference), -1, label)


def hits_of(label: np.ndarray, truth: np.ndarray) -> Floats:
    """1 where the label is the truth, 1/2 where it is a tie, NaN where there is no label or the truth is no side."""
    hits = np.where(label == 0, 0.5, (label == truth).astype(np.float64))
    return np.where((label >= 0) & (truth > 0), hits, np.nan)


def critic_quality(
    critic: Critic, pairs: Mapping[str, Pair], *, samples: int = SAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Everything of one critic as plain JSON, None for what the verdicts do not tell (docs/reference/labeling.md)."""
    rows = _Rows(critic, pairs, samples, seed)
    known = rows.label >= 0
    fitted, fitted_merit = _models(critic, rows, pairs)
    return {
        "critic": critic.name,
        "model": critic.model,
        "n": len(rows.ids),
        "prompts": len(set(rows.prompts)),
        "states": dict(sorted(critic.states.items())),
        "cost": critic.cost or None,
        "coverage": share(known.astype(np.float64), rows.prompts, **rows.options).to_dict(),
        "ties": rows.share((rows.label == 0).astype(np.float64), known),
        "people": _people(rows),
        "swap": _swap(critic, rows),
        "position": _position(critic, rows) | {"logit": fitted.position.to_dict(), "method": fitted.method},
        "length": _length(rows)
        | {
            "slope": fitted.length.to_dict(),
            "slope_beyond_people": fitted_merit.length.to_dict(),
            "method": fitted.method,
        },
        "own": _own(critic, rows),
        "repeats": repeats(
            critic.samples, {i: x.prompt for i, x in zip(rows.ids, rows.pairs)}, **rows.options
        ),
        "calibration": calibration(rows.p, rows.human, rows.prompts, samples=samples, seed=seed),
        "transitivity": transitivity(rows.p, rows.pairs, **rows.options),
        "outside": _outside(critic, rows, pairs),
    }


def _people(rows: _Rows) -> dict[str, Any] | None:
    """Agreement with people on rows with a verdict and people's labels, by `agreement_rows`; and per source."""
    keep = (rows.label >= 0) & (rows.human >= 0)
    if not keep.any():
        return None
    found = _people_rows(rows, keep)
    sources = [pair.source for pair in rows.pairs]
    names = dict.fromkeys(name for name, here in zip(sources, keep, strict=True) if here)
    if len(names) > 1:
        found["by_source"] = {
            name: _people_rows(rows, keep & np.array([source == name for source in sources]))
            for name in names
        }
    return found


def _people_rows(rows: _Rows, keep: np.ndarray) -> dict[str, Any]:
    truth, prompts = rows.human, rows.take(keep)
    decided = keep & (truth > 0)
    hits, longest = hits_of(rows.label, truth), hits_of(rows.longer, truth)
    both = decided & ~np.isnan(longest)
    table = reliability.one_hot(rows.label, 3) + reliability.one_hot(truth, 3)
    count = int(decided.sum())
    reach = 1.96 * 0.5 / count**0.5 if count else float("nan")
    found: dict[str, Any] = {
        "n": int(keep.sum()),
        "decided": count,
        "accuracy": rows.share(hits, decided),
        "alpha": reliability.alpha(table[keep], prompts, **rows.options).to_dict(),
        "longest_wins": {"accuracy": rows.share(longest, decided)},
        "gain_over_longest": mean((hits - longest)[both], rows.take(both), **rows.options).to_dict(),
        "random": {"accuracy": 0.5, "kappa": 0.0, "range": [plain(0.5 - reach), plain(0.5 + reach)]},
    }
    pairs = {"": rows.label, "longest_wins": rows.longer}
    for name, label in pairs.items():
        two = reliability.pairwise(label[keep], truth[keep], prompts, **rows.options)
        target = found[name] if name else found
        target |= {key: value.to_dict() for key, value in two.items()}
    return found


def _single(critic: Critic, rows: _Rows) -> tuple[np.ndarray, Floats, Floats]:
    """(row, p that b is better, 1 where a was shown first else -1) of each verdict in one order."""
    found = [
        (row, p, 1.0 if order == "ab" else -1.0)
        for row, name in enumerate(rows.ids)
        for order, p in sorted(critic.single.get(name, {}).items())
    ]
    table = np.array(found, dtype=np.float64).reshape(-1, 3)
    return table[:, 0].astype(np.int64), table[:, 1], table[:, 2]


def _swap(critic: Critic, rows: _Rows) -> dict[str, Any] | None:
    """Of comparisons judged in both orders: how often both name the same side."""
    both = [critic.single[name] if len(critic.single.get(name, {})) == 2 else None for name in rows.ids]
    keep = np.array([orders is not None for orders in both], dtype=bool)
    if not keep.any():
        return None
    ab, ba = (np.array([np.nan if o is None else o[order] for o in both]) for order in ("ab", "ba"))
    same = (np.sign(ab - 0.5) == np.sign(ba - 0.5)).astype(np.float64)
    shown_first = ((ab < 0.5) & (ba > 0.5)).astype(np.float64)
    shown_second = ((ab > 0.5) & (ba < 0.5)).astype(np.float64)
    return {
        "n": int(keep.sum()),
        "consistency": rows.share(same, keep),
        "always_first": rows.share(shown_first, keep),
        "always_second": rows.share(shown_second, keep),
        "difference": mean(np.abs(ab - ba)[keep], rows.take(keep), **rows.options).to_dict(),
        "random": {"consistency": 0.5},
        "longest_wins": {"consistency": 1.0},
    }


def _position(critic: Critic, rows: _Rows) -> dict[str, Any]:
    """How often the response shown first wins, of verdicts in one order that name a side."""
    row, p, first = _single(critic, rows)
    decided = p != 0.5
    wins = ((p < 0.5) == (first > 0)).astype(np.float64)
    prompts = [rows.prompts[i] for i in row[decided]]
    return {
        "first_wins": share(wins[decided], prompts, **rows.options).to_dict(),
        "random": {"first_wins": 0.5, "logit": 0.0},
        "longest_wins": _longest_first(rows, row, first),
    }


def _longest_first(rows: _Rows, row: np.ndarray, first: Floats) -> dict[str, Any]:
    """How often the longer one was shown first: 1/2 in both orders; chance decides it in one."""
    label = rows.longer[row]
    kept = label > 0
    wins = ((label == 1) == (first > 0)).astype(np.float64)
    prompts = [rows.prompts[i] for i in row[kept]]
    return {"first_wins": share(wins[kept], prompts, **rows.options).to_dict(), "logit": 0.0}


def _length(rows: _Rows) -> dict[str, Any]:
    """How often the longer text wins, of verdicts that name a side; and how often people choose it on the same rows."""
    decided = (rows.label > 0) & (rows.longer > 0)
    wins = (rows.label == rows.longer).astype(np.float64)
    with_people = decided & (rows.human > 0)
    theirs = (rows.human == rows.longer).astype(np.float64)
    return {
        "longer_wins": rows.share(wins, decided),
        "people": rows.share(theirs, with_people),
        "beyond_people": mean((wins - theirs)[with_people], rows.take(with_people), **rows.options).to_dict(),
        "random": {"longer_wins": 0.5},
        "longest_wins": {"longer_wins": 1.0},
    }


def _models(
    critic: Critic, rows: _Rows, pairs: Mapping[str, Pair]
) -> tuple[verdict_model.VerdictModel, verdict_model.VerdictModel]:
    """The model of verdicts in single orders, without and with people's preference."""
    row, p, first = _single(critic, rows)
    x = verdict_model.relative_difference(rows.lengths)[row]
    human = np.select([rows.human == 2, rows.human == 1], [1.0, -1.0], 0.0)[row]
    prompts = [rows.prompts[i] for i in row]
    plainly = verdict_model.fit(p, x, first, clusters=prompts, **rows.options)
    labelled = rows.human[row] >= 0
    beyond = verdict_model.fit(
        p[labelled],
        x[labelled],
        first[labelled],
        human[labelled],
        clusters=[name for name, here in zip(prompts, labelled, strict=True) if here],
        **rows.options,
    )
    return plainly, beyond


def _own(critic: Critic, rows: _Rows) -> dict[str, Any] | None:
    """Self-preference: how often the critic's own model wins where one side is its own, beside people and length."""
    own = {name.lower() for name in critic.own}
    side = np.zeros(len(rows.ids), dtype=np.int64)
    for i, pair in enumerate(rows.pairs):
        mine = [name.lower() in own for name in pair.generators or ()]
        side[i] = 0 if sum(mine) != 1 else 1 + mine.index(True)
    asked = side > 0
    keep = asked & (rows.label >= 0)
    if not keep.any():
        return None
    wins = np.where(rows.label == 0, 0.5, rows.label == side).astype(np.float64)
    theirs = np.where(rows.human == 0, 0.5, rows.human == side).astype(np.float64)
    longer = np.where(rows.longer == 0, 0.5, rows.longer == side).astype(np.float64)
    people = keep & (rows.human >= 0)
    return {
        "generators": sorted(critic.own),
        "n": int(keep.sum()),
        "wins": rows.share(wins, keep),
        "people": rows.share(theirs, people),
        "beyond_people": mean((wins - theirs)[people], rows.take(people), **rows.options).to_dict(),
        "longest_wins": {"wins": rows.share(longer, keep & (rows.longer >= 0))},
        "random": {"wins": 0.5},
    }


def _outside(critic: Critic, rows: _Rows, pairs: Mapping[str, Pair]) -> dict[str, Any] | None:
    if not critic.outside:
        return None
    names = list(critic.outside)
    values = np.array([critic.outside[name] for name in names])
    prompts = [pairs[name].prompt if name in pairs else name for name in names]
    return {
        "mean": mean(values, prompts, **rows.options).to_dict(),
        "most": share((values > 0.5).astype(np.float64), prompts, **rows.options).to_dict(),
    }


# ---- several critics -------------------------------------------------------------------------------------------


def quality_report(
    critics: Sequence[Critic], pairs: Mapping[str, Pair], *, samples: int = SAMPLES, seed: int = 0
) -> dict[str, Any]:
    """`critics`: `critic_quality` of each; `between`: agreement of each two on what both judged; `all`: Krippendorff's
    alpha of all of them together; `people`: of people among themselves."""
    options = {"samples": samples, "seed": seed}
    return {
        "critics": [critic_quality(critic, pairs, **options) for critic in critics],
        "between": [_between(a, b, pairs, **options) for a, b in combinations(critics, 2)],
        "all": _all(critics, pairs, **options),
        "people": people_themselves(pairs, **options),
    }


def _prompt(pairs: Mapping[str, Pair], name: str) -> str:
    return pairs[name].prompt if name in pairs else name


def _between(
    one: Critic, other: Critic, pairs: Mapping[str, Pair], *, samples: int, seed: int
) -> dict[str, Any]:
    shared = [name for name in one.final if name in other.final]
    labels = [
        labels_of(np.array([np.nan if c.final[n] is None else c.final[n] for n in shared], dtype=np.float64))
        for c in (one, other)
    ]
    prompts = [_prompt(pairs, name) for name in shared]
    options = {"samples": samples, "seed": seed}
    two = reliability.pairwise(*labels, prompts, **options)
    table = sum(reliability.one_hot(label, 3) for label in labels)
    return {
        "one": one.name,
        "other": other.name,
        "n": int(((labels[0] >= 0) & (labels[1] >= 0)).sum()),
        **{name: value.to_dict() for name, value in two.items()},
        "alpha": reliability.alpha(table, prompts, **options).to_dict(),
    }


def _all(
    critics: Sequence[Critic], pairs: Mapping[str, Pair], *, samples: int, seed: int
) -> dict[str, Any] | None:
    if len(critics) < 2:
        return None
    names = list(dict.fromkeys(name for critic in critics for name in critic.final))
    table = np.zeros((len(names), 3))
    for critic in critics:
        p = [critic.final.get(name) for name in names]
        table += reliability.one_hot(labels_of(np.array(p, dtype=np.float64)), 3)
    prompts = [_prompt(pairs, name) for name in names]
    found = reliability.alpha(table, prompts, samples=samples, seed=seed)
    return {"critics": len(critics), "alpha": found.to_dict()}


def people_themselves(
    pairs: Mapping[str, Pair], *, samples: int = SAMPLES, seed: int = 0
) -> dict[str, Any] | None:
    """Agreement of people with each other on pairs that several labelled: what a critic can be held against."""
    several = [pair for pair in pairs.values() if len(pair.human) > 1]
    if not several:
        return None
    counts = np.array([np.bincount(pair.human, minlength=3) for pair in several], dtype=np.float64)
    prompts = [pair.prompt for pair in several]
    size = counts.sum(axis=1)
    same = (counts * (counts - 1)).sum(axis=1) / (size * (size - 1))
    return {
        "n": len(several),
        "raw": share(same, prompts, samples=samples, seed=seed).to_dict(),
        "alpha": reliability.alpha(counts, prompts, samples=samples, seed=seed).to_dict(),
    }
