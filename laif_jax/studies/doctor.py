"""`laif doctor`: what is here, and what of a configuration will be slow or will fail here, in plain words.

It must run where the rest does not. So this module and those of its probes import nothing but the standard library at
their top; each probe runs alone, and one that cannot run is a finding itself; what JAX finds is asked of a child
process, which may hang or die.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Level = Literal["fails", "slow", "note"]
Facts = dict[str, Any]
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that the user should know.

    Attributes:
      level: "fails": a run will not work; "slow": it will, but wastes time or memory; "note": good to know.
      about: the probe. what: in plain words, with the numbers. do: what to do about it.
    """

    level: Level
    about: str
    what: str
    do: str = ""


@dataclasses.dataclass
class Here:
    """The machine that is looked at; tests give others.

    Attributes:
      root: of the file system, for what the kernel tells. timeout: seconds for JAX to find its devices.
    """

    root: Path = Path("/")
    environ: Mapping[str, str] = dataclasses.field(default_factory=lambda: os.environ)
    timeout: float = 120.0
    python: str = sys.executable

    def read(self, path: str) -> str | None:
        """A small file's text, or None if there is none."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return None

    def child(self, code: Sequence[str]) -> tuple[int | None, str, str]:
        """(exit code or None if it did not end in time, output, errors) of Python with `code` as its arguments."""
        try:
            done = subprocess.run(
                [self.python, *code],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout,
                env=dict(self.environ),
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            return None, "", ""
        return done.returncode, done.stdout, done.stderr


@dataclasses.dataclass
class Report:
    """What was found. `facts`: one entry per probe, JSON; `findings`: the worst first."""

    facts: Facts
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether nothing will fail."""
        return not any(finding.level == "fails" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **self.facts, "findings": [dataclasses.asdict(item) for item in self.findings]}

    def text(self) -> str:
        """For a person: a line per fact, then the findings."""
        lines = []
        for about, facts in self.facts.items():
            lines += [f"{about + ':' if not i else '':<10}{line}" for i, line in enumerate(_lines(facts))]
        for level, title in (
            ("fails", "Will fail here"),
            ("slow", "Will be slow here"),
            ("note", "Good to know"),
        ):
            chosen = [item for item in self.findings if item.level == level]
            lines += ["", f"{title}:"] if chosen else []
            for item in chosen:
                lines += [f"  - {item.what}"] + ([f"    -> {item.do}"] if item.do else [])
        verdict = "Nothing here will fail." if self.ok else "Something here will fail; see above."
        return "\n".join([*lines, "", verdict])


Found = tuple[Facts, list[Finding]]


def examine(config: str | None = None, overrides: Sequence[str] = (), here: Here | None = None) -> Report:
    """Looks at this machine, and at a configuration on it.

    Args:
      config: a YAML file of any kind that `laif` runs; None: the machine alone. overrides: `key=value`.

    Returns:
      The report. Nothing is raised for what is wrong with the machine, the installation or the configuration.
    """
    from laif_jax.studies import doctor_config, doctor_machine

    here = here or Here()
    probes = {name: functools.partial(probe, here) for name, probe in doctor_machine.PROBES.items()}
    # Beside each other: two of them wait for child processes.
    with concurrent.futures.ThreadPoolExecutor(len(probes)) as pool:
        found = dict(zip(probes, pool.map(isolated, probes, probes.values())))
    facts = {name: facts for name, (facts, _) in found.items()}
    findings = [finding for _, some in found.values() for finding in some]
    if config is not None:
        for name, (more, some) in doctor_config.examine(config, overrides, here, facts).items():
            facts[name] = facts.get(name, {}) | more
            findings += some
    order = ("fails", "slow", "note")
    return Report(facts, sorted(dict.fromkeys(findings), key=lambda item: order.index(item.level)))


def isolated(name: str, probe: Callable[[], Found]) -> Found:
    """What a probe finds; where it cannot run, that."""
    try:
        return probe()
    except (Exception, SystemExit) as error:  # noqa: BLE001 (a half-broken installation can raise anything)
        what = f"the check of {name} could not be made: {type(error).__name__}: {_first_line(error)}"
        return {}, [Finding("fails", name, what, "mend what it says; reinstalling the package may do that")]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _lines(facts: Facts) -> list[str]:
    """Facts as words, in lines that fit a terminal."""
    words = [shown for key, value in facts.items() if (shown := _shown(key, value))]
    return (
        textwrap.wrap(", ".join(words), 100, break_long_words=False, break_on_hyphens=False) if words else []
    )


def _shown(key: str, value: Any) -> str:
    if value is None or value == {} or value == []:
        return ""
    if key.endswith("_bytes"):
        return f"{key.removesuffix('_bytes').replace('_', ' ')} {gib(value)}"
    if isinstance(value, dict):
        value = " x ".join(f"{name}={size}" for name, size in value.items())
    elif isinstance(value, list):
        value = " ".join(str(item) for item in value)
    return f"{key.replace('_', ' ')} {value}"


def gib(count: float) -> str:
    """Bytes as GiB, or MiB where that says more."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.1f} MiB"


def show(report: Report, *, as_json: bool) -> str:
    """The report as `laif doctor` prints it."""
    return json.dumps(report.to_json(), indent=1) if as_json else report.text()
