"""Where every parameter lies: one text file per published model, to be read in a diff.

python -m tests.parallel.shardings      writes tests/parallel/goldens/shardings/*.txt anew
"""

import math
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from laif_jax.models import names
from laif_jax.parallel import param_shardings
from tests.parallel.published import MESHES, MODELS, abstract_mesh, variants

FOLDER = Path(__file__).parent / "goldens" / "shardings"


def parts(spec: P, mesh: AbstractMesh) -> int:
    """Into how many different parts an array is cut."""
    axes = [
        axis
        for entry in spec
        if entry is not None
        for axis in (entry if isinstance(entry, tuple) else (entry,))
    ]
    return math.prod(mesh.shape[axis] for axis in axes)


def entries(specs: Any, mesh: AbstractMesh) -> dict[str, tuple[tuple[int, ...], P]]:
    """{path: (shape, PartitionSpec)}."""
    shardings = names.flatten(param_shardings(specs, mesh))  # ty: ignore[invalid-argument-type]
    return {
        "/".join(path): (tuple(spec.shape), shardings[path].spec)
        for path, spec in names.flatten(specs).items()
    }


def _line(path: str, shape: tuple[int, ...], spec: P, mesh: AbstractMesh) -> str:
    split = [" x ".join((entry,) if isinstance(entry, str) else entry) if entry else "-" for entry in spec]
    mega = 4 * math.prod(shape) / parts(spec, mesh) / 1e6
    return f"  {path:34} {list(shape)!s:28} [{', '.join(split)}]  {mega:.3f} MB"


def text(model: str) -> str:
    """The file of a model: float32 bytes per device at the end of each line. Adapters and heads are listed where they
    are beside the language model's own parameters."""
    lines, seen = [f"# {model}", ""], set()
    for what, specs in variants(model):
        for name in MESHES:
            mesh = abstract_mesh(name)
            found = entries(specs, mesh)
            lines.append(f"{what}, {name}")
            for path, (shape, spec) in sorted(found.items()):
                line = _line(path, shape, spec, mesh)
                if (name, line) not in seen:
                    lines.append(line)
                seen.add((name, line))
            total = sum(4 * math.prod(shape) / parts(spec, mesh) for shape, spec in found.values())
            lines += [f"  in all {total / 1e9:.3f} GB per device", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        (FOLDER / f"{model}.txt").write_text(text(model))
