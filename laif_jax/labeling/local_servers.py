"""Servers of local models, started for a study and stopped after it: llama.cpp over a GGUF file, or our own model
server over a checkpoint. Both speak the OpenAI chat protocol with log-probs."""

import argparse
import contextlib
import importlib
import importlib.util
import socket
import sys
import tempfile
import threading
from collections.abc import Generator
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx

from laif_jax.config.schema import EndpointSpec
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.errors import EndpointError
from laif_jax.labeling.process import Child, end_with_parent, guarded
from laif_jax.records import content_id, file_sha256

START_TIMEOUT = 300.0  # seconds: a large model is read from disk, or compiled


@contextlib.contextmanager
def running(spec: EndpointSpec) -> Generator[Endpoint]:
    """The endpoint of a configuration, with its server running inside the block if it needs one.

    The answers of a local model are kept under the hash of its weights: the port, which changes from run to run, is no
    part of their key, and other weights under the same path are another endpoint.

    Raises:
      EndpointError: the model is not there, or the server's package is not installed.
      LabelServiceError: the server did not come up.
    """
    if spec.provider == "llama_cpp":
        with start_llama_cpp(spec) as url:
            yield Endpoint.from_spec(spec, base_url=url, identity=weights_id(spec))
    elif spec.provider == "checkpoint":
        with start_checkpoint_server(spec) as url:
            yield Endpoint.from_spec(spec, base_url=url, identity=weights_id(spec))
    else:
        yield Endpoint.from_spec(spec)


def weights_id(spec: EndpointSpec) -> str:
    """The hash of a local model's weights, whatever its file or folder is called; "" for other endpoints.

    Raises:
      EndpointError: the model is not there.
    """
    if spec.provider == "llama_cpp":
        return f"gguf:{_file_id(_gguf(spec))}"
    return f"checkpoint:{_folder_id(_checkpoint(spec))}" if spec.provider == "checkpoint" else ""


@contextlib.contextmanager
def start_llama_cpp(spec: EndpointSpec, *, threads: int = 1) -> Generator[str]:
    """A llama.cpp server over `spec.gguf`; yields its base_url (.../v1). It has `spec.concurrency` slots of
    `spec.context_length` tokens each.

    Raises:
      EndpointError: no such file, or `xllamacpp` is not installed. LabelServiceError: it did not come up.
    """
    path = _gguf(spec)
    if importlib.util.find_spec("xllamacpp") is None:
        raise EndpointError(
            "`provider: llama_cpp` needs the package xllamacpp: pip install 'laif_jax[llamacpp]'"
        )
    with tempfile.TemporaryDirectory(prefix="laif-llama-") as scratch:
        ready = Path(scratch) / "url"
        command = [
            sys.executable,
            "-m",
            "laif_jax.labeling.local_servers",
            str(path),
            "--ready-file",
            str(ready),
        ]
        command += ["--context", str(spec.context_length), "--slots", str(spec.concurrency)]
        command += ["--threads", str(threads), "--name", spec.model]
        with Child(f"llama.cpp server over {path}", command, log_file=Path(scratch) / "log") as child:
            child.wait_until(ready.exists, START_TIMEOUT)
            yield ready.read_text() + "/v1"


@contextlib.contextmanager
def start_checkpoint_server(spec: EndpointSpec) -> Generator[str]:
    """Our own model server (`laif serve model`, with `--reward` over a reward model) over the folder `spec.checkpoint`;
    yields its base_url (.../v1).

    Raises:
      EndpointError: no such folder. LabelServiceError: it did not come up.
    """
    path = _checkpoint(spec)
    port = _free_port()
    command = [sys.executable, "-m", "laif_jax.cli", "serve", "model", str(path)]
    command += ["--port", str(port), "--name", spec.model, *(["--reward"] if spec.reward else [])]
    url = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        log_file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="laif-model-"))) / "log"
        child = stack.enter_context(Child(f"model server over {path}", guarded(command), log_file=log_file))
        child.wait_until(lambda: _healthy(url), START_TIMEOUT)
        yield f"{url}/v1"


def _gguf(spec: EndpointSpec) -> Path:
    path = Path(spec.gguf or "").expanduser().absolute()
    if not path.is_file():
        raise EndpointError(
            f"no GGUF file {path}. Correct the endpoint's `gguf`, or fetch it with `laif fetch`"
        )
    return path


def _checkpoint(spec: EndpointSpec) -> Path:
    path = Path(spec.checkpoint or "").expanduser().absolute()
    described = (path / "reward.json").is_file()
    if described and not spec.reward:
        raise EndpointError(f"{path} is a reward model's folder: set the endpoint's `reward: true`")
    if not described and not (path / "config.json").is_file():
        kind = "reward model's folder (`laif reward` writes one)" if spec.reward else "model folder"
        raise EndpointError(
            f"{path} is no {kind}: it has no config.json. Correct the endpoint's `checkpoint`"
        )
    return path


def _file_id(path: Path) -> str:
    status = path.stat()
    return _cached_sha256(str(path), status.st_mtime_ns, status.st_size)[:32]


@lru_cache(maxsize=256)
def _cached_sha256(path: str, mtime: int, size: int) -> str:
    return file_sha256(path)


def _folder_id(folder: Path) -> str:
    """Hash of the model's files (of an ensemble's members too), whatever the folder is called."""
    endings = (".safetensors", ".json", ".jinja", ".model")
    found = [*folder.iterdir(), *folder.glob("member-*/*")]
    files = sorted(path for path in found if path.is_file() and path.name.endswith(endings))
    return content_id([[str(path.relative_to(folder)), _file_id(path)] for path in files])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _serve_llama_cpp() -> None:
    """The child process: a llama.cpp server until SIGTERM, or until the parent ends."""
    # By name: the package is optional, and its names come from a compiled module that type checkers cannot see.
    xllamacpp: Any = importlib.import_module("xllamacpp")

    parser = argparse.ArgumentParser()
    parser.add_argument("gguf")
    parser.add_argument("--ready-file", required=True)
    parser.add_argument("--name", required=True)
    for name in ("context", "slots", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    end_with_parent()
    params = xllamacpp.CommonParams()
    params.model.path = options.gguf
    params.model_alias = {options.name}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_parallel = options.slots
    params.n_ctx = options.context * options.slots  # shared out among the slots
    params.cpuparams.n_threads = options.threads
    params.cpuparams_batch.n_threads = options.threads
    params.warmup = False
    server = xllamacpp.Server(params)
    ready = Path(options.ready_file)
    partial = ready.with_name("url.part")
    partial.write_text(server.listening_address)
    partial.replace(ready)
    threading.Event().wait()


if __name__ == "__main__":
    _serve_llama_cpp()
