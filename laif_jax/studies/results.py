"""From finished stages to `results.json`: arms, paired comparisons, the answer, and what the report shows besides."""

import dataclasses
import datetime
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from laif_jax.config import ArmSpec, QuestionSpec, StudyConfig, expand_arms
from laif_jax.evaluation.bootstrap import paired_difference
from laif_jax.evaluation.winrate import win_rate
from laif_jax.records import read_jsonl
from laif_jax.stages import evaluate
from laif_jax.stages.artifact import Artifact, versions
from laif_jax.stages.rounds import was_begun
from laif_jax.studies.answer import answers
from laif_jax.studies.graph import Node, Outcome
from laif_jax.studies.laif import Replicate
from laif_jax.studies.rl_results import collect_reinforced, not_begun

Outcomes = Mapping[Node, Outcome]
SAMPLES_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Collected:
    """What the report is made from: `results.json`, and the parts of `report/data.json`."""

    results: dict[str, Any]
    curves: dict[str, Any]
    samples: list[dict[str, Any]]
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


def collect(
    config: StudyConfig, config_path: str, replicates: Sequence[Replicate], outcomes: Outcomes
) -> Collected:
    """Gathers everything that finished; what failed is listed under `stages` and `warnings`."""
    verdicts = {arm.name: _verdicts(arm.name, replicates, outcomes) for arm in expand_arms(config)}
    finished = {name: rows for name, rows in verdicts.items() if any(rows)}
    table = {name: _probabilities(rows) for name, rows in finished.items()}
    reinforced = collect_reinforced(config, replicates, outcomes)
    passed_over = not_begun(replicates, outcomes)
    results: dict[str, Any] = {
        "name": config.name,
        "scale": config.scale,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config_path": config_path,
        "versions": versions(),
        "seeds": [replicate.seed for replicate in replicates],
        "judge": _judge(config, replicates, outcomes),
        "arms": {
            arm.name: _arm(config, arm, table[arm.name], replicates, outcomes)
            for arm in expand_arms(config)
            if arm.name in finished
        },
        "comparisons": _comparisons(config, table),
        "labels": _labels(config, replicates, outcomes),
        **reinforced.results,
        "stages": [_stage_row(node, outcomes[node]) for node in outcomes if node not in passed_over],
        "warnings": [],
    }
    results["warnings"] = [*_warnings(config, results, outcomes), *_twins(finished)]
    results |= answers(results, questions(config))
    return Collected(results, _curves(replicates, outcomes), _samples(finished), reinforced.figures)


def questions(config: StudyConfig) -> list[QuestionSpec]:
    """The configured questions; without any, each LAIF arm against SFT on the teacher named as its critic is (or, if
    there is none, on each other teacher) with the largest share."""
    if config.questions:
        return list(config.questions)
    arms = expand_arms(config)
    plain = [arm for arm in arms if arm.optimize == "none"]
    largest = max((arm.share for arm in plain), default=0.0)
    full = [arm for arm in plain if arm.share == largest]
    found = []
    for laif in (arm for arm in arms if arm.optimize != "none"):
        same = [arm for arm in full if arm.teacher == laif.critic]
        found += [QuestionSpec(laif=laif.name, sft=arm.name) for arm in same or full]
    return found


# ---- arms ------------------------------------------------------------------------------------------------------


def _verdicts(arm: str, replicates: Sequence[Replicate], outcomes: Outcomes) -> list[list[dict[str, Any]]]:
    """Verdict rows per seed; an empty list where the arm did not finish."""
    artifacts = [outcomes[replicate.arms[arm]].artifact for replicate in replicates]
    return [evaluate.read(artifact) if artifact else [] for artifact in artifacts]


def _probabilities(rows: Sequence[Sequence[Mapping[str, Any]]]) -> np.ndarray:
    """p [seeds, prompts], NaN where there is no verdict. All seeds are evaluated on the same prompts."""
    width = max(len(row) for row in rows)
    return np.array(
        [[np.nan if item["p"] is None else item["p"] for item in row] or [np.nan] * width for row in rows],
        np.float64,
    )


