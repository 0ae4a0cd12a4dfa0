"""Executables compiled ahead of time: kept as files, and taken by the program that they are of.

A file's name is the hash of the lowered program (shapes, shardings, constants: all that is compiled), of the kind and
number of devices, of the versions of JAX and of the compiler, and of the TPU compiler's arguments. So one that does not
fit this configuration, slice or installation is never found, and a program that has none is compiled as always.
"""

import hashlib
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.sharding import Mesh

log = logging.getLogger(__name__)
FOLDER = "LAIF_EXECUTABLES"  # the environment variable that names the folder


def key(lowered: Any, devices: Any) -> str:
    """The name of an executable. `devices`: those that it is for, of any number of hosts."""
    devices = list(devices)
    about = [devices[0].device_kind, str(len(devices)), jax.__version__, jaxlib.__version__]
    about.append(" ".join(sorted(os.environ.get("LIBTPU_INIT_ARGS", "").split())))
    return hashlib.sha256("\n".join([*about, lowered.as_text()]).encode()).hexdigest()[:32]


def save(compiled: Any, name: str, folder: str | Path) -> Path:
    """Writes an executable as `folder/NAME.executable`."""
    path = Path(folder) / f"{name}.executable"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
    temporary.replace(path)
    return path


def load(name: str, folder: str | Path, devices: Any) -> Any | None:
    """The executable, ready to be called, or None if there is none. Trust the folder: files in it can run code."""
    path = Path(folder) / f"{name}.executable"
    if not path.exists():
        return None
    payload, in_tree, out_tree = pickle.loads(path.read_bytes())
    return serialize_executable.deserialize_and_load(
        payload, in_tree, out_tree, execution_devices=list(devices)
    )


class Prepared:
    """A jitted function that takes its executable from a folder where there is one, at its first call."""

    def __init__(self, jitted: Any, devices: Any, folder: str | Path):
        self.jitted, self.devices, self.folder = jitted, list(devices), folder
        self._executables: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        shapes = (tree, tuple((jax.numpy.shape(x), str(jax.numpy.result_type(x))) for x in leaves))
        if shapes not in self._executables:
            lowered = self.jitted.lower(*args)
            name = key(lowered, self.devices)
            found = load(name, self.folder, self.devices)
            log.info("%s: %s", "executable taken" if found else "no executable; compiling", name)
            self._executables[shapes] = found or lowered.compile()
        return self._executables[shapes](*args)

    def lower(self, *args: Any) -> Any:
        return self.jitted.lower(*args)

    def trace(self, *args: Any) -> Any:
        return self.jitted.trace(*args)


def prepared(jitted: Any, mesh: Any) -> Any:
    """`jitted`, or the same with executables from the folder that LAIF_EXECUTABLES names."""
    folder = os.environ.get(FOLDER)
    return Prepared(jitted, mesh.devices.flat, folder) if folder and isinstance(mesh, Mesh) else jitted
