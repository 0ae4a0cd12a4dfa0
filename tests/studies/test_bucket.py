"""A study whose folder is in a bucket: the same code, the same numbers, and what is wrong there is told first."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from etils import epath

from laif_jax.cli.main import main
from laif_jax.parallel.preemption import EXIT_CODE
from laif_jax.training import loop
from tests.bucket import bucket
from tests.studies import tiny


def write(folder: Path, out: str) -> str:
    """The tiny study with its folder in a bucket; a store of labels needs a disk."""
    path = folder / "tiny.yaml"
    made = tiny.tree(labeling__store=str(folder / "labels"))
    path.write_text(yaml.safe_dump({**made, "out": out}, sort_keys=False))
    return str(path)


def test_a_study_in_a_bucket_is_stopped_and_goes_on_to_the_same_numbers(tmp_path, monkeypatch, capsys):
    expected = tiny.numbers(tiny.results(tiny.finished()))
    monkeypatch.setenv("LAIF_CACHE", str(tiny.cache()))
    command = ["run", write(tmp_path, "gs://box/runs")]
    study = epath.Path("gs://box/runs/tiny")
    original = loop._Run._next

    def asked(run, step):
        if run.title == "sft" and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, step)

    with bucket() as objects:
        monkeypatch.setattr(loop._Run, "_next", asked)
        assert main(command) == EXIT_CODE
        monkeypatch.setattr(loop._Run, "_next", original)
        said = capsys.readouterr().err
        assert "laif: asked to stop (SIGTERM). sft: step 2 was saved. Start the same command again" in said
        states = {
            path.parent.name.split("-")[0]: json.loads(path.read_text())
            for path in study.glob("*/manifest.json")
        }
        assert states["pretrain"]["status"] == "done"
        assert states["sft"]["status"] == "stopped"
        assert not (study / "results.json").exists()

        assert main(command) == 0
        assert tiny.numbers(json.loads((study / "results.json").read_text())) == expected
        page = (study / "report" / "index.html").read_text()
        (study / "report" / "index.html").unlink()
        assert main(["report", str(study)]) == 0
        assert (study / "report" / "index.html").read_text() == page
        assert any("/tensorboard/events" in name for name in objects.names())
        assert not any(name.endswith((".tmp", "can-write")) for name in objects.names())


def test_a_bucket_that_cannot_be_written_is_told_before_anything_is_compiled(tmp_path, monkeypatch, capsys):
    def compiled(*_, **__):
        pytest.fail("a stage began")

    monkeypatch.setattr("laif_jax.stages.artifact.run_stage", compiled)
    with bucket() as objects:
        objects.read_only = True
        assert main(["run", write(tmp_path, "gs://locked/runs")]) == 2
    said = capsys.readouterr().err
    assert "laif: cannot write to gs://locked/runs/tiny: PermissionError" in said
    assert "does not have storage.objects.create access" in said
    assert "set `out` to another folder" in said
    assert not objects.names()
