"""What reward models, reinforcement learning, rounds and best-of-n leave behind, for `results.json` and the figures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from laif_jax.config import StudyConfig, expand_arms
from laif_jax.records import read_jsonl
from laif_jax.stages.rounds import was_begun
from laif_jax.studies.graph import Node, Outcome
from laif_jax.studies.kl_reward import analysed
from laif_jax.studies.laif import Replicate
from laif_jax.studies.rl_figures import scientific

Outcomes = Mapping[Node, Outcome]
METRICS = "train/metrics.jsonl"
# Of a run's rows: what a figure calls it, and the metric.
TRAINED = {"iteration": "step", "reward": "objective/scores", "kl": "objective/kl"}
EVALUATED = {
    "iteration": "step",
    "reward": "eval/reward",
    "kl": "eval/objective/kl",
    "true_quality": "eval/quality",
}


@dataclasses.dataclass(frozen=True)
class Reinforced:
    """`results`: entries of results.json. `figures`: curves, for report/data.json."""

    results: dict[str, Any]
    figures: dict[str, Any]


def collect_reinforced(
    config: StudyConfig, replicates: Sequence[Replicate], outcomes: Outcomes
) -> Reinforced:
    """Entries `rewards`, `rounds`, `one_round`, `ppo`, `kl_reward` and `best_of_n`, each empty where the study has
    none; curves `reward` and `ppo`."""
    runs = [run for replicate in replicates for run in _runs(replicate, outcomes)]
    curves = [{key: run[key] for key in (*_IDENTITY, "train", "eval")} for run in runs]
    return Reinforced(
        {
            "rewards": _rewards(replicates, outcomes),
            "rounds": {
                name: [row for replicate in replicates for row in _rounds(replicate, name, outcomes)]
                for name in replicates[0].rounds
            },
            "one_round": _one_round(config),
            "ppo": [_summary(run) for run in runs],
            "kl_reward": _settings(runs),
            "best_of_n": {
                name: [
                    {"seed": replicate.seed, **artifact.metrics}
                    for replicate in replicates
                    if (artifact := outcomes[replicate.chosen[name]].artifact)
                ]
                for name in replicates[0].chosen
            },
        },
        {"reward": _reward_curves(replicates, outcomes), "ppo": curves},
    )


def not_begun(replicates: Sequence[Replicate], outcomes: Outcomes) -> set[Node]:
    """The nodes of rounds that were not begun: they hand on what was there before."""
    found = set()
    for replicate in replicates:
        last = set(replicate.arms.values())
        for made in replicate.rounds.values():
            for each in made:
                begin = outcomes[each.begin].artifact
                if begin and not was_begun(begin):
                    found |= {node for node in each.nodes if node not in last}
    return found


# ---- rounds ----------------------------------------------------------------------------------------------------


def _rounds(replicate: Replicate, arm: str, outcomes: Outcomes) -> list[dict[str, Any]]:
    """A row per round of one seed; round 0 is what the first starts from."""
    rows = [{"seed": replicate.seed, "round": 0, **_judged(replicate.starts[arm], outcomes)}]
    made = replicate.rounds[arm]
    for each in made:
        row: dict[str, Any] = {"seed": replicate.seed, "round": each.number}
        begin = outcomes[each.begin].artifact
        if begin is None:
            rows.append(row | {"begun": None, "reason": outcomes[each.begin].error})
            continue
        row |= {"begun": begin.metrics["begun"], "reason": begin.metrics["reason"]}
        if row["begun"]:
            row["prompts"] = begin.metrics["stop"] - begin.metrics["start"]
            if labels := outcomes[each.labels].artifact:
                row |= {key: labels.metrics.get(key) for key in ("comparisons", "preferences")}
                row["cost"] = (labels.metrics.get("usage") or {}).get("cost")
            failed = next((outcomes[n].error for n in each.nodes if outcomes[n].artifact is None), "")
            row["reason"] = failed
            evaluation = replicate.arms[arm] if each is made[-1] else each.evaluation
            row |= _judged(evaluation, outcomes)
        rows.append(row)
    return rows


def _judged(node: Node | None, outcomes: Outcomes) -> dict[str, Any]:
    artifact = outcomes[node].artifact if node else None
    if artifact is None:
        return {"win_rate": None, "standard_error": None, "true_quality": None}
    return {key: artifact.metrics.get(key) for key in ("win_rate", "standard_error", "true_quality")}


def _one_round(config: StudyConfig) -> dict[str, list[str]]:
    """Per iterated arm, the arms that learn in the same way from as many labels of the same critic, in one round."""
    single = {"iterated_dpo": "dpo", "iterated_ppo": "ppo"}
    arms = expand_arms(config)
    return {
        arm.name: [
            other.name
            for other in arms
            if other.optimize == single[arm.optimize]
            and other.reward == "model"
            and (other.teacher, other.share, other.critic, other.pairs)
            == (arm.teacher, arm.share, arm.critic, arm.pairs)
        ]
        for arm in arms
        if arm.optimize in single
    }


# ---- reinforcement learning ------------------------------------------------------------------------------------

_IDENTITY = ("arm", "seed", "own", "kl_coef", "learning_rate")


def _runs(replicate: Replicate, outcomes: Outcomes) -> list[dict[str, Any]]:
    """The finished PPO runs of one seed, the arm's own first, with their curves."""
    found = []
    for arm, settings in replicate.runs.items():
        for index, ((coef, rate), node) in enumerate(settings.items()):
            if artifact := outcomes[node].artifact:
                rows = list(read_jsonl(artifact.path / METRICS))
                identity = (arm, replicate.seed, index == 0, coef, rate)
                found.append(
                    dict(zip(_IDENTITY, identity))
                    | {"train": _columns(rows, TRAINED), "eval": _columns(rows, EVALUATED)}
                )
    return found


