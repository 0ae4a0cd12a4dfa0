"""`laif ppo`: reinforcement learning of one policy on given rewards."""

from typing import Any

from laif_jax.config import PpoConfig
from laif_jax.stages import base, fit, ppo
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages.artifact import Artifact
from laif_jax.stages.context import Context
from laif_jax.studies.plan import plan_ppo
from laif_jax.studies.ppo_report import ppo_table, render, verdicts, warnings
from laif_jax.studies.single import Command
from laif_jax.training.metrics import read_metrics


def _train(ctx: Context, config: PpoConfig) -> Artifact:
    rewards = {name: (source, None) for name, source in config.rewards.items()}
    return ppo.run(ctx, prompts_stage.run(ctx), base.run(ctx), config.ppo, rewards=rewards)


def _describe(config: PpoConfig, artifact: Artifact) -> dict[str, Any]:
    metrics, spec = dict(artifact.metrics), config.ppo
    return {
        "verdicts": verdicts(metrics),
        "warnings": warnings(metrics, _rows(artifact)),
        "policy": {"source": config.model.source, "folder": str(artifact.path / fit.MODEL)},
        "metrics": metrics,
        "settings": {
            "policy": config.model.source,
            "algorithm": spec.algorithm,
            "rewards": ", ".join(
                f"{source.weight:g} x {name} ({source.model or source.critic})"
                for name, source in config.rewards.items()
            ),
            "learning rate": spec.optimizer.learning_rate,
            "KL": f"{spec.kl.estimator} in the {spec.kl.place}, coefficient {spec.kl.coef:g}"
            + (f", adaptive to {spec.kl.target:g}" if spec.kl.target else ""),
            "responses per iteration": spec.batch_size * spec.sampling.samples,
            "updates per iteration": spec.epochs * spec.minibatches,
            "values": metrics["value"],
            "new tokens": spec.sampling.max_new_tokens,
        },
    }


def _rows(artifact: Artifact) -> list[dict[str, Any]]:
    """The metrics of all iterations."""
    return read_metrics(artifact.path / "train" / "metrics.jsonl")


def _samples(artifact: Artifact) -> list[dict[str, Any]]:
    """Responses to held-out prompts at the first and the last evaluation."""
    rows = read_metrics(artifact.path / "train" / "samples.jsonl")
    shown = {row["step"] for row in (rows[0], rows[-1])} if rows else set()
    return [row for row in rows if row["step"] in shown]


PPO = Command(
    kind="ppo",
    schema=PpoConfig,
    product="policy",
    train=_train,
    describe=_describe,
    curves=lambda artifact: {"rows": _rows(artifact), "samples": _samples(artifact)},
    page=render,
    table=ppo_table,
    plan=plan_ppo,
)
