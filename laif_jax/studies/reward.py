"""`laif reward`: one reward model from files of pairs."""

from typing import Any

from laif_jax.config import RewardConfig
from laif_jax.stages import base, fit, reward
from laif_jax.stages.artifact import Artifact
from laif_jax.stages.context import Context
from laif_jax.studies.reward_report import render, reward_table, verdicts, warnings
from laif_jax.studies.single import Command
from laif_jax.training.metrics import read_metrics


def _train(ctx: Context, config: RewardConfig) -> Artifact:
    return reward.run(ctx, base.run(ctx), config.pairs, config.reward)


def _describe(config: RewardConfig, artifact: Artifact) -> dict[str, Any]:
    metrics, spec = artifact.metrics, config.reward
    model = {name: metrics[name] for name in ("members", "learning_rate", "steps", "mean", "std")}
    packed = f"those in {spec.batch_size} packed rows"
    return {
        "verdicts": verdicts(metrics["sets"]),
        "warnings": warnings(metrics),
        "model": {"source": config.model.source, "folder": str(artifact.path / fit.MODEL), **model},
        **{name: metrics[name] for name in ("sets", "rates", "data", "examples")},
        "tokens_per_second_per_device": metrics["tokens_per_second_per_device"],
        "settings": {
            "model": config.model.source,
            "loss": spec.loss,
            "pairs per update": packed if spec.packing else spec.batch_size,
            "max_length": spec.max_length,
            "end of context": spec.end_of_context,
            "optimiser": spec.optimizer.name,
            "score of training pairs": f"{metrics['mean']:.3f} ± {metrics['std']:.3f}",
        },
    }


def _curves(artifact: Artifact) -> dict[str, dict[str, list[Any]]]:
    """Loss and accuracy on training batches, per learning rate."""
    rates = [row["learning_rate"] for row in artifact.metrics["rates"]]
    curves = {}
    for rate in rates:
        folder = artifact.path / f"rate-{rate:g}"
        rows = read_metrics((folder if folder.exists() else artifact.path) / "train" / "metrics.jsonl")
        curves[f"{rate:g}"] = {
            name: [row.get(name) for row in rows] for name in ("step", "loss", "rewards/accuracies")
        }
    return curves


REWARD = Command(
    kind="reward",
    schema=RewardConfig,
    product="model",
    train=_train,
    describe=_describe,
    curves=lambda artifact: {"curves": _curves(artifact)},
    page=render,
    table=reward_table,
)
