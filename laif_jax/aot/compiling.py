"""From a configuration and a slice to a report: compiles each program of each stage, or estimates it."""

import dataclasses
import functools
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from laif_jax.aot import hlo, programs, topologies
from laif_jax.aot.flops import flops_per_chip
from laif_jax.aot.programs import AnyMesh, Program
from laif_jax.aot.report import ProgramReport, StageReport
from laif_jax.aot.topologies import Chip
from laif_jax.config import RunConfig
from laif_jax.parallel.mesh import set_libtpu_args
from laif_jax.training.rows import check_rows

log = logging.getLogger(__name__)
Keep = Callable[[str, Program, Any], None]


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compiled for. `mesh`: of devices that can be compiled for, or abstract, which makes it an estimate."""

    name: str
    mesh: AnyMesh
    chip: Chip

    @property
    def chips(self) -> int:
        return topologies.chips_of(self.mesh)

    @property
    def estimate(self) -> bool:
        return not isinstance(self.mesh, Mesh)


def target(
    config: RunConfig, topology: str | None, prices: str | None = None, *, estimate: bool = False
) -> Target:
    """The slice that is named, or the devices of this machine; `estimate`: without its devices.

    Raises:
      TopologyError, MeshError: before anything is compiled.
    """
    set_libtpu_args(config.mesh)
    if topology is None and estimate:
        raise topologies.TopologyError("an estimate is of a slice: give --topology, such as v5e-16")
    if topology is None:
        mesh = topologies.local_mesh(config.mesh)
        return Target("this machine", mesh, _local_chip(mesh, prices))
    found = topologies.parse_slice(topology)
    chip = topologies.read_chip(found.kind, prices)
    if topologies.has_tpu_compiler() and not estimate:
        return Target(topology, topologies.lay_mesh(config.mesh, found), chip)
    if not estimate:
        log.warning("libtpu is not installed: figures for %s are estimates", topology)
    return Target(topology, topologies.abstract_mesh(config.mesh, found), chip)


def _local_chip(mesh: Mesh, prices: str | None) -> Chip:
    """What is known of this machine's devices; their memory as they report it."""
    device = mesh.devices.flat[0]
    stats = device.memory_stats() or {}
    limit = float(stats.get("bytes_limit", 0.0))
    try:
        chip = topologies.read_chip(device.device_kind, prices)
    except topologies.TopologyError:
        nothing = float("nan")
        return Chip(device.device_kind, device.device_kind, limit, nothing, nothing, nothing, None, "")
    return dataclasses.replace(chip, hbm=limit or chip.hbm)


def compile_stages(
    config: RunConfig, where: Target, stages: Sequence[str], keep: Keep | None = None
) -> list[StageReport]:
    """Compiles the stages one after the other.

    Args:
      keep: called with (stage, program, compiled) of each program that fits.

    Raises:
      NoStageError, MeshError: a stage that the configuration has not, batches that do not divide over the mesh; before
        anything is compiled.
    """
    check_rows({stage: programs.section(config, stage) for stage in stages if stage != "sample"}, where.mesh)
    return [compile_stage(config, where, stage, keep) for stage in stages]


def compile_stage(config: RunConfig, where: Target, stage: str, keep: Keep | None = None) -> StageReport:
    """Compiles the programs of one stage."""
    found = []
    previous: Any = None
    for program in programs.BUILDERS[stage](config, where.mesh):
        program = _follow(program, previous)
        report, previous = compile_program(program, where)
        found.append(report)
        if keep is not None and previous is not None:
            keep(stage, program, previous)
    return StageReport(stage, tuple(found), where.chip, where.chips)


def _follow(program: Program, previous: Any) -> Program:
    """Decoding takes over the state that prefill leaves, laid as its compiler chose."""
    if program.name != "decode" or previous is None:
        return program
    params, state, *rest = program.args
    places = previous.output_shardings
    state = jax.tree.map(lambda x, place: programs.struct(x.shape, x.dtype, place), state, places)
    return dataclasses.replace(program, args=(params, state, *rest))


