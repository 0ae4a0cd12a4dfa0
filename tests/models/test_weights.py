"""Safetensors in and out: round trips, shards, sharded loading, what is read, and files that are not right."""

import errno
import io
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from laif_jax.models import names, safetensors
from laif_jax.models.config import from_hf
from laif_jax.models.weights import WeightsError, load_params, save_params
from tests.models import states


def write_state(folder, state, files=1):
    """Writes a state with the reference implementation of the format, cut into `files` files."""
    folder.mkdir(parents=True, exist_ok=True)
    if files == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    ordered, weight_map = sorted(state), {}
    for i in range(files):
        name = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = {key: state[key] for key in ordered[i::files]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


@pytest.mark.parametrize("dtype", states.DTYPES)
@pytest.mark.parametrize("family", states.FAMILIES)
def test_import_then_export_is_byte_identical(family, dtype, tmp_path):
    cfg = states.tiny_config(family)
    state = states.random_state(cfg, dtype=dtype)
    write_state(tmp_path / "in", state)
    params = load_params(tmp_path / "in", cfg, dtype=states.DTYPES[dtype])
    save_params(tmp_path / "out", params, cfg)
    states.same_bytes(load_file(tmp_path / "out/model.safetensors"), state)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == dtype
    assert from_hf(config) == cfg


@pytest.mark.parametrize("source", states.DTYPES)
@pytest.mark.parametrize("target", states.DTYPES)
def test_any_type_into_any_type(source, target, tmp_path):
    cfg = states.tiny_config("qwen2")
    state = states.random_state(cfg, dtype=source)
    write_state(tmp_path, state, files=3)
    params = load_params(tmp_path, cfg, dtype=states.DTYPES[target])
    want = {name: value.astype(states.DTYPES[target]) for name, value in state.items()}
    states.same_bytes(names.to_hf_state(cfg, params), want)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("files", [1, 3])
def test_one_file_or_many_local_or_not(files, remote, tmp_path, monkeypatch):
    if remote:  # ranged reads instead of a memory map
        monkeypatch.setattr(safetensors, "is_local", lambda path: False)
    cfg = states.tiny_config("gpt_neox")
    state = states.random_state(cfg)
    write_state(tmp_path, state, files)
    params = load_params(tmp_path, cfg)
    states.same_bytes(names.to_hf_state(cfg, params), state)


def test_large_models_are_cut_into_shards_with_an_index(tmp_path):
    cfg = states.tiny_config("llama")
    state = states.random_state(cfg)
    params = names.from_hf_state(cfg, state)
    limit = 6000
    save_params(tmp_path, params, cfg, max_shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files == sorted(set(index["weight_map"].values()))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    merged = {}
    for file in files:
        part = load_file(tmp_path / file)
        assert sum(value.nbytes for value in part.values()) <= limit
        assert all(index["weight_map"][name] == file for name in part)
        merged |= part
    states.same_bytes(merged, state)
    # A later, unsharded save leaves nothing of it behind, nor of one that was killed.
    (tmp_path / ".model-00001-of-00009.safetensors.tmp").write_bytes(b"half")
    save_params(tmp_path, params, cfg)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["config.json", "model.safetensors"]
    states.same_bytes(names.to_hf_state(cfg, load_params(tmp_path, cfg)), state)


def test_export_in_another_type(tmp_path):
    cfg = states.tiny_config("gemma2")
    state = states.random_state(cfg)
    save_params(tmp_path, names.from_hf_state(cfg, state), cfg, dtype=jnp.bfloat16)
    want = {name: value.astype(ml_dtypes.bfloat16) for name, value in state.items()}
    states.same_bytes(load_file(tmp_path / "model.safetensors"), want)


# ---- sharded ---------------------------------------------------------------------------------------------------

_SHARDED = """
import sys, numpy as np, jax
from jax.sharding import NamedSharding, PartitionSpec as P
from laif_jax.models import names, safetensors, weights
from tests.models import states

folder, remote = sys.argv[1], sys.argv[2] == "remote"
assert jax.device_count() == 8
if remote:
    safetensors.is_local = lambda path: False
cfg = states.tiny_config("llama", layers=2)
auto = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=auto)
axes = {"vocab": None, "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
from laif_jax.models.specs import param_specs
specs = names.flatten(param_specs(cfg))
shardings = {p: NamedSharding(mesh, P(*[axes.get(a) for a in s.logical_axes])) for p, s in specs.items()}

reads = []  # (tensor, elements of one read)
original = safetensors.SafetensorsFile.read
def counted(self, name, factored, index):
    block = original(self, name, factored, index)
    reads.append((name, block.size))
    return block
safetensors.SafetensorsFile.read = counted
totals, kept = [], []
forget = weights.Checkpoint.forget
weights.Checkpoint.forget = lambda self: (totals.append(self.bytes_read), forget(self))
fetch = safetensors.SafetensorsFile._fetch
def fetched(self, start, stop):
    block = fetch(self, start, stop)
    spans = sorted(self._rows)
    kept.append(len({name for name, e in self.entries.items() if any(e.start <= a < e.stop for a, _ in spans)}))
    return block
safetensors.SafetensorsFile._fetch = fetched
params = weights.load_params(folder, cfg, shardings=names.unflatten(shardings))
flat = names.flatten(params)
for path, leaf in flat.items():
    assert leaf.sharding == shardings[path], path
sizes = {name: int(np.prod(shape)) for name, shape in states.shapes(cfg).items()}
matrices = [(name, count) for name, count in reads if "norm" not in name]
parts = {"lm_head.weight": 4, "model.embed_tokens.weight": 4}
for name, count in matrices:
    assert count * parts.get(name, 8) == sizes[name], (name, count, sizes[name])
# Every byte once, though each slice of the embeddings is on two devices and norms are on all of them.
assert totals[-1] == 4 * sum(sizes.values()), (totals[-1], 4 * sum(sizes.values()))
# Rows of one tensor are kept at most: never those of all layers of a leaf.
assert kept and max(kept) <= 1 if remote else not kept, kept
weights.save_params(folder + "/out", params, cfg)
print("sharded ok")
"""


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_shards_are_read_by_their_own_byte_ranges(kind, tmp_path):
    """8 simulated devices: no read is larger than a device's part, and no byte is read twice."""
    cfg = states.tiny_config("llama")
    state = states.random_state(cfg, seed=3)
    write_state(tmp_path, state, files=2)
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _SHARDED, str(tmp_path), kind]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "sharded ok", done.stderr[-2000:]
    states.same_bytes(load_file(tmp_path / "out/model.safetensors"), state)


def test_a_part_of_a_remote_tensor_fetches_its_rows_only(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "is_local", lambda path: False)
    value = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    save_file({"w": value}, tmp_path / "model.safetensors")
    file = safetensors.SafetensorsFile(tmp_path / "model.safetensors")
    got = file.read("w", (4, 2, 6), (slice(1, 3), slice(0, 1), slice(2, 5)))
    np.testing.assert_array_equal(got, value.reshape(4, 2, 6)[1:3, 0:1, 2:5])
    assert file.bytes_read == value.nbytes // 2
    file.read("w", (4, 2, 6), (slice(1, 3), slice(1, 2), slice(0, 6)))
    assert file.bytes_read == value.nbytes // 2  # the same rows, already here
    file.forget()
    file.read("w", (8, 6), (slice(0, 1), slice(0, 6)))
    assert file.bytes_read == value.nbytes // 2 + value.nbytes // 8


# ---- files that are not right ----------------------------------------------------------------------------------


def _folder(tmp_path, files=1):
    cfg = states.tiny_config("llama")
    write_state(tmp_path, states.random_state(cfg), files)
    return cfg


def _fails(tmp_path, cfg, *parts):
    with pytest.raises(WeightsError) as caught:
        load_params(tmp_path, cfg)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert all(part in message for part in parts), message


def test_missing_folder_and_missing_files(tmp_path):
    cfg = _folder(tmp_path / "model", files=3)
    _fails(tmp_path / "nowhere", cfg, "no such folder")
    (tmp_path / "empty").mkdir()
    _fails(tmp_path / "empty", cfg, "model.safetensors.index.json", "copy the weights there")
    (tmp_path / "empty/pytorch_model.bin").write_bytes(b"x")
    _fails(tmp_path / "empty", cfg, "pytorch_model.bin", "convert it to safetensors")
    (tmp_path / "model/model-00002-of-00003.safetensors").unlink()
    _fails(
        tmp_path / "model", cfg, "1 of the 3 weight files", "model-00002-of-00003.safetensors", "Copy them"
    )


def test_truncated_at_every_kind_of_place(tmp_path):
    cfg = _folder(tmp_path)
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    for size in (0, 5, 8, 30, header - 1, header, header + 10, len(raw) - 1):
        path.write_bytes(raw[:size])
        _fails(tmp_path, cfg, "opy or download the file again")


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{not json", "not valid JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"w": {"dtype": "F32", "shape": [2]}}', "entry for w is malformed"),
        (b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 0]}}', "byte range of w is malformed"),
        (b'{"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', "does not fit its byte range"),
        (b'{"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}', "cut short: w ends at byte"),
    ],
)
def test_bad_headers(header, says, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    _fails(tmp_path, states.tiny_config("llama"), says, "Copy or download the file again")


def test_an_error_page_instead_of_weights(tmp_path):
    (tmp_path / "model.safetensors").write_text("<!DOCTYPE html><html>Not found</html>")
    _fails(tmp_path, states.tiny_config("llama"), "not a safetensors file")


def test_bad_index_and_double_tensors(tmp_path):
    cfg = _folder(tmp_path, files=2)
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text[:-5])
    _fails(tmp_path, cfg, "not a weight index")
    index.write_text(text)
    first = load_file(tmp_path / "model-00001-of-00002.safetensors")
    second = load_file(tmp_path / "model-00002-of-00002.safetensors")
    twice = next(iter(first))
    save_file({**second, twice: first[twice]}, tmp_path / "model-00002-of-00002.safetensors")
    _fails(tmp_path, cfg, twice, "Remove the file")