def _columns(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, list[Any]]:
    """The rows that hold the reward, as one list per name."""
    kept = [row for row in rows if row.get(names["reward"]) is not None]
    present = {name: key for name, key in names.items() if any(key in row for row in kept)}
    return {name: [row.get(key) for row in kept] for name, key in present.items()}


def _summary(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's first and last values on held-out prompts."""
    row: dict[str, Any] = {key: run[key] for key in _IDENTITY}
    for name in ("iteration", "reward", "kl", "true_quality"):
        values = run["eval"].get(name) or []
        row[name] = {"first": values[0], "last": values[-1]} if values else None
    return row


def _settings(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per arm, KL coefficient and learning rate: the evaluations averaged over seeds, the square-root fit to all of
    them, and the turn of true quality."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["eval"].get("kl"):
            groups.setdefault((run["arm"], run["kl_coef"], run["learning_rate"]), []).append(run)
    made = []
    several = len({arm for arm, _, _ in groups}) > 1
    for (arm, coef, rate), group in groups.items():
        mean = {
            name: _mean([run["eval"] for run in group], name) for name in ("kl", "reward", "true_quality")
        }
        label = f"KL coefficient {coef:g}, rate {scientific(rate)}"
        row = {"arm": arm, "kl_coef": coef, "learning_rate": rate, "seeds": [run["seed"] for run in group]}
        made.append(analysed({**row, "label": f"{arm}: {label}" if several else label, **mean}))
    return made


def _mean(tables: Sequence[Mapping[str, Sequence[float | None]]], name: str) -> list[float | None]:
    """Means over runs at the iterations that all of them evaluated; [] where a run has no such values."""
    if any(name not in table for table in tables):
        return []
    rows = [dict(zip(table["iteration"], table[name])) for table in tables]
    common = [i for i in rows[0] if all(i in row for row in rows)]
    values = [[row[i] for row in rows] for i in common]
    return [
        None if any(v is None for v in at) else float(np.mean([v for v in at if v is not None]))
        for at in values
    ]


# ---- reward models ---------------------------------------------------------------------------------------------


def _models(replicates: Sequence[Replicate], outcomes: Outcomes) -> list[tuple[str, int, Mapping[str, Any]]]:
    """(name, seed, metrics) of every reward model; one that several arms share is named after the first of them."""
    found: dict[tuple[str, int], tuple[str, int, Mapping[str, Any]]] = {}
    for replicate in replicates:
        for name, node in replicate.rewards.items():
            artifact = outcomes[node].artifact
            if artifact and was_begun(artifact):
                found.setdefault((artifact.key, replicate.seed), (name, replicate.seed, artifact.metrics))
    return list(found.values())


def _rewards(replicates: Sequence[Replicate], outcomes: Outcomes) -> list[dict[str, Any]]:
    """A row per reward model and set of pairs: accuracy beside the longer text's, with intervals."""
    shown = ("n", "accuracy", "ci95", "longest_wins", "longest_ci95", "gain", "gain_ci95")
    return [
        {
            "name": name,
            "seed": seed,
            "set": pairs.replace("_", " "),
            "learning_rate": metrics["learning_rate"],
            **{key: report[key] for key in shown},
            "ece": report["calibration"]["ece"],
        }
        for name, seed, metrics in _models(replicates, outcomes)
        for pairs, report in metrics["sets"].items()
    ]


def _reward_curves(replicates: Sequence[Replicate], outcomes: Outcomes) -> list[dict[str, Any]]:
    """Accuracy on held-out pairs over steps, per reward model and learning rate."""
    return [
        {
            "name": name,
            "seed": seed,
            "learning_rate": rate["learning_rate"],
            "step": [row["step"] for row in rate["curve"]],
            "accuracy": [row["accuracy"] for row in rate["curve"]],
            "longest_wins": rate["curve"][-1].get("longest_wins"),
        }
        for name, seed, metrics in _models(replicates, outcomes)
        for rate in metrics["rates"]
        if len(rate["curve"]) > 1
    ]
