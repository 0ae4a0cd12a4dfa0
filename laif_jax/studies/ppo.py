"""`laif ppo`: reinforcement learning of one policy on given rewards, from its YAML file to its report."""

import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from laif_jax.config import PpoConfig, dump_config, load_config
from laif_jax.parallel import distributed
from laif_jax.parallel.mesh import make_mesh
from laif_jax.records import write_json
from laif_jax.stages import base, fit, ppo
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages.artifact import Artifact, StageError, versions
from laif_jax.stages.context import Context, Services
from laif_jax.studies.ppo_report import print_ppo_results, verdicts, warnings, write_ppo_report
from laif_jax.training.metrics import read_metrics
from laif_jax.training.step import enable_compilation_cache

logger = logging.getLogger(__name__)
KIND = "ppo"


def run_ppo(config_path: str, overrides: Sequence[str] = ()) -> int:
    """Trains a policy; the same command goes on after any interruption.

    Writes, under `runs/NAME/`: `config.yaml` (resolved), a folder per stage (the policy in `ppo-KEY/model`, snapshots
    in `ppo-KEY/snapshots`), `results.json` and `report/index.html`.

    Returns:
      0.

    Raises:
      ConfigError, MeshError, DataError: a mistake that is found before training. StageError: training failed, or a
        reward model cannot read what the policy writes.
    """
    config = load_config(config_path, overrides, PpoConfig)
    distributed.initialize()
    make_mesh(config.mesh)  # a mesh that does not fit these devices is told before anything is read
    enable_compilation_cache()
    root = run_folder(config)
    if distributed.is_main():
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.yaml").write_text(dump_config(config))
    with Services(config, root) as services:
        ctx = Context(config=config, root=root, seed=config.seed, services=services)
        rewards = {name: (source, None) for name, source in config.rewards.items()}
        artifact = ppo.run(ctx, prompts_stage.run(ctx), base.run(ctx), config.ppo, rewards=rewards)
    if distributed.is_main():
        results = collect(config, config_path, artifact)
        write_json(root / "results.json", results)
        write_json(
            root / "report" / "data.json", {"rows": rows_of(artifact), "samples": samples_of(artifact)}
        )
        page = rebuild(root)
        files = {"policy": artifact.path / fit.MODEL, "results": root / "results.json", "report": page}
        print_ppo_results(results, files)
    return 0


def run_folder(config: PpoConfig) -> epath.Path:
    """`<out>/<name>`, with the scale in the name unless it is the default one."""
    suffix = "" if config.scale == "default" else f"-{config.scale}"
    return epath.Path(config.out) / f"{config.name}{suffix}"


def collect(config: PpoConfig, config_path: str, artifact: Artifact) -> dict[str, Any]:
    """The contents of results.json."""
    metrics, spec = dict(artifact.metrics), config.ppo
    rows = rows_of(artifact)
    return {
        "kind": KIND,
        "name": config.name,
        "scale": config.scale,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config_path": config_path,
        "versions": versions(),
        "seed": config.seed,
        "verdicts": verdicts(metrics),
        "warnings": warnings(metrics, rows),
        "policy": {"source": config.model.source, "folder": str(artifact.path / fit.MODEL)},
        "metrics": metrics,
        "seconds": artifact.manifest["seconds"],
        "settings": {
            "configuration": config_path,
            "scale": config.scale,
            "seed": config.seed,
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
            **{f"version: {name}": version for name, version in versions().items()},
        },
    }


def rows_of(artifact: Artifact) -> list[dict[str, Any]]:
    """The metrics of all iterations."""
    return read_metrics(artifact.path / "train" / "metrics.jsonl")


def samples_of(artifact: Artifact) -> list[dict[str, Any]]:
    """Responses to held-out prompts at the first and the last evaluation."""
    rows = read_metrics(artifact.path / "train" / "samples.jsonl")
    shown = {row["step"] for row in (rows[0], rows[-1])} if rows else set()
    return [row for row in rows if row["step"] in shown]


def is_ppo_run(folder: str | epath.Path) -> bool:
    """Whether a run's folder is that of `laif ppo`."""
    path = epath.Path(folder) / "results.json"
    return path.exists() and json.loads(path.read_text()).get("kind") == KIND


def rebuild(folder: str | epath.Path) -> epath.Path:
    """Makes the report again, from `results.json` and `report/data.json`.

    Raises:
      StageError: the folder holds no finished run.
    """
    root = epath.Path(folder)
    found: list[Mapping[str, Any]] = []
    for file in (root / "results.json", root / "report" / "data.json"):
        if not file.exists():
            raise StageError(f"{file}: no such file. `laif ppo CONFIG` writes it at its end.")
        found.append(json.loads(file.read_text()))
    return write_ppo_report(root / "report" / "index.html", found[0], found[1])
