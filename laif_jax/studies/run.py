"""`laif run`: a whole study, from its YAML file to its report."""

import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from laif_jax.config import ConfigError, StudyConfig, dump_config, load_config
from laif_jax.config.load import expand_arms
from laif_jax.labeling.critic import load_critic
from laif_jax.labeling.prices import price_of
from laif_jax.parallel import distributed
from laif_jax.parallel.mesh import set_libtpu_args
from laif_jax.records import check_writable, write_json
from laif_jax.stages.artifact import StageError
from laif_jax.stages.context import Services, StudyContext
from laif_jax.studies.graph import Node, Outcome, execute
from laif_jax.studies.laif import Replicate, build
from laif_jax.studies.plan import Plan, announce, plan_study
from laif_jax.studies.report import print_results, write_report
from laif_jax.studies.results import Collected, collect
from laif_jax.studies.single import check_mesh, run_folder
from laif_jax.studies.spending import spending
from laif_jax.training.step import enable_compilation_cache

logger = logging.getLogger(__name__)


def run_study(config_path: str, overrides: Sequence[str] = ()) -> int:
    """Runs a study; finished stages are not run again, so that the same command goes on after any interruption.

    Writes, under `runs/NAME/`: `config.yaml` (resolved), a folder per stage, `results.json` and `report/index.html`.

    Returns:
      0, or 1 if a stage failed (the report then shows what finished, and why the rest did not).

    Raises:
      ConfigError, CriticError, MeshError: a mistake that is found before any stage runs. OSError: `out` cannot be
        written.
    """
    config = load_config(config_path, overrides)
    set_libtpu_args(config.mesh)
    distributed.initialize()
    check_study(config)
    enable_compilation_cache()
    root, plan = run_folder(config), None
    distributed.from_main(lambda: check_writable(root))
    if distributed.is_main():
        (root / "config.yaml").write_text(dump_config(config))
        plan = announce(config, lambda: plan_study(config), root)
    with Services(config, root) as services:
        replicates = [
            build(StudyContext(config=config, root=root, seed=config.seed + index, services=services))
            for index in range(config.seeds)
        ]
        outcomes = execute(targets_of(replicates), on_progress=_log_progress)
    if distributed.is_main():
        results = write_results(root, config, config_path, replicates, outcomes, plan, services)
        files = {"results": root / "results.json", "report": root / "report" / "index.html"}
        print_results(results, files)
    return 1 if any(outcome.artifact is None for outcome in outcomes.values()) else 0


def write_results(
    folder: epath.Path,
    config: StudyConfig,
    config_path: str,
    replicates: Sequence[Replicate],
    outcomes: Mapping[Node, Outcome],
    plan: Plan | None,
    services: Services,
) -> dict[str, Any]:
    """Writes `results.json` and `report/` of a study whose stages have been run; returns the results."""
    collected = collect(config, config_path, replicates, outcomes)
    collected.results["spending"] = spending(config, plan, services.store)
    kept = {"curves": collected.curves, "samples": collected.samples, "figures": collected.figures}
    write_json(folder / "report" / "data.json", kept)
    write_json(folder / "results.json", collected.results)
    _write_page(folder, collected)
    return collected.results


def check_study(config: StudyConfig) -> None:
    """Raises ConfigError, CriticError or MeshError for a mistake that would else be found in the middle of a study."""
    check_mesh(config)
    _check_bounds(config)
    # Critics are first used after training, and what is wrong with one should be known before.
    distributed.from_main(lambda: _check_critics(config))


def _check_bounds(config: StudyConfig) -> None:
    """Raises ConfigError if `iterate.max_cost` is to hold for a model whose price nobody knows."""
    spec, today = config.iterate, datetime.datetime.now(datetime.UTC).date()
    if spec is None or spec.max_cost is None:
        return
    for arm in expand_arms(config):
        if arm.critic is None or not arm.optimize.startswith("iterated"):
            continue
        for voice in config.critics[arm.critic].voices:
            if price_of(config.endpoints[voice.endpoint], today) is None:
                raise ConfigError(
                    f"iterate.max_cost: no price is known for the endpoint `{voice.endpoint}` of arm `{arm.name}`, so "
                    "it cannot hold; give its `prompt_price` and `completion_price`"
                )


def _check_critics(config: StudyConfig) -> None:
    """Raises CriticError for a critic's data file that is not there or malformed, or that compares where it is to rate,
    or the other way round."""
    critics = {name: load_critic(spec.critic) for name, spec in sorted(config.critics.items())}
    load_critic(config.evaluation.judge.critic).require("comparison")
    for arm in expand_arms(config):
        if arm.critic is not None:
            rates = arm.optimize == "ppo" and arm.reward == "critic"
            critics[arm.critic].require("rating" if rates else "comparison")


def rebuild_report(folder: str) -> epath.Path:
    """Makes the report of a finished study again, from `results.json` and `report/data.json`.

    Raises:
      StageError: the folder holds no finished study.
    """
    root = epath.Path(folder)
    files = (root / "results.json", root / "report" / "data.json")
    for file in files:
        if not file.exists():
            raise StageError(f"{file}: no such file. `laif run CONFIG` writes it at the end of a study.")
    results, data = (json.loads(file.read_text()) for file in files)
    return _write_page(root, Collected(results, data["curves"], data["samples"], data.get("figures") or {}))


def targets_of(replicates: Sequence[Replicate]) -> list[Node]:
    """The stages that a study is made for, in the order in which they are run."""
    # The judge's agreement first: it is cheap, and a judge that cannot be reached is found before anything is trained.
    checks = [replicate.agreement for replicate in replicates[:1] if replicate.agreement]
    return checks + [node for replicate in replicates for node in replicate.targets()]


def _write_page(root: epath.Path, collected: Collected) -> epath.Path:
    return write_report(
        root / "report" / "index.html",
        collected.results,
        collected.curves,
        collected.samples,
        collected.figures,
    )


def _log_progress(index: int, count: int, node: Node, outcome: Outcome | None) -> Any:
    if outcome is None:
        logger.info("[%d/%d] %s (seed %d)", index + 1, count, node.name, node.seed)
    elif outcome.artifact is None:
        logger.error("[%d/%d] %s (seed %d): %s", index + 1, count, node.name, node.seed, outcome.error)
