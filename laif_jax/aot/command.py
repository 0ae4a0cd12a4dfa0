"""`laif compile`: what is printed, and what is written."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laif_jax.aot import compiling, report
from laif_jax.aot.programs import STAGES, NoStageError, Program, stages_of
from laif_jax.config import RunConfig, load_config
from laif_jax.config.load import describes
from laif_jax.training import executables


def run_compile(
    config_path: str,
    overrides: Sequence[str] = (),
    *,
    topology: str | None = None,
    stages: Sequence[str] = (),
    as_json: bool = False,
    searches: bool = False,
    save: str | None = None,
    prices: str | None = None,
    estimates: bool = False,
) -> tuple[int, str]:
    """Compiles stages of a configuration.

    Args:
      topology: a slice such as `v5e-16`; None: the devices of this machine. stages: none: all that the file has.
      as_json: one JSON object. searches: look for the largest batch and the cheapest rematerialisation instead.
      save: a folder for the executables. prices: another file like `chips.yaml`. estimates: compile nothing, as where
        there is no TPU compiler.

    Returns:
      (exit status: 0 if all fits, 1 if not, what to print).
    """
    config = load_config(config_path, overrides, describes(config_path))
    chosen = list(stages) or stages_of(config)
    if not chosen:
        raise NoStageError(f"{config_path} has none of the stages {', '.join(STAGES)}")
    where = compiling.target(config, topology, prices, estimate=estimates)
    if searches:
        return _search(config, where, chosen, as_json)
    keep = _Keeper(save, where) if save else None
    found = compiling.compile_stages(config, where, chosen, keep)
    status = 0 if all(stage.fits for stage in found) else 1
    head = _head(config, where)
    if as_json:
        return status, json.dumps(head | {"stages": {stage.stage: stage.to_json() for stage in found}})
    text = report.table(found, _title(head))
    if keep is not None:
        text += f"\n\n{len(keep.files)} executables in {save}. On the pod: {executables.FOLDER}={save} laif run ..."
    return status, text


class _Keeper:
    """Writes executables that the training loop takes (those of a train step)."""

    def __init__(self, folder: str, where: compiling.Target):
        if where.estimate:
            raise NoStageError("`--save` needs a compiler for the slice: pip install 'laif_jax[aot]'")
        self.folder, self.devices, self.files = folder, where.mesh.devices.flat, list[Path]()

    def __call__(self, stage: str, program: Program, compiled: Any) -> None:
        lower = getattr(program.function, "lower", None)
        if program.name == "train" and lower is not None:
            name = executables.key(lower(*program.args), self.devices)
            self.files.append(executables.save(compiled, name, self.folder))


def _head(config: RunConfig, where: compiling.Target) -> dict[str, Any]:
    mesh = {name: size for name, size in where.mesh.shape.items() if size > 1} or {"devices": 1}
    return {
        "config": config.name,
        "model": config.model.source,
        "topology": where.name,
        "chips": where.chips,
        "chip": where.chip.name,
        "mesh": mesh,
        "price_per_chip_hour": where.chip.price,
        "priced": where.chip.priced,
    }


def _title(head: dict[str, Any]) -> str:
    mesh = ", ".join(f"{name} {size}" for name, size in head["mesh"].items())
    return (
        f"{head['config']}: {head['model']} on {head['topology']} ({head['chips']} x {head['chip']}; {mesh})"
    )


def _search(
    config: RunConfig, where: compiling.Target, stages: Sequence[str], as_json: bool
) -> tuple[int, str]:
    found: dict[str, Any] = {}
    lines = [_title(_head(config, where)), ""]
    for stage in stages:
        attempts = compiling.search(config, where, stage)
        choice = compiling.best(attempts)
        rows: list[dict[str, Any]] = [
            {
                "micro_batch": attempt.micro_batch,
                "remat": attempt.remat,
                "fits": attempt.report.fits,
                "peak_bytes": max(p.peak_bytes for p in attempt.report.programs),
                "examples_per_second_bound": attempt.report.examples_per_second,
            }
            for attempt in attempts
        ]
        found[stage] = {
            "best": None if choice is None else {"micro_batch": choice.micro_batch, "remat": choice.remat},
            "attempts": rows,
        }
        lines += [f"{stage}:"] + [
            f"  micro_batch {row['micro_batch']:>6}  remat {row['remat']:<5} "
            + (f"fits, peak {row['peak_bytes'] / 1e9:.2f} GB, " if row["fits"] else "does not fit")
            + (f"at best {row['examples_per_second_bound']:.3g} examples/s" if row["fits"] else "")
            for row in rows
        ]
        lines.append(
            "  nothing fits"
            if choice is None
            else f"  best: micro_batch: {choice.micro_batch}, model.remat: {choice.remat}"
        )
    status = 0 if all(row["best"] for row in found.values()) else 1
    return status, json.dumps(_head(config, where) | {"stages": found}) if as_json else "\n".join(lines)
