"""`laif compile`: a real compile for a TPU slice where its compiler is installed, estimates elsewhere, bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from laif_jax.aot import compiling, programs, topologies
from laif_jax.aot.command import run_compile
from laif_jax.aot.report import table
from laif_jax.cli.main import main
from laif_jax.config.schema import MeshSpec
from laif_jax.parallel.mesh import MeshError

CONFIGS = Path(__file__).parents[2] / "configs"
FIELDS = {
    "fits", "argument_bytes", "temp_bytes", "peak_bytes", "hbm_bytes", "flops", "bytes_accessed", "collectives",
    "step_seconds_bound", "mfu_bound",
}  # fmt: skip
TINY = """
name: tiny
model:
  {source: scratch, tokenizer: symbols, dtype: bfloat16, logprob_chunk: 256, scratch: {hidden_size: 256,
   intermediate_size: 512, num_layers: 2, num_heads: 4, num_kv_heads: 2, max_position: 512, tie_embeddings: false}}
mesh: {fsdp: 2, tensor: 2}
sft: {steps: 10, batch_size: 8, max_length: 256, max_prompt_length: 128}
dpo: {steps: 10, batch_size: 4, max_length: 256, max_prompt_length: 128}
reward: {steps: 10, batch_size: 4, max_length: 256, max_prompt_length: 128}
ppo:
  {iterations: 2, batch_size: 8, micro_batch: 4, minibatches: 2, max_prompt_length: 64, sampling: {max_new_tokens: 16}}
