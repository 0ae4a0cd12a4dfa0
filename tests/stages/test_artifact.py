"""Artifacts: what changes a key, what is run again, and what a failure leaves."""

import errno
import json
import os

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.records import write_jsonl
from laif_jax.stages import artifact as artifacts
from laif_jax.stages.artifact import Artifact, StageError, run_stage, stage_key
from laif_jax.stages.context import Services
from tests.studies import tiny

SETTINGS = st.dictionaries(
    st.text(min_size=1, max_size=5),
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=5),
    ),
    max_size=4,
)


def made(key: str) -> Artifact:
    return Artifact(epath.Path("/nowhere"), {"key": key, "metrics": {}})


@given(SETTINGS, st.data())
def test_the_key_is_a_function_of_kind_settings_and_inputs_alone(settings, data):
    inputs = {"prompts": made("a"), "model": made("b")}
    key = stage_key("sft", settings, inputs)
    assert key == stage_key("sft", dict(reversed(settings.items())), dict(reversed(inputs.items())))
    assert key != stage_key("dpo", settings, inputs)
    assert key != stage_key("sft", {**settings, "one more": 1}, inputs)
    assert key != stage_key("sft", settings, {**inputs, "model": made("c")})
    assert key != stage_key("sft", settings, {"prompts": made("b"), "model": made("a")})
    other = data.draw(SETTINGS)
    assert (key == stage_key("sft", other, inputs)) == (
        json.dumps(other, sort_keys=True) == json.dumps(settings, sort_keys=True)
    )


def test_a_new_format_is_another_key(monkeypatch):
    before = stage_key("sft", {}, {})
    monkeypatch.setattr(artifacts, "FORMAT", artifacts.FORMAT + 1)
    assert stage_key("sft", {}, {}) != before


class Work:
    """Counts its calls; `error` is raised after writing something."""

    def __init__(self, error: BaseException | None = None):
        self.calls = 0
        self.error = error

    def __call__(self, folder: epath.Path):
        self.calls += 1
        write_jsonl(folder / "partial.jsonl", [{"call": self.calls}])
        if self.error:
            raise self.error
        return {"calls": self.calls}


def run(tmp_path, work, settings=None, inputs=None) -> Artifact:
    return run_stage("test", settings or {"a": 1}, inputs or {}, epath.Path(tmp_path), work)


def manifest_of(tmp_path):
    (path,) = tmp_path.glob("test-*/manifest.json")
    return json.loads(path.read_text())


def test_a_finished_stage_is_never_run_twice(tmp_path):
    work = Work()
    first = run(tmp_path, work, inputs={"x": made("abc")})
    again = run(tmp_path, work, inputs={"x": made("abc")})
    assert work.calls == 1
    assert first.path == again.path
    assert dict(again.manifest) == json.loads((again.path / "manifest.json").read_text()) == first.manifest
    assert first.metrics == {"calls": 1}
    manifest = manifest_of(tmp_path)
    assert (manifest["status"], manifest["attempts"]) == ("done", 1)
    assert manifest["inputs"] == {"x": "abc"}
    assert manifest["settings"] == {"a": 1}
    assert {"python", "jax", "laif_jax"} <= set(manifest["versions"])
    assert run(tmp_path, work, settings={"a": 2}).key != first.key
    assert work.calls == 2


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (ValueError("no such teacher"), StageError, "ValueError: no such teacher"),
        (StageError("3 of 40 answers came"), StageError, "3 of 40 answers came"),
        (KeyboardInterrupt(), KeyboardInterrupt, "KeyboardInterrupt"),
    ],
)
def test_a_failed_stage_says_why_keeps_its_work_and_is_entered_again(tmp_path, error, raised, said):
    with pytest.raises(raised) as caught:
        run(tmp_path, Work(error))
    if raised is StageError:
        assert said in str(caught.value)
    manifest = manifest_of(tmp_path)
    assert manifest["status"] == "failed"
    assert said in manifest["error"]
    assert ("traceback" in manifest) == (raised is StageError)
    assert list(tmp_path.glob("test-*/partial.jsonl"))

    done = run(tmp_path, Work())
    assert done.manifest["status"] == "done"
    assert done.manifest["attempts"] == 2
    assert "error" not in done.manifest
    assert done.manifest["seconds"] >= manifest["seconds"]


@pytest.mark.parametrize(
    "damage", ["", '{"status": "do', "null", "[]", '{"status": "running"}', "\udcff\x00"]
)
def test_a_manifest_that_was_cut_off_or_damaged_means_run_again(tmp_path, damage):
    work = Work()
    path = run(tmp_path, work).path / "manifest.json"
    path.write_bytes(damage.encode("utf-8", "surrogateescape"))
    assert run(tmp_path, work).metrics == {"calls": 2}
    assert manifest_of(tmp_path)["status"] == "done"


def test_a_full_disk_is_said_and_costs_nothing_that_was_done(tmp_path):
    """/dev/full refuses every byte with ENOSPC, as a full disk does."""
    done = run(tmp_path, Work(), settings={"a": "earlier"})
    folder = epath.Path(tmp_path) / f"test-{stage_key('test', {'a': 1}, {})}"
    folder.mkdir()
    os.symlink("/dev/full", folder / ".partial.jsonl.tmp")
    with pytest.raises(StageError, match=r"partial\.jsonl: No space left on device.*Free space"):
        run(tmp_path, Work())
    assert run(tmp_path, Work(), settings={"a": "earlier"}).manifest == done.manifest
    assert run(tmp_path, Work()).metrics == {"calls": 1}


def test_a_disk_too_full_for_the_manifest_is_the_stages_failure_not_the_studys(tmp_path):
    folder = epath.Path(tmp_path) / f"test-{stage_key('test', {'a': 1}, {})}"
    folder.mkdir()
    os.symlink("/dev/full", folder / ".manifest.json.tmp")
    work = Work()
    with pytest.raises(StageError, match="No space left on device"):
        run(tmp_path, work)
    assert work.calls == 0
    assert run(tmp_path, work).metrics == {"calls": 1}


def test_the_reason_of_a_failure_survives_a_disk_that_has_no_room_for_it(tmp_path, caplog):
    def work(folder):
        os.symlink("/dev/full", folder / ".manifest.json.tmp")
        raise OSError(errno.ECONNREFUSED, "the judge is down")

    with pytest.raises(StageError, match="the judge is down"):
        run(tmp_path, work)
    assert "No space left on device" in caplog.text
    assert run(tmp_path, Work()).metrics == {"calls": 1}


def test_a_labelling_store_in_a_bucket_is_refused(tmp_path):
    config = tiny.config(tmp_path)
    with (
        Services(config, epath.Path("gs://bucket/runs/tiny")) as services,
        pytest.raises(StageError, match=r"gs://bucket/runs/tiny/labels.*labeling\.store"),
    ):
        services.client  # noqa: B018 - starts the service
    assert not (tmp_path / "gs:").exists()
