"""What `laif doctor` looks at on a machine: Python and packages, devices, memory, disk, and settings that slow JAX."""

import importlib.metadata as metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from laif_jax.studies.doctor import GIB, Facts, Finding, Found, Here, gib
from laif_jax.studies.doctor_devices import MARK

OLDEST = (3, 11)
# What a report names; that they fit each other is checked for all that they ask for.
STACK = (
    "laif_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "transformers",
    "tokenizers",
)
PLUGINS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
IMPORTED = (
    "jax flax.linen optax orbax.checkpoint grain tensorstore numpy transformers tokenizers safetensors etils.epath "
    "pydantic yaml httpx"
)
GOOGLE = "0x1ae0"  # PCI vendor of TPUs
NVIDIA = "0x10de"

# ---- python and packages ---------------------------------------------------------------------------------------


def versions(here: Here) -> Found:
    """Installed versions; every requirement between them that is not met."""
    findings = []
    if sys.version_info < OLDEST:
        what = f"Python {platform.python_version()} is too old: 3.11 or newer is needed"
        findings.append(
            Finding("fails", "versions", what, "make a new environment with python3.11 or python3.12")
        )
    installed = {name: version for name in (*STACK, *PLUGINS) if (version := _version(name))}
    findings += _unmet(installed, _hardware(here))
    return {"python": platform.python_version(), **installed}, findings


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _unmet(installed: dict[str, str], hardware: dict[str, int]) -> Iterator[Finding]:
    """What packages ask of each other and do not get. Of JAX also what it asks of the plugins that are installed."""
    from packaging.requirements import Requirement

    for name in installed:
        for needs in map(Requirement, metadata.requires(name) or ()):
            extra = _extra(needs.marker)
            if extra is None or (extra and not (name == "jax" and needs.name in PLUGINS)):
                continue
            found = _version(needs.name)
            wants = f"{name} {installed[name]} needs {needs.name}{needs.specifier}"
            mine = {"tpu": ".[tpu]", "cuda12": ".[cuda]", "cuda13": ".[cuda]"}.get(extra, ".")
            again = f'install again: pip install -e "{mine}"'
            # A plugin without its chips here is not used (libtpu alone serves `laif compile`).
            used = hardware[{"tpu": "TPU chips"}.get(extra, "NVIDIA GPUs")] if extra else 1
            if found is None and not extra:
                yield Finding("fails", "versions", f"{wants}, which is not installed", again)
            elif found is not None and not needs.specifier.contains(found, prereleases=True):
                yield Finding(
                    "fails" if used else "note", "versions", f"{wants}; {found} is installed", again
                )


def _extra(marker: Any) -> str | None:
    """Which extra a requirement belongs to: "" for none, None for one that does not matter here."""
    if marker is None:
        return ""
    return next(
        (extra for extra in ("", "tpu", "cuda12", "cuda13") if marker.evaluate({"extra": extra})), None
    )