def _arm(
    config: StudyConfig, arm: ArmSpec, p: np.ndarray, replicates: Sequence[Replicate], outcomes: Outcomes
) -> dict[str, Any]:
    found = [outcomes[replicate.arms[arm.name]].artifact for replicate in replicates]
    metrics = [artifact.metrics for artifact in found if artifact]
    summary = win_rate(p).to_dict()
    if len(metrics) > 1:
        # Over several seeds the error must cover the spread of training runs as well as that of prompts.
        samples = config.evaluation.bootstrap
        summary["standard_error"] = paired_difference(p, np.zeros_like(p), samples=samples).standard_error
    average = {
        name: float(np.mean([m[name] for m in metrics]))
        for name in ("mean_length", "reference_mean_length", "longest_wins", "true_quality", "true_win_rate")
        if name in metrics[0]
    }
    per_seed = [
        {
            "seed": replicate.seed,
            **{k: a.metrics[k] for k in ("win_rate", "standard_error", "n", "mean_length")},
        }
        | ({"true_quality": a.metrics["true_quality"]} if "true_quality" in a.metrics else {})
        for replicate, a in zip(replicates, found)
        if a
    ]
    return {
        **summary,
        **average,
        "per_seed": per_seed,
        "description": describe(arm),
        "method": arm.optimize,
        "critic_endpoint": config.critics[arm.critic].endpoint if arm.critic else None,
    }


def describe(arm: ArmSpec) -> str:
    """An arm in words."""
    text = f"SFT on {arm.share:.0%} of {arm.teacher}'s completions"
    if arm.optimize == "none":
        return text
    if arm.optimize == "ppo" and arm.reward == "critic":
        return f"{text}, then PPO on {arm.critic}'s ratings"
    judgements = f"{arm.critic}'s judgements ({arm.pairs.replace('_', ' ')})"
    return f"{text}, then {_LEARNING[arm.optimize]} {judgements}"


_LEARNING = {
    "dpo": "DPO on",
    "ppo": "PPO against a reward model of",
    "iterated_dpo": "DPO in rounds on",
    "iterated_ppo": "PPO in rounds against reward models of",
    "best_of_n": "the best of its samples by a reward model of",
    "rejection_sampling": "SFT on the best of its samples by a reward model of",
}


