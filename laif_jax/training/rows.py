"""Whether batches divide over a mesh: asked before anything is read or compiled."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from laif_jax.config.rl import PpoSpec
from laif_jax.config.training import PairTrainSpec, TrainSpec
from laif_jax.parallel.mesh import MeshError, row_parts


def check_rows(sections: Mapping[str, Any], mesh: Mesh | AbstractMesh) -> None:
    """Raises MeshError, with all numbers, for batches that the mesh would fill up with rows of padding.

    Args:
      sections: of a configuration, by name; those that do not train are passed over.
    """
    found = list(undivided(sections, row_parts(mesh)))
    if found:
        sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
        what = "; ".join(f"{wrong}: {do}" for wrong, do in found)
        raise MeshError(
            f"mesh {sizes}: {what}; or give `mesh.tensor` more of the devices: it splits within rows"
        )


def undivided(sections: Mapping[str, Any], parts: int) -> Iterator[tuple[str, str]]:
    """Of each section whose batches do not divide over the `parts` into which a mesh splits rows: (what is wrong, what
    to do)."""
    for name, section in sections.items():
        if not isinstance(section, TrainSpec | PpoSpec):
            continue
        key = "micro_batch" if section.micro_batch else "batch_size"
        asked = getattr(section, key)
        unit, numerator, denominator = _split(section)
        count = asked * numerator // denominator
        if padding := -count % parts:
            wrong = (
                f"`{name}.{key}` {asked} gives {count} {unit} over {parts} parts of the mesh, "
                f"{padding} of {count + padding} padding"
            )
            whole = parts * denominator // math.gcd(parts * denominator, numerator)
            yield wrong, f"make it a multiple of {whole}"


def _split(section: TrainSpec | PpoSpec) -> tuple[str, int, int]:
    """(what a mesh does not split, how many of them there are per `micro_batch` or else `batch_size`: a / b)."""
    if isinstance(section, PpoSpec):
        if section.micro_batch:
            return "sequences", 1, 1
        return "sequences per minibatch", section.sampling.samples, section.minibatches
    if isinstance(
        section, PairTrainSpec
    ):  # a pair's two rows lie on one device; packed, these are what is counted
        return ("pairs of rows", 1, 2) if section.packing else ("pairs", 1, 1)
    return "rows", 1, 1
