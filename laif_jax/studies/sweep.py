"""`laif sweep`: many settings of one study, from as few executables and as few runs as possible.

The points share the study's folder, so that a stage which several of them need is run once, and nothing that any run
of the study has finished is run again. Stages that train the same shapes train together (`laif_jax.training.together`).
"""

import functools
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from laif_jax.config import StudyConfig, dump_config
from laif_jax.labeling.client import LabelClient
from laif_jax.parallel import distributed
from laif_jax.parallel.mesh import set_libtpu_args
from laif_jax.records import check_writable, content_id, write_json
from laif_jax.stages.artifact import versions
from laif_jax.stages.context import Services, StudyContext
from laif_jax.studies.graph import Node, Outcome, ordered
from laif_jax.studies.laif import Replicate, build
from laif_jax.studies.plan import announce, plan_study
from laif_jax.studies.run import check_study, targets_of, write_results
from laif_jax.studies.single import run_folder
from laif_jax.studies.sweep_axes import Axis, Point, make_points, read_axes
from laif_jax.studies.sweep_report import page, summarise, table_text
from laif_jax.studies.sweep_run import execute_points, members_at_once
from laif_jax.training.step import enable_compilation_cache

logger = logging.getLogger(__name__)


class _PointServices(Services):
    """A point's own endpoints behind the labelling service of the sweep."""

    def __init__(self, config: StudyConfig, root: epath.Path, shared: Services):
        super().__init__(config, root)
        self._shared = shared

    @functools.cached_property
    def client(self) -> LabelClient:
        """That of the sweep's services."""
        return self._shared.client


def run_sweep(
    config_path: str,
    arguments: Sequence[str],
    *,
    paired: bool = False,
    together: int | None = None,
    as_json: bool = False,
    width: int = 110,
) -> tuple[int, str]:
    """Runs all points; what is finished is not run again, so that the same command goes on after any interruption.

    Writes, under `runs/NAME/`: the stages of all points; in `sweep-KEY/`, KEY being of the points, a folder per point
    with its `config.yaml`, `results.json` and `report/`, and the sweep's own `sweep.json` and `report/index.html`.

    Args:
      arguments: overrides, of which those whose value is a list that the key does not take are axes.
      paired: the axes' first values together, then the second, instead of all combinations.
      together: how many models train together at most; 1: one by one; None: see `sweep_run.members_at_once`.
      width: of the table, in columns.

    Returns:
      (0, or 1 if a stage failed; what to print: the table, or `sweep.json` as text).

    Raises:
      ConfigError, CriticError, MeshError, SweepError: a mistake that is found before any stage runs. OSError: `out`
        cannot be written.
    """
    axes, shared = read_axes(config_path, arguments)
    points = make_points(config_path, axes, shared, paired=paired)
    configs = [point.config for point in points]
    set_libtpu_args(configs[0].mesh)
    distributed.initialize()
    for config in configs:
        check_study(config)
    most, why = members_at_once(configs, together)
    enable_compilation_cache()
    root = run_folder(configs[0])
    folder = root / f"sweep-{content_id([point.config.resolved() for point in points])[:12]}"
    distributed.from_main(lambda: check_writable(root))
    notes = _announce(points, axes, most, why)
    if distributed.is_main():
        logger.info("of the first point, and at most of each other; an equal question is asked once:")
        folder.mkdir(parents=True, exist_ok=True)
        announce(configs[0], lambda: plan_study(configs[0]), folder)
    started = time.monotonic()
    groups: list[int] = []
    with Services(configs[0], root) as services:
        replicates = [_replicates(point, root, services) for point in points]
        compiled = [
            {axis.key: point.values[axis.key] for axis in axes if axis.recompiles} for point in points
        ]
        targets = [(json.dumps(key), targets_of(made)) for key, made in zip(compiled, replicates)]
        outcomes = execute_points(targets, most=most, on_group=groups.append)
        results = _results(config_path, points, axes, replicates, outcomes, folder, services)
    results |= {
        "notes": notes,
        "together": {"most": most, "groups": groups},
        "seconds": time.monotonic() - started,
    }
    files = {"sweep": folder / "sweep.json", "report": folder / "report" / "index.html"}
    if distributed.is_main():
        write_json(files["sweep"], results)
        files["report"].parent.mkdir(parents=True, exist_ok=True)
        files["report"].write_text(page(results))
    status = 1 if any(outcome.artifact is None for outcome in outcomes.values()) else 0
    if as_json:
        return status, json.dumps(results)
    return status, table_text(results, width) + "".join(f"{name}: {path}\n" for name, path in files.items())


def _announce(points: Sequence[Point], axes: Sequence[Axis], most: int, why: str) -> list[str]:
    """What a person should know before it starts; in the log, and under the table."""
    notes = [
        f"`{axis.key}` is compiled in: each of its {len(axis.values)} values has programs of its own, built once"
        for axis in axes
        if axis.recompiles
    ]
    for note in notes:
        logger.info("%s", note)
    how = "one by one" if most == 1 else f"up to {most} models train together"
    logger.info("%d points; %s (%s)", len(points), how, why)
    return notes


def _replicates(point: Point, root: epath.Path, services: Services) -> list[Replicate]:
    own = _PointServices(point.config, root, services)
    seeds = range(point.config.seed, point.config.seed + point.config.seeds)
    return [build(StudyContext(config=point.config, root=root, seed=s, services=own)) for s in seeds]


def _results(
    config_path: str,
    points: Sequence[Point],
    axes: Sequence[Axis],
    replicates: Sequence[Sequence[Replicate]],
    outcomes: Mapping[Node, Outcome],
    folder: epath.Path,
    services: Services,
) -> dict[str, Any]:
    """Writes each point's results, and gathers the sweep's."""
    found, listed, warnings = [], [], []
    for point, made in zip(points, replicates, strict=True):
        mine = {node: outcomes[node] for node in ordered(targets_of(made))}
        errors = [f"{node.name}: {o.error}" for node, o in mine.items() if o.artifact is None]
        place = folder / point.folder
        if distributed.is_main():
            place.mkdir(parents=True, exist_ok=True)
            (place / "config.yaml").write_text(dump_config(point.config))
            written = write_results(place, point.config, config_path, made, mine, None, services)
            found.append((point, written))
        warnings += [f"{point.label}: {error}" for error in errors[:1]]
        listed.append(
            {
                "label": point.label,
                "values": dict(point.values),
                "folder": point.folder,
                "status": "failed" if errors else "done",
            }
        )
    base = points[0].config
    return {
        "kind": "sweep",
        "name": base.name,
        "scale": base.scale,
        "axes": [axis.key for axis in axes],
        "points": listed,
        "rows": summarise(found),
        "verdicts": [_verdict(listed)],
        "warnings": warnings,
        "settings": {"configuration": config_path, "scale": base.scale}
        | {axis.key: json.dumps(axis.values) for axis in axes}
        | {f"version: {name}": version for name, version in versions().items()},
    }


def _verdict(points: Sequence[Mapping[str, Any]]) -> str:
    done = sum(point["status"] == "done" for point in points)
    return f"{done} of {len(points)} points are finished."