def _comparisons(config: StudyConfig, table: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Every pair of arms, paired on seed and prompt."""
    return [
        {
            "a": a,
            "b": b,
            **paired_difference(table[a], table[b], samples=config.evaluation.bootstrap).to_dict(),
        }
        for a, b in itertools.combinations(table, 2)
        if np.any(~np.isnan(table[a] - table[b]))
    ]


# ---- what stands around them -----------------------------------------------------------------------------------


def _judge(config: StudyConfig, replicates: Sequence[Replicate], outcomes: Outcomes) -> dict[str, Any]:
    spec = config.evaluation.judge
    endpoint = config.endpoints[spec.endpoint]
    judge: dict[str, Any] = {
        "endpoint": spec.endpoint,
        "provider": endpoint.provider,
        "model": "simulated"
        if endpoint.simulated
        else endpoint.gguf or endpoint.checkpoint or endpoint.model,
        "critic": spec.critic,
        "order": spec.order,
        "reference": config.evaluation.reference,
    }
    if endpoint.simulated:
        judge["note"] = (
            f"The judge is simulated: of two answers that differ in quality it favours the better one with probability "
            f"{endpoint.simulated.accuracy:g}."
        )
    node = replicates[0].agreement
    if node and (artifact := outcomes[node].artifact):
        judge["agreement"] = artifact.metrics["by_source"]
    return judge


def _labels(config: StudyConfig, replicates: Sequence[Replicate], outcomes: Outcomes) -> dict[str, Any]:
    """Per LAIF arm, the counts of its first seed's labels (each seed's are in its stage's manifest)."""
    found = {}
    for name, node in replicates[0].labels.items():
        artifact = outcomes[node].artifact
        if artifact and was_begun(artifact):
            found[name] = {"seed": replicates[0].seed, **artifact.metrics}
    return found


def _stage_row(node: Node, outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": node.name, "arm": node.arm, "seed": node.seed}
    if outcome.artifact is None:
        return {
            **row,
            "status": "skipped" if outcome.error.startswith("skipped") else "failed",
            "error": outcome.error,
        }
    manifest = outcome.artifact.manifest
    kept = {key: manifest[key] for key in ("kind", "key", "status", "seconds", "attempts")}
    usage = manifest["metrics"].get("usage")
    return {**row, **kept} | ({"usage": usage} if usage else {})


def _warnings(config: StudyConfig, results: Mapping[str, Any], outcomes: Outcomes) -> Any:
    for node, outcome in outcomes.items():
        if outcome.artifact is None and not outcome.error.startswith("skipped"):
            yield f"`{node.name}` (seed {node.seed}) failed: {outcome.error}"
    for name, arm in results["arms"].items():
        if arm["coverage"] < 1.0:
            yield f"arm `{name}`: {arm['missing']} of {arm['n'] + arm['missing']} comparisons have no verdict"
    for row in results["judge"].get("agreement", []):
        low, high = row["ci95"]
        if row["source"] == "all" and low is not None and low <= 0.5 <= high:
            yield (
                f"the judge agrees with humans on {row['without_ties']:.1%} of pairs (95% interval {low:.1%} to "
                f"{high:.1%}), which is not distinguishable from a coin: its win rates say little about quality"
            )
    for name, row in results["labels"].items():
        same, first = row.get("swap_consistency"), row.get("first_shown_wins")
        if same is not None and first is not None and same < 0.5:
            yield (
                f"arm `{name}`: the critic named the same side in both orders in {same:.0%} of comparisons only, and "
                f"the answer shown first in {first:.0%}: its labels say more about the order than about the answers"
            )
    for name, rows in results["rounds"].items():
        for row in rows:
            if row.get("begun") is False and row["reason"]:
                yield f"arm `{name}` (seed {row['seed']}): round {row['round']} was not begun: {row['reason']}"
    if config.seeds == 1:
        yield "one seed: intervals cover the choice of prompts, not the spread between training runs"


def _twins(finished: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Any:
    """Arms that answer (nearly) all prompts alike: what sets them apart did not change the model."""
    for (a, left), (b, right) in itertools.combinations(finished.items(), 2):
        pairs = [pair for rows in zip(left, right) for pair in zip(*rows)]
        same = sum(x["output"] == y["output"] for x, y in pairs)
        if pairs and same > 0.98 * len(pairs):
            yield (
                f"arms `{a}` and `{b}` gave the same output to {same} of {len(pairs)} prompts: they are nearly one "
                "model, and a comparison of the two says nothing about the recipes"
            )


def _curves(replicates: Sequence[Replicate], outcomes: Outcomes) -> dict[str, Any]:
    """arm -> seed -> list of training stages: {"stage", "step": [...], metric: [...]}; rounds of an arm are one stage
    each, and one that was not begun is none."""
    return {
        arm: {
            str(replicate.seed): _stage_curves(
                [artifact for node in replicate.training[arm] if (artifact := outcomes[node].artifact)]
            )
            for replicate in replicates
        }
        for arm in replicates[0].arms
    }


def _stage_curves(artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    distinct = {artifact.key: artifact for artifact in artifacts}.values()
    return [curve for artifact in distinct if (curve := _curve(artifact))]


# The metrics shown of each kind of stage; of others the loss.
CURVES = {
    "sft": ("loss",),
    "dpo": ("loss", "rewards/margins", "rewards/accuracies"),
    "reward": ("loss", "accuracy"),
    "ppo": ("objective/scores", "objective/kl"),
}


def _curve(artifact: Artifact) -> dict[str, Any] | None:
    """None where the stage kept no metrics of its training."""
    path = artifact.path / "train" / "metrics.jsonl"
    if not path.exists():
        return None
    rows = list(read_jsonl(path))
    kind = artifact.manifest["kind"]
    wanted = CURVES.get(kind, ("loss",))
    names = ["step"] + [name for name in wanted if any(name in row for row in rows)]
    return {"stage": kind, **{name: [row.get(name) for row in rows] for name in names}}


def _samples(finished: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> list[dict[str, Any]]:
    """A few prompts, evenly spaced, with every arm's output and verdict, from the first seed that each arm has."""
    first = {name: next(rows for rows in seeds if rows) for name, seeds in finished.items()}
    if not first:
        return []
    count = len(next(iter(first.values())))
    chosen = sorted({round(i) for i in np.linspace(0, count - 1, min(SAMPLES_SHOWN, count))})
    some = next(iter(first.values()))
    return [
        {
            "prompt": some[i]["prompt"],
            "reference": some[i]["reference"],
            "outputs": {name: rows[i]["output"] for name, rows in first.items()},
            "verdicts": {name: rows[i]["p"] for name, rows in first.items()},
        }
        for i in chosen
    ]