def imports(here: Here) -> Found:
    """Packages that are installed but cannot be imported. Each in turn, in a child process."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try: importlib.import_module(name)\n"
        "    except BaseException as error:\n"
        "        text = (str(error).strip().splitlines() or [''])[0]\n"
        "        print(f'{name}\\t{type(error).__name__}: {text}')\n"
    )
    names = IMPORTED.split()
    status, out, err = here.child(["-c", code, *names])
    if status is None:
        what = f"importing the packages took more than {here.timeout:g} s"
        return {}, [
            Finding(
                "slow", "imports", what, "is the environment on a slow network disk? Put it on a local one"
            )
        ]
    findings = [
        Finding(
            "fails", "imports", "`import {}` fails: {}".format(*line.split("\t", 1)), "reinstall that package"
        )
        for line in out.splitlines()
        if "\t" in line
    ]
    if status != 0 and not findings:
        what = f"importing the packages killed Python (exit code {status}): {_last_line(err)}"
        findings.append(Finding("fails", "imports", what, "reinstall into a new environment"))
    return {"packages": f"{len(names) - len(findings)} of {len(names)} can be imported"}, findings


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1][:300]


# ---- devices ---------------------------------------------------------------------------------------------------


def devices(here: Here) -> Found:
    """What JAX finds, and whether that is what the machine has."""
    status, out, err = here.child(["-m", "laif_jax.studies.doctor_devices"])
    hardware = _hardware(here)
    facts: Facts = {"in_the_machine": [f"{count} {name}" for name, count in hardware.items() if count]}
    line = next((line for line in out.splitlines() if line.startswith(MARK)), None)
    if status is None:
        return facts, [
            Finding("fails", "devices", f"JAX found no device within {here.timeout:g} s", _WAITING)
        ]
    if line is None:
        what = f"JAX cannot use the devices (exit code {status}): {_last_line(err)}"
        return facts, [Finding("fails", "devices", what, _advice(err, hardware))]
    facts |= json.loads(line.removeprefix(MARK))
    return facts, list(_unused_hardware(here, facts, hardware)) + list(_simulated(here, facts))


_WAITING = (
    "another process may hold the chips (end it), or this is one host of several: start it on all of them at once, as "
    "launch/tpu_pod.sh does"
)


def _hardware(here: Here) -> dict[str, int]:
    """Accelerators on the PCI bus: {"TPU chips": n, "NVIDIA GPUs": m}."""
    vendors: dict[str, int] = {}
    folder = here.root / "sys/bus/pci/devices"
    for device in sorted(folder.iterdir()) if folder.is_dir() else ():
        vendor, kind = (
            (device / name).read_text().strip() if (device / name).is_file() else ""
            for name in ("vendor", "class")
        )
        # A GPU is a display or 3D controller; the same vendor makes bridges and network cards.
        if vendor == GOOGLE or (vendor == NVIDIA and kind.startswith("0x03")):
            vendors[vendor] = vendors.get(vendor, 0) + 1
    chips = len(list((here.root / "dev").glob("accel[0-9]*"))) or len(
        list((here.root / "dev/vfio").glob("[0-9]*"))
    )
    # A Google VM without TPUs has Google's network and disk devices; chips show themselves under /dev too.
    return {"TPU chips": chips if GOOGLE in vendors else 0, "NVIDIA GPUs": vendors.get(NVIDIA, 0)}


def _unused_hardware(here: Here, facts: Facts, hardware: dict[str, int]) -> Iterator[Finding]:
    chosen = here.environ.get("JAX_PLATFORMS", "")
    for name, platforms, extra in (("TPU chips", ("tpu",), "tpu"), ("NVIDIA GPUs", ("gpu", "cuda"), "cuda")):
        if not hardware[name] or facts["platform"] in platforms:
            continue
        if chosen and not set(chosen.split(",")) & {*platforms, "cuda"}:
            do = f"JAX_PLATFORMS={chosen} keeps JAX from them; unset it to use them"
            yield Finding("slow", "devices", f"{hardware[name]} {name} are not used", do)
        else:
            do = f'install JAX for them: pip install -e ".[{extra}]"'
            yield Finding(
                "slow",
                "devices",
                f"{hardware[name]} {name} are not used: JAX finds {facts['platform']} only",
                do,
            )


def _simulated(here: Here, facts: Facts) -> Iterator[Finding]:
    if facts["platform"] == "cpu" and facts["count"] > facts["processes"]:
        what = f"the {facts['count']} devices are simulated on the CPU: good for trying a mesh, not for speed"
        yield Finding("note", "devices", what, "unset XLA_FLAGS (or JAX_NUM_CPU_DEVICES) for a real run")
    if facts["platform"] == "cpu" and not facts["in_the_machine"]:
        what = "there is no accelerator: models above about 0.2e9 parameters are not practical here"
        yield Finding("slow", "devices", what)


def _advice(err: str, hardware: dict[str, int]) -> str:
    if "already in use" in err or ("libtpu" in err and "lock" in err.lower()):
        return "another process holds the chips: end it; sudo lsof /dev/accel* /dev/vfio/* names it"
    if "DistributedError" in err or "coordinator" in err:
        return (
            "the other processes of the run were not found: start this on every host, with the same settings"
        )
    if hardware["NVIDIA GPUs"]:
        return "see that nvidia-smi works, and that the driver is as new as the CUDA of the installed plugin asks for"
    return "see the message; JAX_PLATFORMS=cpu goes on without the accelerator"


# ---- memory and disk -------------------------------------------------------------------------------------------


def memory(here: Here) -> Found:
    """The host's memory, with the limit of its container."""
    facts: Facts = {}
    for line in (here.read("proc/meminfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key in ("MemTotal", "MemAvailable"):
            facts["host_bytes" if key == "MemTotal" else "free_bytes"] = int(value.split()[0]) * 1024
    limit = here.read("sys/fs/cgroup/memory.max")
    if limit and limit.isdigit() and int(limit) < facts.get("host_bytes", 1 << 62):
        used = int(here.read("sys/fs/cgroup/memory.current") or 0)
        facts |= {
            "host_bytes": int(limit),
            "free_bytes": min(facts.get("free_bytes", 1 << 62), int(limit) - used),
        }
    if not facts:
        facts["host_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    findings = []
    if facts.get("free_bytes", 1 << 62) < 2 * GIB:
        what = f"only {gib(facts['free_bytes'])} of the host's memory are free"
        findings.append(
            Finding("slow", "memory", what, "end other programs; below about 2 GiB a run may be killed")
        )
    return facts, findings


def cache_folder(here: Here) -> Path:
    """Where fetched models and compiled programs are kept."""
    home = here.environ.get("HOME") or str(Path.home())
    return Path(here.environ.get("LAIF_CACHE") or Path(home) / ".cache" / "laif_jax").expanduser()


def disk(here: Here) -> Found:
    """Whether the cache can be written, and what is free there and for temporary files."""
    facts, findings = {}, []
    for name, folder, variable in (
        ("cache", cache_folder(here), "LAIF_CACHE"),
        ("temporary", Path(tempfile.gettempdir()), "TMPDIR"),
    ):
        free, problem = writable(folder)
        facts |= {name: str(folder), f"{name}_free_bytes": free}
        if problem:
            what = f"{folder} ({name}) cannot be written: {problem}"
            level = "slow" if name == "cache" else "fails"
            effect = "; every start compiles anew, and `laif fetch` fails" if name == "cache" else ""
            findings.append(Finding(level, "disk", what + effect, f"set {variable} to a folder that can"))
        elif free is not None and free < 2 * GIB:
            what = f"only {gib(free)} are free at {folder} ({name})"
            findings.append(Finding("slow", "disk", what, f"free some, or set {variable} to another disk"))
    return facts, findings


def writable(folder: Path) -> tuple[int | None, str]:
    """(free bytes, what is wrong or "") of a folder that is there or could be made. Leaves nothing behind."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
        return shutil.disk_usage(existing).free, ""
    except OSError as error:
        return None, error.strerror or str(error)


# ---- settings --------------------------------------------------------------------------------------------------

_SLOW_SETTINGS = {
    "JAX_DISABLE_JIT": "nothing is compiled, every operation runs by itself",
    "JAX_DEBUG_NANS": "every result is looked at, and a step that holds a NaN runs again",
    "JAX_DEBUG_INFS": "every result is looked at",
    "JAX_ENABLE_X64": "numbers are of 64 bits: slow, and twice the memory",
    "JAX_CHECK_TRACER_LEAKS": "tracing is much slower",
    "JAX_EXPLAIN_CACHE_MISSES": "every new program is explained in the log",
}
_OFF = ("", "0", "false", "no", "off")


def settings(here: Here) -> Found:
    """Environment variables and limits that slow a run or end it."""
    facts: Facts = {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    }
    findings = [
        Finding("slow", "settings", f"{name}={here.environ[name]}: {effect}", f"unset {name}")
        for name, effect in _SLOW_SETTINGS.items()
        if here.environ.get(name, "").lower() not in _OFF
    ]
    if here.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "platform":
        what = (
            "XLA_PYTHON_CLIENT_ALLOCATOR=platform: the GPU's memory is given back and taken anew all the time"
        )
        findings.append(Finding("slow", "settings", what, "unset it"))
    huge = here.read("sys/kernel/mm/transparent_hugepage/enabled")
    if huge and "[always]" not in huge and _hardware(here)["TPU chips"]:
        do = 'sudo sh -c "echo always > /sys/kernel/mm/transparent_hugepage/enabled"'
        findings.append(
            Finding("slow", "settings", "transparent huge pages are off: a TPU starts and ends slowly", do)
        )
    limit = _open_files()
    if limit is not None:
        facts["open_files"] = limit
        if limit < 4096:
            what = f"a process may open {limit} files: the labelling service and large checkpoints want more"
            findings.append(Finding("slow", "settings", what, "ulimit -n 65536"))
    return facts, findings


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:  # not on this system
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


PROBES: dict[str, Callable[[Here], Found]] = {
    "versions": versions,
    "imports": imports,
    "devices": devices,
    "memory": memory,
    "disk": disk,
    "settings": settings,
}
