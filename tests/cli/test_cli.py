"""The command line: verbs, exit statuses, and messages that say what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import laif_jax.cli
from laif_jax.cli.main import _calm_libtpu, _parsed, main
from laif_jax.models import fetch
from laif_jax.models.model import load_model
from tests.studies import tiny

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def said(capsys) -> str:
    """The one message on standard error."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("laif: ")
    assert "Traceback" not in captured.err
    return captured.err


@pytest.fixture(scope="module")
def model() -> Path:
    """A tiny model in Hugging Face layout."""
    (stage,) = (tiny.finished() / "runs" / "tiny").glob("pretrain-*")
    return stage / "model"


# ---- help ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb",
    [
        [],
        ["run"],
        ["inspect"],
        ["report"],
        ["fetch"],
        ["convert"],
        ["serve"],
        ["serve", "labels"],
        ["serve", "model"],
    ],
)
def test_help(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*verb, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: laif{' ' if verb else ''}{' '.join(verb)}")
    if not verb:
        for name in ("run", "inspect", "report", "fetch", "convert", "serve"):
            assert f"    {name}" in text


@pytest.mark.parametrize(
    "arguments", [[], ["no-such-verb"], ["run"], ["inspect", "x.yaml", "--stage", "rl"], ["serve"]]
)
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: laif" in capsys.readouterr().err


def test_settings_may_stand_before_and_after_options():
    asked = ["compile", QUICKSTART, "a=1", "--stage", "sft", "b.gpt-4=2", "--json", "c=x=y"]
    options = _parsed(asked)
    assert options.overrides == ["a=1", "b.gpt-4=2", "c=x=y"]
    assert (options.stage, options.json) == (["sft"], True)


@pytest.mark.parametrize("words", [["--jsom"], ["--jsom=1"], ["a=1", "stray"]])
def test_what_is_no_setting_is_refused_after_options(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["compile", QUICKSTART, "--stage", "sft", *words])
    assert caught.value.code == 2
    assert f"unrecognized arguments: {' '.join(words)}" in capsys.readouterr().err


def test_help_and_mistakes_are_told_before_jax_is_loaded():
    """As `python -m laif_jax.cli`: loading takes seconds, a mistyped key should not."""
    code = "import runpy, sys\n"
    code += "try: runpy.run_module('laif_jax.cli', run_name='__main__')\n"
    code += "except SystemExit as end: print('jax' in sys.modules, end.code)"

    def run(*arguments: str) -> tuple[str, str]:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout, done.stderr

    out, error = run("--help")
    assert out.startswith("usage: laif ")
    assert out.endswith("False 0\n")
    assert error == ""
    assert run("run", "no-such.yaml") == ("False 2\n", "laif: no-such.yaml: no such file.\n")
    out, error = run("run", QUICKSTART, "sft.epoch=2")
    assert out == "False 2\n"
    assert "did you mean `epochs`?" in error


def test_the_entry_point():
    assert laif_jax.cli.main is main


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["run", "inspect"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["configs/quickstrat.yaml"], "configs/quickstrat.yaml: no such file"),
        ([QUICKSTART, "sft.epoch=2"], "sft.epoch: unknown key; did you mean `epochs`?"),
        ([QUICKSTART, "sft.epochs=many"], "sft.epochs: "),
        ([QUICKSTART, "sft.epochs"], "override `sft.epochs`: write it as key=value"),
        ([QUICKSTART, "dpo.gamma=1"], "`gamma` has no effect with `loss: sigmoid`"),
        ([QUICKSTART, "scale=huge"], "there is no scale `huge`"),
        ([QUICKSTART, "evaluation.judge.endpoint=strongest"], "did you mean `strong`?"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_message_and_nothing_is_made(
    verb, arguments, says, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main([verb, *arguments]) == 2
    message = said(capsys)
    assert says in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_mesh_that_does_not_fit_is_found_before_anything_runs(tmp_path, capsys):
    assert tiny.run(tmp_path, "mesh.data=3") == 2
    assert "mesh data=3" in said(capsys)
    assert not (tmp_path / "runs").exists()


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused_before_anything_runs(tmp_path, capsys):
    assert tiny.run(tmp_path, "sft.batch_size=6") == 2
    message = said(capsys)
    assert (
        "mesh data=2 x fsdp=2 x tensor=2: `sft.batch_size` 6 gives 6 rows over 4 parts of the mesh, 2 of 8 padding"
        in message
    )
    assert "make it a multiple of 4" in message
    assert not (tmp_path / "runs").exists()


def test_libtpu_without_a_tpu_is_told_so_and_one_with_its_chips_is_left_alone(tmp_path, monkeypatch):
    names = ("TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE", "TPU_SKIP_MDS_QUERY")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    (tmp_path / "accel0").touch()
    _calm_libtpu(tmp_path)
    assert not set(names) & set(os.environ)
    (tmp_path / "accel0").unlink()
    _calm_libtpu(tmp_path)
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "localhost"
    assert set(names) <= set(os.environ)


def test_a_command_is_quiet_where_libtpu_has_no_tpu():
    """Without JAX_PLATFORMS, as on a laptop: JAX tries libtpu and goes on with the CPU, at once and without a word."""
    pytest.importorskip("libtpu")
    code = "from laif_jax.cli.main import _calm_libtpu as f; f(); import jax; print(jax.default_backend())"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_"))}
    done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "tpu" not in done.stdout
    assert done.stderr == ""


def test_a_traceback_for_those_who_want_it():
    with pytest.raises(ValueError, match="no such file"):
        main(["run", "no-such.yaml", "--verbose"])


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("laif_jax.studies.run.run_study", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["run", QUICKSTART])


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("laif_jax.studies.run.run_study", interrupted)
    assert main(["run", QUICKSTART]) == 130
    assert "run the same command again" in said(capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["report", "{tmp}"], "results.json: no such file. `laif run CONFIG` writes it"),
        (["fetch", "smollm3"], "smollm2-135m"),
        (["convert", "{tmp}/nothing", "{tmp}/out"], "nothing: no such model"),
        (["convert", "{tmp}", "{tmp}/out"], "config.json: no such file"),
        (["convert", "{tmp}/cut.gguf", "{tmp}/out"], "cut.gguf"),
        (["serve", "model", "{tmp}/nothing"], "nothing"),
        (["serve", "labels", "--store", "/dev/null/store", "--port", "0"], "/dev/null/store"),
    ],
)
def test_what_is_not_there_is_named(arguments, says, tmp_path, capsys):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    assert main([part.format(tmp=tmp_path) for part in arguments]) == 2
    assert says in said(capsys)


def test_weights_with_a_wrong_hash_are_refused(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(b"GGUF, but another one")
    source = fetch.KNOWN["smollm2-135m"]
    monkeypatch.setenv(source.variable, str(copy))
    monkeypatch.setenv("LAIF_CACHE", str(tmp_path / "cache"))
    assert main(["fetch", "smollm2-135m", "--dest", str(tmp_path / "out")]) == 2
    message = said(capsys)
    assert source.sha256 in message
    assert fetch.sha256_of(copy) in message
    assert str(copy) in message
    assert not (tmp_path / "out" / "config.json").exists()


# ---- verbs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_convert(model, tmp_path, capsys, dtype):
    assert main(["convert", str(model), str(tmp_path / "out"), "--dtype", dtype]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    before, after = load_model(str(model)), load_model(str(tmp_path / "out"))
    kernel = [np.asarray(m.params["layers"]["mlp"]["up"]["kernel"]) for m in (before, after)]
    np.testing.assert_array_equal(np.asarray(jnp.asarray(kernel[0]).astype(dtype), np.float32), kernel[1])
    if dtype == "float32":
        name = "model.safetensors"
        assert (model / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_convert_refuses_a_cut_weight_file(model, tmp_path, capsys):
    broken = tmp_path / "model"
    broken.mkdir()
    for file in model.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[:-500] if file.name == "model.safetensors" else data)
    assert main(["convert", str(broken), str(tmp_path / "out")]) == 2
    assert "model.safetensors: the file is cut short" in said(capsys)
    (broken / "model.safetensors").unlink()
    assert main(["convert", str(broken), str(tmp_path / "out")]) == 2
    assert str(broken) in said(capsys)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_inspect_shows_the_batches_that_training_saw(stage, tmp_path, capsys):
    folder = tiny.copy_of_finished(tmp_path)
    before = tiny.manifests(tmp_path)
    assert main(["inspect", str(tiny.write(tmp_path)), "--stage", stage]) == 0
    text = capsys.readouterr().out
    assert "<assistant>" in text
    steps = {"sft": "sft weak 25%: 4 steps", "dpo": "dpo LAIF weak: "}
    assert steps[stage] in text
    assert tiny.manifests(tmp_path) == before  # nothing was run for it
    shown = "".join(text.split())
    if stage == "sft":
        (file,) = (p for p in folder.glob("teach-*/completions.jsonl.gz") if tiny.teacher_of(p) == "weak")
        answers = [row["text"] for row in tiny.rows(file)]
        assert sum(f"<assistant>⟦{answer}" in shown for answer in answers) >= 3
    else:
        (file,) = folder.glob("label-*/preferences.jsonl.gz")
        assert sum(f"<assistant>⟦{row['chosen']['text']}" in shown for row in tiny.rows(file)) >= 3


def test_inspect_makes_what_it_reads_and_trains_nothing(tmp_path, capsys):
    tiny.copy_of_finished(
        tmp_path, without=["prompts", "teach", "pretrain", "sft", "sample", "label", "dpo", "evaluate"]
    )
    assert main(["inspect", str(tiny.write(tmp_path)), "--stage", "sft", "--batches", "2"]) == 0
    assert sorted(m["kind"] for m in tiny.manifests(tmp_path).values()) == ["prompts", "teach"]
    arms = [arm for arm in tiny.TREE["arms"] if "optimize" not in arm]
    capsys.readouterr()
    path = tiny.write(tmp_path, arms=arms, dpo=..., critics={}, questions=[], sampling=...)
    assert main(["inspect", str(path), "--stage", "dpo"]) == 2
    assert "no arm of this study has `optimize: dpo`" in said(capsys)
