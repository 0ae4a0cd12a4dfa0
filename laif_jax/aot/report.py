"""What is said about a program: its memory, its work, the bound on its time, its price; for people and as JSON."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from laif_jax.aot.topologies import Chip


@dataclass(frozen=True)
class ProgramReport:
    """One compiled program, per chip.

    Attributes:
      fits: whether the compiler could place it. estimate: not compiled for this chip; arguments are exact, the rest is
        a rule of thumb. problem: why it does not fit.
      argument_bytes, temp_bytes: as XLA reports them. peak_bytes: the most that lies in memory at a time, arguments and
        what lies beside them (`resident_bytes`) included. hbm_bytes: of the chip.
      flops, bytes_accessed: XLA's cost analysis of the executable, which counts the body of a loop once (as other tools
        print it). step_flops, step_bytes: per run, with the trips of loops and the work of kernels.
      model_flops: of the model alone, without recomputation.
      collectives: per kind `count`, `runs` and `bytes` sent by one chip per run.
      seconds: `compute`, `memory` and `network`, the least time that each takes; the largest is the bound.
      compile_seconds: on this machine.
    """

    name: str
    fits: bool
    estimate: bool = False
    problem: str = ""
    argument_bytes: float = 0.0
    temp_bytes: float = 0.0
    resident_bytes: float = 0.0
    peak_bytes: float = 0.0
    hbm_bytes: float = 0.0
    flops: float = 0.0
    bytes_accessed: float = 0.0
    step_flops: float = 0.0
    step_bytes: float = 0.0
    model_flops: float = 0.0
    collectives: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    repeat: int = 1
    examples: float = 0.0
    compile_seconds: float = 0.0

    @property
    def bound(self) -> float:
        """Seconds that one run takes at least."""
        return max(self.seconds.values(), default=0.0)


@dataclass(frozen=True)
class StageReport:
    """A stage: its programs, and their sum over one step (one update, one iteration of PPO, one batch of samples)."""

    stage: str
    programs: tuple[ProgramReport, ...]
    chip: Chip
    chips: int

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs)

    @property
    def step_seconds(self) -> float:
        return sum(program.bound * program.repeat for program in self.programs)

    @property
    def mfu(self) -> float:
        work = sum(program.model_flops * program.repeat for program in self.programs)
        return work / (self.step_seconds * self.chip.flops) if self.step_seconds else 0.0

    @property
    def examples_per_second(self) -> float:
        examples = max((program.examples for program in self.programs), default=0.0)
        return examples / self.step_seconds if self.step_seconds else 0.0

    @property
    def examples_per_dollar(self) -> float | None:
        """Examples for one dollar of chips at the bound on speed."""
        if not self.chip.price or not self.step_seconds:
            return None
        return self.examples_per_second * 3600.0 / (self.chip.price * self.chips)

    def to_json(self) -> dict[str, Any]:
        """The sum over programs where times and work add up, the largest where they share memory."""
        most = lambda name: max((getattr(p, name) for p in self.programs), default=0.0)  # noqa: E731
        total = lambda name: sum(getattr(p, name) * p.repeat for p in self.programs)  # noqa: E731
        return {
            "fits": self.fits,
            "estimate": any(program.estimate for program in self.programs),
            **{name: _whole(most(name)) for name in _LARGEST},
            **{name: _whole(total(name)) for name in _ADDED},
            "collectives": add_collectives(self.programs),
            "step_seconds_bound": self.step_seconds,
            "mfu_bound": self.mfu,
            "examples_per_second_bound": self.examples_per_second,
            "examples_per_dollar_bound": self.examples_per_dollar,
            "programs": [dataclasses.asdict(program) for program in self.programs],
        }


_LARGEST = ("argument_bytes", "temp_bytes", "peak_bytes", "hbm_bytes")
_ADDED = ("flops", "bytes_accessed", "step_flops", "step_bytes")


def add_collectives(programs: Sequence[ProgramReport]) -> dict[str, dict[str, float]]:
    """Per kind, over all programs of a step."""
    found: dict[str, dict[str, float]] = {}
    for program in programs:
        for kind, row in program.collectives.items():
            mine = found.setdefault(kind, {"count": 0, "runs": 0, "bytes": 0.0})
            mine["count"] += row["count"]
            mine["runs"] += row["runs"] * program.repeat
            mine["bytes"] += row["bytes"] * program.repeat
    return found


def _whole(value: float) -> float:
    return int(value) if math.isfinite(value) else value


# ---- for people --------------------------------------------------------------------------------------------------


def table(reports: Sequence[StageReport], title: str) -> str:
    """All stages as text, one line per program, and what the columns say."""
    head = ("stage", "program", "fits", "arguments", "temporaries", "peak", "of", "TFLOP", "GB moved", "network GB",
            "bound", "by", "MFU")  # fmt: skip
    rows = [head]
    for report in reports:
        for program in report.programs:
            rows.append((report.stage, program.name, *_cells(program, report.chip)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [title, ""]
    for number, row in enumerate(rows):
        cells = (cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        lines.append("  ".join(cells).rstrip())
        lines += ["  ".join("-" * w for w in widths)] if number == 0 else []
    lines.append("")
    for report in reports:
        lines.append(_sentence(report))
        lines += [f"  {p.name} does not fit: {p.problem}" for p in report.programs if not p.fits]
    if any(program.estimate for report in reports for program in report.programs):
        lines += ["", _ESTIMATE]
    return "\n".join([*lines, "", _LEGEND])


_ESTIMATE = (
    "ESTIMATE: nothing was compiled for this chip; pip install 'laif_jax[aot]' brings its compiler. Arguments and "
    "FLOPs are exact; temporaries are a rule of thumb, and what goes over the network is not known."
)
_LEGEND = (
    "Per chip; GB = 1e9 bytes. bound: no run can be faster, real ones are slower. TFLOP, GB moved and network GB are "
    "of one run, with the trips of its loops."
)


def _cells(program: ProgramReport, chip: Chip) -> tuple[str, ...]:
    gb = lambda value: f"{value / 1e9:.2f}"  # noqa: E731
    sent = sum(row["bytes"] for row in program.collectives.values())
    by = max(program.seconds, key=lambda name: program.seconds[name]) if program.seconds else "-"
    bound = program.bound
    mfu = f"{program.model_flops / (bound * chip.flops):.0%}" if bound else "-"
    return (
        "yes" if program.fits else "NO",
        gb(program.argument_bytes),
        gb(program.temp_bytes),
        gb(program.peak_bytes),
        gb(program.hbm_bytes),
        f"{program.step_flops / 1e12:.2f}",
        gb(program.step_bytes),
        gb(sent),
        _seconds(bound),
        by,
        mfu,
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _sentence(report: StageReport) -> str:
    text = f"{report.stage}: at best {_seconds(report.step_seconds)} per step, MFU {report.mfu:.0%}, "
    text += f"{report.examples_per_second:.3g} examples/s"
    price = report.examples_per_dollar
    if price is not None and report.chip.price:
        hour = report.chip.price * report.chips
        text += f", {price:.3g} examples per dollar ({report.chips} chips, {hour:.2f} USD per hour)"
    return text
