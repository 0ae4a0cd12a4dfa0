"""What a stage leaves behind: `runs/<study>/<stage>-<key>/` with a `manifest.json`.

The key is a hash of the stage's settings and of its inputs' keys, so a finished stage is never run twice, and a change
of any setting reruns exactly what depends on it. An unfinished stage is entered again and resumes by its own means.
"""

import dataclasses
import datetime
import json
import logging
import platform
import time
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from importlib import metadata
from typing import Any

from etils import epath

from laif_jax.parallel import distributed, preemption
from laif_jax.parallel.preemption import Preempted
from laif_jax.records import content_id, write_json
from laif_jax.records.errors import LaifError

logger = logging.getLogger(__name__)

# Raised when the meaning of a stage's output changes, so that older artifacts are not mistaken for new ones.
FORMAT = 1


class StageError(LaifError, RuntimeError):
    """A stage cannot go on; the message says why and what to do. What was finished before stays."""


class Peeked(Exception):
    """What `peek` was to find out: a stage's kind, folder and whether it is finished. It is not run."""

    def __init__(self, kind: str, folder: epath.Path, finished: bool):
        super().__init__(kind)
        self.kind, self.folder, self.finished = kind, folder, finished


_PEEKS: ContextVar[bool] = ContextVar("peeks", default=False)


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder and its manifest."""

    path: epath.Path
    manifest: Mapping[str, Any]

    @property
    def key(self) -> str:
        return self.manifest["key"]

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self.manifest["metrics"]


def stage_key(kind: str, settings: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> str:
    """The content hash that names a stage's folder."""
    return content_id(
        {
            "kind": kind,
            "format": FORMAT,
            "settings": settings,
            "inputs": {name: artifact.key for name, artifact in inputs.items()},
        }
    )


def peek(run: Callable[[], Any]) -> Peeked | None:
    """The stage that `run` would enter, without running it; None if it does not get that far."""
    token = _PEEKS.set(True)
    try:
        run()
    except Peeked as found:
        return found
    except LaifError as error:  # running it will say the same, where it is looked at
        logger.debug("%s", error)
    finally:
        _PEEKS.reset(token)
    return None


def run_stage(
    kind: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    root: epath.Path,
    work: Callable[[epath.Path], Mapping[str, Any]],
    *,
    main_only: bool = False,
) -> Artifact:
    """Runs `work(folder) -> metrics` unless its artifact is finished already.

    All processes of a multi-host run call this together; process 0 alone writes the manifest.

    Args:
      kind: the stage's name, the first part of the folder's.
      settings: plain JSON; everything that changes the output must be in here.
      root: the study's folder.
      main_only: `work` computes nothing on devices: process 0 alone calls it, and the others get its metrics.

    Raises:
      StageError: `work` failed; the manifest says why, and the folder keeps what was done.
      Preempted: the run was asked to stop.
    """
    key = stage_key(kind, settings, inputs)
    folder = root / f"{kind}-{key}"
    manifest_path = folder / "manifest.json"
    finished = _read_manifest(manifest_path)
    if _PEEKS.get():
        raise Peeked(kind, folder, finished is not None and finished["status"] == "done")
    if distributed.broadcast_json(finished is not None and finished["status"] == "done"):
        logger.info("%s-%s: finished earlier, not run again", kind, key)
        return Artifact(folder, finished or json.loads(manifest_path.read_text()))

    manifest: dict[str, Any] = {
        "kind": kind,
        "key": key,
        "status": "running",
        "settings": dict(settings),
        "inputs": {name: artifact.key for name, artifact in inputs.items()},
        "versions": versions(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # Time spent by earlier attempts that were cut short counts too.
        "seconds": (finished or {}).get("seconds", 0.0),
        "attempts": (finished or {}).get("attempts", 0) + 1,
        "metrics": {},
    }
    before = manifest["seconds"]
    start = time.monotonic()
    logger.info("%s-%s: started", kind, key)
    try:
        # A disk without room for the manifest is found here, before anything is computed.
        distributed.from_main(lambda: write_json(manifest_path, manifest))
        metrics = distributed.from_main(lambda: dict(work(folder))) if main_only else work(folder)
        manifest |= {"metrics": dict(metrics), "status": "done", "seconds": before + time.monotonic() - start}
        distributed.barrier(f"{kind}-{key}")
        _write(manifest_path, manifest)
    except BaseException as error:
        if isinstance(error, Exception):
            distributed.confirm_processes()
        # Who asks this process to end may have ended its helpers too: what comes of that is no failure of the stage.
        stopped = isinstance(error, Preempted) or (
            isinstance(error, Exception) and bool(preemption.state.why)
        )
        manifest |= {
            "status": "stopped" if stopped else "failed",
            "error": f"{type(error).__name__}: {error}",
            "seconds": before + time.monotonic() - start,
        }
        if isinstance(error, Exception):
            manifest["traceback"] = traceback.format_exc()
        _write_failure(manifest_path, manifest)
        if stopped and isinstance(error, Exception):
            raise Preempted(f"{kind}-{key} ended by {type(error).__name__}: {error}") from error
        if isinstance(error, StageError) or not isinstance(error, Exception):
            raise
        raise StageError(f"{kind}-{key}: {type(error).__name__}: {error}") from error
    logger.info("%s-%s: done in %.1f s", kind, key, manifest["seconds"] - before)
    return Artifact(folder, manifest)


def _read_manifest(path: epath.Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
    except ValueError:  # not JSON, or not even text
        manifest = None
    if isinstance(manifest, dict) and "status" in manifest:
        return manifest
    logger.warning("%s is no manifest (cut off while it was written?); the stage is run again", path)
    return None


def _write(path: epath.Path, manifest: Mapping[str, Any]) -> None:
    if distributed.is_main():
        write_json(path, manifest)


def _write_failure(path: epath.Path, manifest: Mapping[str, Any]) -> None:
    try:
        _write(path, manifest)
    except OSError as error:  # must not hide why the stage failed, which is raised next
        logger.error("%s", error)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("laif_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
