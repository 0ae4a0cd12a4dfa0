"""Whole models in and out: folders, sources, tokenizers, conversion."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from laif_jax.config.schema import LoraSpec
from laif_jax.models import lora, names
from laif_jax.models.arch import UnsupportedModelError
from laif_jax.models.config import from_hf
from laif_jax.models.convert import convert
from laif_jax.models.model import Model, load_config, load_model, resolve, save_model
from laif_jax.models.specs import param_specs
from laif_jax.models.tokenizer import TokenizerError, load_tokenizer, save_tokenizer
from laif_jax.models.weights import WeightsError
from laif_jax.worlds.symbols import CHARSET
from tests.models import goldens, states, tiny_gguf

TEXT = "rev sort:dbac"


def tiny_model(family="llama", **changes) -> Model:
    cfg = states.tiny_config(family, vocab_size=len(load_tokenizer("symbols")), **changes)
    specs = names.flatten(param_specs(cfg))
    rng = np.random.default_rng(0)
    flat = {path: jnp.asarray(rng.normal(size=s.shape), jnp.float32) for path, s in specs.items()}
    return Model(cfg, names.unflatten(flat), load_tokenizer("symbols"))


def same_params(a, b):
    a, b = names.flatten(a), names.flatten(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(b[path]), err_msg=str(path))


# ---- folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", states.FAMILIES)
def test_saved_model_loads_as_it_was(family, tmp_path):
    model = tiny_model(family)
    save_model(tmp_path, model)
    again = load_model(str(tmp_path))
    assert again.cfg == model.cfg
    same_params(again.params, model.params)
    assert again.tokenizer.encode(TEXT) == model.tokenizer.encode(TEXT)
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("name", goldens.CASES)
def test_export_has_the_names_and_shapes_of_transformers(name, tmp_path):
    """The goldens list what `transformers` itself holds (and tests/tools/check_export.py loads our export there)."""
    cfg, params = goldens.model(name)
    exported = names.to_hf_state(cfg, params)
    want = {key: tuple(shape) for key, shape in goldens.CASES[name]["shapes"].items()}
    assert {key: value.shape for key, value in exported.items()} == want


def test_adapters_are_merged_on_export(tmp_path):
    base = tiny_model()
    cfg = from_hf(
        states.hf_config("llama", vocab_size=base.cfg.vocab_size),
        lora=LoraSpec(rank=2, targets=("q", "down")),
    )
    random = np.random.RandomState(0)
    flat = names.flatten(base.params)
    for path, spec in names.flatten(param_specs(cfg)).items():
        if path[-1].startswith("lora"):
            flat[path] = jnp.asarray(random.standard_normal(spec.shape), jnp.float32)
    save_model(tmp_path, Model(cfg, names.unflatten(flat), base.tokenizer))
    got = names.flatten(load_model(str(tmp_path)).params)
    want = names.flatten(lora.merge_lora(names.unflatten(flat), cfg))
    assert got.keys() == want.keys()
    for path, leaf in got.items():
        np.testing.assert_allclose(leaf, want[path], rtol=1e-6, err_msg=str(path))
    changed = {
        path[-2] for path, leaf in got.items() if not np.array_equal(leaf, names.flatten(base.params)[path])
    }
    assert changed == {"q", "down"}


def test_adapters_on_coarse_weights_are_merged_in_the_type_of_the_export(tmp_path):
    """An update below the resolution of frozen bfloat16 weights is not lost in a float32 export."""
    base = tiny_model()
    cfg = from_hf(
        states.hf_config("llama", vocab_size=base.cfg.vocab_size), lora=LoraSpec(rank=2, targets=("q",))
    )
    flat = {path: leaf.astype(jnp.bfloat16) for path, leaf in names.flatten(base.params).items()}
    kernel = np.asarray(flat["layers", "attn", "q", "kernel"], np.float32)
    for path, spec in names.flatten(param_specs(cfg)).items():
        if path[-1].startswith("lora"):
            flat[path] = jnp.full(spec.shape, 1e-3, jnp.float32)
    save_model(tmp_path, Model(cfg, names.unflatten(flat), base.tokenizer), dtype=np.float32)
    got = np.asarray(load_model(str(tmp_path)).params["layers"]["attn"]["q"]["kernel"])
    update = cfg.lora.alpha / cfg.lora.rank * 2 * 1e-6  # rank 2
    np.testing.assert_allclose(got, kernel + np.float32(update), rtol=1e-6)
    assert np.mean(got != kernel) > 0.9


def test_end_of_sequence_ids_of_generation_config_are_added(tmp_path):
    save_model(tmp_path, tiny_model())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert load_config(tmp_path).eos_ids == (2, 7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert load_config(tmp_path).eos_ids == (2, 5)
    save_model(tmp_path / "again", load_model(str(tmp_path)))
    assert load_config(tmp_path / "again").eos_ids == (2, 5)


def test_shardings_by_mesh_function_or_tree(tmp_path):
    model = tiny_model()
    save_model(tmp_path, model)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def tree(cfg):
        return names.unflatten(dict.fromkeys(names.plans(cfg), everywhere))

    for options in ({"mesh": mesh}, {"shardings": tree}, {"shardings": tree(model.cfg)}):
        params = load_model(str(tmp_path), **options).params
        same_params(params, model.params)
        assert all(leaf.sharding.mesh == mesh for leaf in names.flatten(params).values())


def test_what_is_missing_or_broken_in_a_folder_is_said(tmp_path):
    save_model(tmp_path, tiny_model())
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config\.json: no such file"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(config[:-9])
    with pytest.raises(WeightsError, match="not valid JSON"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(config), "model_type": "mamba"}))
    with pytest.raises(UnsupportedModelError, match="mamba"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(config)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        load_model(str(tmp_path))
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_model(str(tmp_path))


def test_tokenizer_of_another_model_is_refused(tmp_path):
    save_model(tmp_path / "model", tiny_model())
    case = tiny_gguf.CASES["llama-smollm"]
    path = tiny_gguf.write(tmp_path / "other.gguf", case)
    with pytest.raises(WeightsError, match="do not belong together"):
        load_model(str(tmp_path / "model"), tokenizer=str(path))


def test_unknown_sources(tmp_path):
    for source in ("no-such-model", str(tmp_path / "nowhere")):
        with pytest.raises(WeightsError, match=r"no such model.*smollm2-135m"):
            resolve(source)
        with pytest.raises(TokenizerError, match="no such tokenizer"):
            load_tokenizer(source)


# ---- conversion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", states.DTYPES)
def test_convert_from_gguf_and_between_types(dtype, tmp_path):
    case = tiny_gguf.CASES["qwen2"]
    path = tiny_gguf.write(tmp_path / "m.gguf", case)
    convert(str(path), tmp_path / "full")
    state = tiny_gguf.hf_state(case)
    states.same_bytes(load_file(tmp_path / "full/model.safetensors"), state)
    convert(str(tmp_path / "full"), tmp_path / "small", states.DTYPES[dtype], max_shard_bytes=20_000)
    merged = {}
    for file in (tmp_path / "small").glob("model-*.safetensors"):
        merged |= load_file(file)
    states.same_bytes(merged, {name: value.astype(states.DTYPES[dtype]) for name, value in state.items()})
    assert json.loads((tmp_path / "small/config.json").read_text())["dtype"] == dtype
    ids = load_tokenizer(str(path)).encode("Hello world 123")
    assert load_tokenizer(str(tmp_path / "small")).encode("Hello world 123") == ids


def test_of_several_processes_one_converts_unless_each_has_its_own_folder(tmp_path, monkeypatch):
    path = str(tiny_gguf.write(tmp_path / "m.gguf", tiny_gguf.CASES["qwen2"]))
    convert(path, tmp_path / "first")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    convert(path, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()
    convert(path, tmp_path / "own", everywhere=True)
    written = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("first", "own")]
    assert written[0] == written[1]
    assert "model.safetensors" in written[1]


def test_convert_to_a_type_that_weights_do_not_have(tmp_path):
    path = tiny_gguf.write(tmp_path / "m.gguf", tiny_gguf.CASES["qwen2"])
    with pytest.raises(WeightsError, match="type int8 cannot be written; choose float32"):
        convert(str(path), tmp_path / "out", "int8")


# ---- tokenizers ------------------------------------------------------------------------------------------------


def test_symbols_tokenizer_has_one_token_per_character(tmp_path):
    tokenizer = load_tokenizer("symbols")
    ids = tokenizer.encode(CHARSET)
    assert len(set(ids)) == len(CHARSET)
    assert tokenizer.decode(ids) == CHARSET
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<pad>", "<eos>"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert len(tokenizer) == len(CHARSET) + 5
    assert tokenizer.encode("A\n") == [tokenizer.unk_token_id] * 2
    save_tokenizer(tmp_path, tokenizer)
    assert load_tokenizer(str(tmp_path)).encode(TEXT) == tokenizer.encode(TEXT)


def test_symbols_chat_template():
    tokenizer = load_tokenizer("symbols")
    dialogue = [{"role": "user", "content": "rev:ab"}, {"role": "assistant", "content": "ba"}]
    prompt = tokenizer.apply_chat_template(dialogue[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<user>rev:ab<assistant>"
    whole = tokenizer.apply_chat_template(dialogue, tokenize=False)
    assert whole == prompt + "ba<eos>"
    ids = tokenizer.encode(whole)
    assert len(ids) == 1 + 6 + 1 + 2 + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "rev:abba"


def test_saved_tokenizer_names_the_class_that_every_transformers_knows(tmp_path):
    save_tokenizer(tmp_path, load_tokenizer("symbols"))
    assert (
        json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
