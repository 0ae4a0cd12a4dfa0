"""`laif reward`: one reward model from files of pairs, from its YAML file to its report."""

import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from laif_jax.config import RewardConfig, dump_config, load_config
from laif_jax.parallel import distributed
from laif_jax.parallel.mesh import make_mesh
from laif_jax.records import write_json
from laif_jax.stages import base, fit, reward
from laif_jax.stages.artifact import Artifact, StageError, versions
from laif_jax.stages.context import Context, Services
from laif_jax.studies.reward_report import print_reward_results, verdicts, warnings, write_reward_report
from laif_jax.training.metrics import read_metrics
from laif_jax.training.step import enable_compilation_cache

logger = logging.getLogger(__name__)

KIND = "reward"


def run_reward(config_path: str, overrides: Sequence[str] = ()) -> int:
    """Trains and measures a reward model; what is finished is not done again, so that the same command goes on after
    any interruption.

    Writes, under `runs/NAME/`: `config.yaml` (resolved), a folder per stage (the model in `reward-KEY/model`),
    `results.json` and `report/index.html`.

    Returns:
      0.

    Raises:
      ConfigError, MeshError, DataError: a mistake that is found before training. StageError: training failed.
    """
    config = load_config(config_path, overrides, RewardConfig)
    distributed.initialize()
    make_mesh(config.mesh)  # a mesh that does not fit these devices is told before anything is read
    enable_compilation_cache()
    root = run_folder(config)
    if distributed.is_main():
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.yaml").write_text(dump_config(config))
    with Services(config, root) as services:
        ctx = Context(config=config, root=root, seed=config.seed, services=services)
        artifact = reward.run(ctx, base.run(ctx), config.pairs, config.reward)
    if distributed.is_main():
        results = collect(config, config_path, artifact)
        write_json(root / "results.json", results)
        write_json(root / "report" / "data.json", {"curves": training_curves(artifact)})
        page = rebuild(root)
        files = {"model": artifact.path / fit.MODEL, "results": root / "results.json", "report": page}
        print_reward_results(results, files)
    return 0


def run_folder(config: RewardConfig) -> epath.Path:
    """`<out>/<name>`, with the scale in the name unless it is the default one."""
    suffix = "" if config.scale == "default" else f"-{config.scale}"
    return epath.Path(config.out) / f"{config.name}{suffix}"


def collect(config: RewardConfig, config_path: str, artifact: Artifact) -> dict[str, Any]:
    """The contents of results.json."""
    metrics = artifact.metrics
    spec = config.reward
    return {
        "kind": KIND,
        "name": config.name,
        "scale": config.scale,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config_path": config_path,
        "versions": versions(),
        "seed": config.seed,
        "verdicts": verdicts(metrics["sets"]),
        "warnings": warnings(metrics),
        "model": {
            "source": config.model.source,
            "folder": str(artifact.path / fit.MODEL),
            **{name: metrics[name] for name in ("members", "learning_rate", "steps", "mean", "std")},
        },
        **{name: metrics[name] for name in ("sets", "rates", "data", "examples")},
        "tokens_per_second_per_device": metrics["tokens_per_second_per_device"],
        "seconds": artifact.manifest["seconds"],
        "settings": {
            "configuration": config_path,
            "scale": config.scale,
            "seed": config.seed,
            "model": config.model.source,
            "loss": spec.loss,
            "pairs per update": spec.batch_size
            if not spec.packing
            else f"those in {spec.batch_size} packed rows",
            "max_length": spec.max_length,
            "end of context": spec.end_of_context,
            "optimiser": spec.optimizer.name,
            "score of training pairs": f"{metrics['mean']:.3f} ± {metrics['std']:.3f}",
            **{f"version: {name}": version for name, version in versions().items()},
        },
    }


def training_curves(artifact: Artifact) -> dict[str, dict[str, list[Any]]]:
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


def is_reward_run(folder: str | epath.Path) -> bool:
    """Whether a run's folder is that of `laif reward`."""
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
            raise StageError(f"{file}: no such file. `laif reward CONFIG` writes it at its end.")
        found.append(json.loads(file.read_text()))
    return write_reward_report(root / "report" / "index.html", found[0], found[1]["curves"])