def test_weights_that_do_not_fit_the_config(tmp_path):
    cfg = states.tiny_config("llama")
    state = states.random_state(cfg)
    state["model.norm.weight"] = np.zeros(5, np.float32)
    del state["lm_head.weight"]
    write_state(tmp_path, state)
    _fails(tmp_path, cfg, "lm_head.weight", "model.norm.weight has shape (5,)", "Check that config.json")


def test_types_that_are_no_plain_weights(tmp_path):
    cfg = states.tiny_config("llama")
    state = states.random_state(cfg)
    state["lm_head.weight"] = state["lm_head.weight"].astype(np.int8)
    write_state(tmp_path, state)
    _fails(tmp_path, cfg, "lm_head.weight has type I8", "Convert the checkpoint")


# ---- writing ---------------------------------------------------------------------------------------------------


class _FullDisk(io.FileIO):
    """A file on a disk with room for 5000 bytes."""

    written = 0

    def write(self, data):
        _FullDisk.written += memoryview(data).nbytes
        if _FullDisk.written > 5000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    cfg = states.tiny_config("llama")
    old, new = states.random_state(cfg, seed=0), states.random_state(cfg, seed=1)
    save_params(tmp_path, names.from_hf_state(cfg, old), cfg)
    real = type(epath.Path(tmp_path)).open

    def opened(self, mode="r", **options):
        return _FullDisk(str(self), "w") if mode == "wb" else real(self, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path(tmp_path)), "open", opened)
        with pytest.raises(OSError, match="No space left on device") as caught:
            save_params(tmp_path, names.from_hf_state(cfg, new), cfg)
    assert str(tmp_path) in str(caught.value)
    assert "Free space" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    states.same_bytes(load_file(tmp_path / "model.safetensors"), old)


def test_scalars_of_every_shape_survive(tmp_path):
    """Our writer against the reference reader, with odd shapes and types."""
    values = {
        "a": np.float32(3).reshape(()),
        "b": np.arange(7, dtype=np.float16),
        "c": np.ones((2, 0, 3), np.float32),
        "d": np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3).T,
    }
    described = {name: (value.shape, value.dtype) for name, value in values.items()}
    size = safetensors.write_file(tmp_path / "x.safetensors", described, iter(values.items()))
    assert size == (tmp_path / "x.safetensors").stat().st_size
    states.same_bytes(load_file(tmp_path / "x.safetensors"), values)
    file = safetensors.SafetensorsFile(tmp_path / "x.safetensors")
    for name, value in values.items():
        whole = (slice(None),) * max(value.ndim, 1)
        got = file.read(name, value.shape or (1,), whole)
        np.testing.assert_array_equal(got.reshape(value.shape), value)