def compile_program(program: Program, where: Target) -> tuple[ProgramReport, Any]:
    """(report, the executable or None)."""
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(where.mesh.abstract_mesh):  # no array can be put on these devices
        traced = program.function.trace(*program.args)
    work = flops_per_chip(traced.jaxpr, where.chips, unknown_trips=program.trips)
    given = programs.bytes_per_chip(program.args)
    base = ProgramReport(
        program.name,
        fits=True,
        argument_bytes=given,
        resident_bytes=program.resident,
        hbm_bytes=where.chip.hbm,
        step_flops=work,
        model_flops=program.model_flops / where.chips,
        repeat=program.repeat,
        examples=program.examples,
    )
    if where.estimate:
        return _estimated(base, program, where), None
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _refused(base, program, str(error), time.perf_counter() - start), None
    return _measured(base, program, compiled, where, time.perf_counter() - start), compiled


def is_out_of_memory(error: Exception) -> bool:
    """Whether a compiler gave up because the program does not fit the chip."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text or "out of memory" in text


_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def _refused(base: ProgramReport, program: Program, text: str, seconds: float) -> ProgramReport:
    """What the compiler's refusal tells of a program that does not fit."""
    sizes = [float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([KMGB])\b", text)]
    needed = max(sizes, default=math.nan)
    line = next((line for line in text.splitlines() if "emory" in line), text).strip()
    temporaries = needed if "temporaries" in line else max(needed - base.argument_bytes, 0.0)
    return dataclasses.replace(
        base,
        fits=False,
        problem=line.removeprefix("RESOURCE_EXHAUSTED: "),
        temp_bytes=temporaries,
        peak_bytes=base.argument_bytes + temporaries + program.resident,
        compile_seconds=seconds,
    )


def _measured(
    base: ProgramReport, program: Program, compiled: Any, where: Target, seconds: float
) -> ProgramReport:
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    module = hlo.parse(compiled.as_text())
    once = hlo.memory_traffic(module, with_trips=False)
    moved = float(cost.get("bytes accessed", 0.0))
    # XLA knows better what an instruction touches, the text how often it runs.
    moved_in_all = moved * hlo.memory_traffic(module, unknown=program.trips) / once if once else moved
    peak = float(getattr(memory, "peak_memory_in_bytes", 0) or 0)
    peak = peak or float(memory.argument_size_in_bytes + memory.temp_size_in_bytes)
    peak += program.resident - program.shared
    sent = _grouped(hlo.collectives(module, program.trips))
    report = dataclasses.replace(
        base,
        argument_bytes=float(memory.argument_size_in_bytes) - program.shared,
        temp_bytes=float(memory.temp_size_in_bytes),
        peak_bytes=peak,
        flops=float(cost.get("flops", 0.0)),
        bytes_accessed=moved,
        step_bytes=moved_in_all,
        collectives=sent,
        compile_seconds=seconds,
    )
    if base.hbm_bytes and peak > base.hbm_bytes:
        held = f"{program.resident / 1e9:.2f} GB that lie beside it" if program.resident else "its arguments"
        text = f"it takes {peak / 1e9:.2f} GB with {held}; a chip has {base.hbm_bytes / 1e9:.2f} GB"
        report = dataclasses.replace(report, fits=False, problem=text)
    return dataclasses.replace(report, seconds=_bounds(report, where.chip))


def _grouped(found: Sequence[hlo.Collective]) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for each in found:
        row = rows.setdefault(each.op, {"count": 0, "runs": 0, "bytes": 0.0})
        row["count"] += 1
        row["runs"] += each.runs
        row["bytes"] += each.bytes * each.runs
    return rows


def _bounds(report: ProgramReport, chip: Chip) -> dict[str, float]:
    """Seconds of compute, memory and network, if each went at the chip's full speed."""
    sent = sum(row["bytes"] for row in report.collectives.values())
    times = {
        "compute": report.step_flops / chip.flops,
        "memory": report.step_bytes / chip.bandwidth,
        "network": sent / chip.ici,
    }
    return {name: seconds for name, seconds in times.items() if math.isfinite(seconds)}


def _estimated(base: ProgramReport, program: Program, where: Target) -> ProgramReport:
    """Without the chip's compiler. Temporaries: the gradients, what the backward pass keeps, and as much again as the
    largest parameter of a layer needs when it is brought together, eight times (weights and activations at work)."""
    leaves = [x for x in jax.tree.leaves(program.args) if hasattr(x, "shape")]
    largest = max((math.prod(x.shape[1:]) * 2.0 for x in leaves if len(x.shape) > 2), default=0.0)
    temporaries = program.grads + program.saved + 8.0 * largest if program.grads else 8.0 * largest
    given = base.argument_bytes - program.shared
    peak = given + temporaries + program.resident
    fits = peak <= base.hbm_bytes
    report = dataclasses.replace(
        base,
        estimate=True,
        fits=fits,
        problem="" if fits else f"about {peak / 1e9:.1f} GB; a chip has {base.hbm_bytes / 1e9:.1f} GB",
        argument_bytes=given,
        temp_bytes=temporaries,
        peak_bytes=peak,
        step_bytes=2.0 * (given + temporaries),
    )
    return dataclasses.replace(report, seconds=_bounds(report, where.chip))


# ---- search ------------------------------------------------------------------------------------------------------

REMATS = ("none", "dots", "full")  # from the one that recomputes least


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One setting of a search: rows of a forward pass over all chips, and what the backward pass recomputes."""

    micro_batch: int
    remat: str
    report: StageReport


def search(config: RunConfig, where: Target, stage: str, *, largest: int = 1 << 16) -> list[Attempt]:
    """The largest micro-batch that fits, and of the settings that fit it the cheapest rematerialisation.

    With full rematerialisation the micro-batch is doubled until it does not fit; then `none` and `dots` are tried at
    the largest that did, and at half of it where they do not.

    Returns:
      All attempts; `best` picks one.
    """
    section = {"sample": "sampling"}.get(stage, stage)
    spec = programs.section(config, section)
    step = programs.row_parts(where.mesh)
    attempts: list[Attempt] = []

    def attempt(micro: int, remat: str) -> bool:
        report = compile_stage(_with(config, section, spec, micro, remat), where, stage)
        attempts.append(Attempt(micro, remat, report))
        log.info(
            "%s: micro_batch %d, remat %s: %s", stage, micro, remat, "fits" if report.fits else "does not fit"
        )
        return report.fits

    micro = step
    while micro <= largest and attempt(micro, "full"):
        micro *= 2
    micro //= 2
    if stage == "sample" or micro < step:
        return attempts
    for remat in REMATS[:-1]:
        size = micro
        while size >= max(step, micro // 4) and not attempt(size, remat):
            size //= 2
    return attempts


def _with(config: RunConfig, section: str, spec: Any, micro: int, remat: str) -> RunConfig:
    """The configuration with another micro-batch and rematerialisation; the batch grows to hold the micro-batch."""
    if section == "sampling":
        update = {"batch_size": micro}
    elif section == "ppo":
        rows = max(spec.batch_size, micro * spec.minibatches // spec.sampling.samples)
        rows += -rows % (micro * spec.minibatches)
        update = {"micro_batch": micro, "batch_size": rows}
    else:
        update = {"micro_batch": micro, "batch_size": max(micro, spec.batch_size - spec.batch_size % micro)}
    model = config.model.model_copy(update={"remat": remat})
    return config.model_copy(update={section: spec.model_copy(update=update), "model": model})


def best(attempts: Sequence[Attempt]) -> Attempt | None:
    """Of what fits, the setting with the most examples per second at the bound; of equal ones the larger batch."""
    fitting = [attempt for attempt in attempts if attempt.report.fits]
    if not fitting:
        return None
    return max(fitting, key=functools.cmp_to_key(_compare))


def _compare(a: Attempt, b: Attempt) -> int:
    left, right = ((x.report.examples_per_second, x.micro_batch) for x in (a, b))
    return (left > right) - (left < right)