sampling: {max_new_tokens: 16, batch_size: 8}
"""


@pytest.fixture
def tiny(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return str(file)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(topologies, "has_tpu_compiler", lambda: False)


# ---- slices ------------------------------------------------------------------------------------------------------


def test_names_of_slices_are_google_clouds():
    found = {
        name: topologies.parse_slice(name) for name in ("v5e-16", "v5p-128", "v4-8", "v6e-1", "2xv5e-16")
    }
    assert {name: (s.chips, s.shape, s.slices) for name, s in found.items()} == {
        "v5e-16": (16, "4x4", 1),
        "v5p-128": (64, "4x4x4", 1),
        "v4-8": (4, "2x2x1", 1),
        "v6e-1": (1, "1x1", 1),
        "2xv5e-16": (32, "4x4", 2),
    }
    for name in topologies.known_slices():
        sizes = [int(n) for n in topologies.parse_slice(name).shape.split("x")]
        total = 1
        for size in sizes:
            total *= size
        assert total == topologies.parse_slice(name).chips


@pytest.mark.parametrize("name", ["v5e-17", "v5p-3", "v9-8", "v5e", "0xv5e-16", ""])
def test_an_unknown_slice_is_an_error_that_lists_the_known_ones(name):
    with pytest.raises(topologies.TopologyError, match=r"not known.*v5e-16.*v5p-128"):
        topologies.parse_slice(name)


def test_a_mesh_that_does_not_divide_is_told_with_its_numbers_before_any_compile(tiny, no_compiler, capsys):
    with pytest.raises(MeshError, match=r"tensor=3.*16|3.*16"):
        run_compile(tiny, ["mesh.tensor=3", "mesh.fsdp=-1"], topology="v5e-16")
    assert main(["compile", tiny, "--topology", "v5e-99"]) == 2
    assert "v5e-16" in capsys.readouterr().err


def test_a_batch_that_does_not_divide_is_told_before_any_compile(tiny, no_compiler, monkeypatch):
    monkeypatch.setattr(compiling, "compile_stage", None)  # never called
    with pytest.raises(MeshError, match=r"`dpo.batch_size` 6 .* over 16 parts of the mesh, 10 of 16 padding"):
        run_compile(tiny, ["mesh.fsdp=16", "mesh.tensor=1", "dpo.batch_size=6"], topology="v5e-16")


def test_every_chip_has_numbers_and_every_tpu_a_price():
    for kind in ("v4", "v5e", "v5p", "v6e"):
        chip = topologies.read_chip(kind)
        assert 1e14 < chip.flops < 1e15
        assert 1e10 < chip.hbm < 2e11
        assert chip.price
        assert chip.priced
    with pytest.raises(topologies.TopologyError, match="no chip"):
        topologies.read_chip("abacus")


# ---- models ------------------------------------------------------------------------------------------------------


def test_the_tables_models_have_the_sizes_of_their_names():
    from laif_jax.config import load_config
    from laif_jax.config.load import describes

    path = CONFIGS / "yardstick" / "llama2_7b_sft.yaml"
    sizes = {}
    for source in ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-70b-hf",
                   "mistralai/Mistral-7B-v0.1", "mistralai/Mixtral-8x7B-v0.1", "01-ai/Yi-6B",
                   "deepseek-ai/deepseek-llm-7b-base"):  # fmt: skip
        config = load_config(path, [f"model.source={source}"], describes(path))
        mesh = topologies.abstract_mesh(MeshSpec(), topologies.parse_slice("v5e-16"))
        cfg = programs.architecture(config)
        tree = programs.abstract_params(programs.param_specs(cfg), mesh, "float32")
        sizes[source.split("/")[1]] = round(programs.bytes_per_chip(tree) * 16 / 4e9, 2)
    assert sizes == {
        "Llama-2-7b-hf": 6.74,
        "Llama-2-13b-hf": 13.02,
        "Llama-2-70b-hf": 68.98,
        "Mistral-7B-v0.1": 7.24,
        "Mixtral-8x7B-v0.1": 46.7,
        "Yi-6B": 6.06,
        "deepseek-llm-7b-base": 6.91,
    }


# ---- estimates ---------------------------------------------------------------------------------------------------


def test_every_stage_is_estimated_without_the_compiler_and_says_so(tiny, no_compiler):
    status, text = run_compile(tiny, topology="v5e-4", as_json=True)
    found = json.loads(text)
    assert status == 0
    assert (found["chips"], found["mesh"]) == (4, {"fsdp": 2, "tensor": 2})
    assert set(found["stages"]) == {"sft", "reward", "dpo", "ppo", "sample"}
    for stage in found["stages"].values():
        assert stage.keys() >= FIELDS
        assert stage["estimate"]
        assert stage["argument_bytes"] > 0
        assert 0 < stage["mfu_bound"] < 1
    text = run_compile(tiny, topology="v5e-4", stages=["sft"])[1]
    assert "ESTIMATE" in text


def test_an_estimate_can_be_had_where_there_is_a_compiler(tiny, monkeypatch):
    monkeypatch.setattr(
        topologies, "tpu_devices", lambda found: pytest.fail("asked the compiler for devices")
    )
    text = run_compile(tiny, topology="v5e-4", stages=["dpo"], as_json=True, estimates=True)[1]
    assert json.loads(text)["stages"]["dpo"]["estimate"]
    with pytest.raises(topologies.TopologyError, match="--topology"):
        run_compile(tiny, stages=["dpo"], estimates=True)


def test_the_yardsticks_arguments_and_work_are_known_without_the_compiler(no_compiler):
    path = str(CONFIGS / "yardstick" / "llama2_7b_sft.yaml")
    stage = json.loads(run_compile(path, topology="v5e-16", as_json=True)[1])["stages"]["sft"]
    assert stage["argument_bytes"] == pytest.approx(5.054e9, rel=1e-3)  # 6.74e9 x 12 bytes / 16
    # 6 N D with the forward pass once more, and attention.
    assert stage["step_flops"] == pytest.approx(8 * 6.61e9 * 65536 / 16, rel=0.06)
    assert stage["fits"]


# ---- compiled ----------------------------------------------------------------------------------------------------


def test_this_machines_devices(tiny):
    status, text = run_compile(tiny, ["mesh.fsdp=2", "mesh.tensor=4"], stages=["sft"], as_json=True)
    stage = json.loads(text)["stages"]["sft"]
    assert not stage["estimate"]
    assert stage["temp_bytes"] > 0
    assert stage["collectives"]["all-gather"]["runs"] >= stage["collectives"]["all-gather"]["count"] > 0
    assert status == 0


needs_tpu_compiler = pytest.mark.skipif(
    not topologies.has_tpu_compiler(), reason="libtpu is not installed (pip install 'laif_jax[aot]')"
)


def compiled(config, *arguments):
    """The stages that `laif compile CONFIG ARGUMENTS --json` tells of; a process of its own, for the compiler stays."""
    environ = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    command = [sys.executable, "-m", "laif_jax.cli", "compile", str(config), *arguments, "--json"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    stages = json.loads(done.stdout)["stages"]
    for stage in stages.values():
        assert stage.keys() >= FIELDS
        assert not stage["estimate"]
        assert stage["fits"]
        assert 0 < stage["peak_bytes"] < stage["hbm_bytes"]
        assert stage["temp_bytes"] > 0
        assert stage["flops"] > 0
        assert 0 < stage["mfu_bound"] < 1
    return stages


@needs_tpu_compiler
def test_a_step_is_compiled_for_a_tpu_slice_and_kept(tiny, tmp_path):
    folder = tmp_path / "executables"
    stage = compiled(tiny, "--topology", "v5e-4", "--stage", "sft", "--save", str(folder))["sft"]
    assert stage["hbm_bytes"] == 2**34
    assert any(stage["collectives"])
    assert len(list(folder.glob("*.executable"))) == 1


@needs_tpu_compiler
@pytest.mark.parametrize(
    ("stage", "topology"), [("dpo", "v5p-8"), ("sample", "v6e-4"), ("reward", "v4-8"), ("sft", "2xv5e-4")]
)
def test_stages_are_compiled_for_every_kind_of_chip_and_for_two_slices(stage, topology, tiny):
    assert set(compiled(tiny, "mesh.data=-1", "--topology", topology, "--stage", stage)) == {stage}


@pytest.mark.slow
@needs_tpu_compiler
def test_every_stage_of_a_mistral_7b_is_compiled_for_64_chips():
    stages = compiled(CONFIGS / "paper" / "mistral7b.yaml", "--topology", "v5e-64")
    assert set(stages) == {"sft", "reward", "dpo", "ppo", "sample"}


def test_what_does_not_fit_is_told_with_the_compilers_numbers():
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.30G) exceeds "
        "available HBM (15.75G)."
    )
    program = programs.Program("train", None, (), 1, 1.0)
    base = compiling.ProgramReport("train", True, argument_bytes=5e9, hbm_bytes=2**34)
    report = compiling._refused(base, program, text, 1.0)
    assert not report.fits
    assert report.temp_bytes == pytest.approx(19.30 * 2**30)
    chip = topologies.read_chip("v5e")
    shown = table([compiling.StageReport("sft", (report,), chip, 16)], "title")
    assert "NO" in shown
    assert "15.75G" in shown
    assert compiling.is_out_of_memory(RuntimeError(text))
    assert not compiling.is_out_of_memory(RuntimeError("INVALID_ARGUMENT"))


# ---- search ------------------------------------------------------------------------------------------------------


def test_the_search_finds_the_largest_batch_and_the_cheapest_remat(tiny, monkeypatch):
    """Against a chip on which rows x what is kept may not pass a limit."""
    kept = {"none": 8, "dots": 3, "full": 1}
    work = {"none": 3.0, "dots": 3.5, "full": 4.0}
    chip = topologies.read_chip("v5e")

    def pretend(config, where, stage, keep=None):
        rows = config.sft.micro_batch
        fits = rows * kept[config.model.remat] <= 100
        program = compiling.ProgramReport(
            "train", fits, examples=rows, seconds={"compute": rows * work[config.model.remat]}
        )
        return compiling.StageReport(stage, (program,), chip, 4)

    monkeypatch.setattr(compiling, "compile_stage", pretend)
    config = compiling_config(tiny)
    where = compiling.Target(
        "v5e-4", topologies.abstract_mesh(MeshSpec(), topologies.parse_slice("v5e-4")), chip
    )
    attempts = compiling.search(config, where, "sft")
    largest = max(a.micro_batch for a in attempts if a.report.fits and a.remat == "full")
    assert largest == 64  # 4, 8, ... doubled; 128 does not fit
    assert not next(a for a in attempts if a.micro_batch == 128).report.fits
    choice = compiling.best(attempts)
    assert choice is not None
    assert (choice.micro_batch, choice.remat) == (32, "dots")  # `none` would fit 8 rows, fewer than a quarter


def compiling_config(path):
    from laif_jax.config import load_config
    from laif_jax.config.load import describes

    return load_config(path, (), describes(path))


@needs_tpu_compiler
@pytest.mark.parametrize("name", ["v6e-128", "v5e-256", "v4-64", "2xv5e-16"])
def test_a_tensor_axis_may_take_a_part_of_an_axis_of_the_network(name):
    found = topologies.parse_slice(name)
    mesh = topologies.lay_mesh(MeshSpec(data=found.slices, fsdp=-1, tensor=4), found)
    assert mesh.shape["tensor"] == 4
    assert mesh.size == found.chips
    for row in mesh.devices.reshape(-1, 4):  # neighbours: within a 2 x 2 or 4 x 1 part of the network
        spread = [max(c) - min(c) for c in zip(*(device.coords for device in row))]
        assert sum(spread) <= 3
