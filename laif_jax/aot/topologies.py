"""Names of slices, and the devices that a compiler on this machine can make of them."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import yaml
from jax.sharding import AbstractMesh, AxisType, Mesh

from laif_jax.config.schema import MeshSpec
from laif_jax.parallel import mesh as meshes
from laif_jax.parallel.mesh import make_mesh
from laif_jax.records.errors import LaifError

# Chips of a slice -> its shape. v5e and v6e are called by chips, v4 and v5p by cores, of which a chip has two.
_FLAT = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
_CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip
_SHAPES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT}
_CORES = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}
_NAME = re.compile(r"(?:(\d+)x)?(v4|v5e|v5p|v6e)-(\d+)")


class TopologyError(LaifError, ValueError):
    """A slice that is not known, or that cannot be compiled for here."""


@dataclass(frozen=True)
class Chip:
    """One chip of `chips.yaml`: bytes of memory, FLOP/s, bytes/s, and dollars per hour, None where it has no price."""

    kind: str
    name: str
    hbm: float
    flops: float
    bandwidth: float
    ici: float
    price: float | None
    priced: str  # when and where the price is from


@dataclass(frozen=True)
class Slice:
    """Chips that are rented together. `slices` of them are joined by the data centre's network."""

    name: str
    kind: str
    chips: int
    shape: str
    slices: int = 1


def known_slices() -> list[str]:
    """All names, as Google Cloud calls them."""
    return [f"{kind}-{chips * _CORES[kind]}" for kind, shapes in _SHAPES.items() for chips in shapes]


def parse_slice(name: str) -> Slice:
    """Reads `v5e-16`, `v5p-128` (64 chips: v4 and v5p count cores), `2xv5e-16` (two slices).

    Raises:
      TopologyError: an unknown name; the message lists the known ones.
    """
    match = _NAME.fullmatch(name)
    found = None
    if match:
        slices, kind, number = int(match[1] or 1), match[2], int(match[3])
        if number % _CORES[kind] == 0 and slices >= 1:
            found = _SHAPES[kind].get(number // _CORES[kind])
    if match is None or found is None:
        lines = "; ".join(
            ", ".join(each for each in known_slices() if each.startswith(kind)) for kind in _SHAPES
        )
        raise TopologyError(
            f"topology `{name}` is not known. Known: {lines}; with NUMBERx in front, so many slices. "
            "(v4 and v5p are named by cores, two per chip; v5e and v6e by chips.)"
        )
    return Slice(name, kind, slices * number // _CORES[kind], found, slices)


def read_chip(kind: str, prices: str | Path | None = None) -> Chip:
    """The chip whose name in the file `kind` starts with (a GPU's device kind is longer).

    Raises:
      TopologyError: there is none.
    """
    path = Path(prices) if prices else Path(__file__).with_name("chips.yaml")
    table = yaml.safe_load(path.read_text())
    names = [name for name in table["chips"] if kind.startswith(name)]
    if not names:
        raise TopologyError(f"{path} has no chip `{kind}`; it has {', '.join(table['chips'])}")
    row = table["chips"][max(names, key=len)]
    numbers = {key: float(row[key]) for key in ("hbm", "flops", "bandwidth", "ici")}
    price = None if row.get("price") is None else float(row["price"])
    return Chip(
        kind, row["name"], **numbers, price=price, priced=f"{table['date']}, {table['prices_source']}"
    )


def has_tpu_compiler() -> bool:
    """Whether the `libtpu` wheel is installed (`pip install 'laif_jax[aot]'`)."""
    return importlib.util.find_spec("libtpu") is not None


def tpu_devices(found: Slice) -> Sequence[Any]:
    """Devices that can be compiled for, and that nothing can run on.

    Raises:
      TopologyError: the compiler refuses the slice.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this is no TPU machine: do not ask for its metadata
    options: dict[str, Any] = {}
    if found.kind == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    if found.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if found.slices > 1:
        options["num_slices"] = found.slices
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{found.kind}:{found.shape}", **options
        ).devices
    except (RuntimeError, ValueError) as error:
        raise TopologyError(f"the TPU compiler does not make `{found.name}`: {error}") from error


def lay_mesh(spec: MeshSpec, found: Slice) -> Mesh:
    """The mesh of a configuration over a slice's devices.

    Raises:
      MeshError: it does not divide them; the message has the numbers. Nothing was compiled.
    """
    return make_mesh(spec, tpu_devices(found))


def abstract_mesh(spec: MeshSpec, found: Slice) -> AbstractMesh:
    """The same without devices, for an estimate."""
    sizes = meshes.resolve_sizes(spec, found.chips)
    return AbstractMesh(tuple(sizes), meshes.AXES, axis_types=(AxisType.Auto,) * len(meshes.AXES))


def local_mesh(spec: MeshSpec) -> Mesh:
    """The mesh over the devices of this machine."""
    return make_mesh(spec, jax.devices())


def chips_of(mesh: Mesh | AbstractMesh) -> int:
    """Devices of a mesh."""
    return math.prod(mesh.shape.values())
