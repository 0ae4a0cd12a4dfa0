"""GGUF import against llama.cpp (goldens) and against the checkpoint that a file was made from."""

import json
import os
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laif_jax.models import decoder, fetch, names
from laif_jax.models.arch import UnsupportedModelError
from laif_jax.models.gguf import GGUFFile, load_gguf
from laif_jax.models.model import Model, load_model, save_model
from laif_jax.models.names import WeightsError
from laif_jax.models.specs import param_specs
from tests.models import states, tiny_gguf
from tests.models.tiny_gguf import CASES

GOLDENS = Path(__file__).parent / "goldens"


def golden(name):
    return json.loads((GOLDENS / f"llama_cpp_{name}.json").read_text())


def next_logps(cfg, params, prompts):
    """Log-probs of the token after each prompt, as one right-padded batch."""
    longest = max(len(prompt) for prompt in prompts)
    tokens, segments = np.zeros((2, len(prompts), longest), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        segments[row, : len(prompt)] = 1
    positions = np.broadcast_to(np.arange(longest, dtype=np.int32), tokens.shape)
    hidden = decoder.hidden_states(
        params, cfg, jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments)
    )
    last = hidden[np.arange(len(prompts)), [len(prompt) - 1 for prompt in prompts]]
    return np.asarray(jax.nn.log_softmax(decoder.logits(params, cfg, last)))


def check_next(cfg, params, items, tolerance):
    """The golden's top tokens, in order, with log-probs within `tolerance`."""
    got = next_logps(cfg, params, [item["prompt"] for item in items])
    for row, item in zip(got, items, strict=True):
        ids, want = zip(*item["top"])
        np.testing.assert_allclose(row[list(ids)], want, atol=tolerance)
        assert row[list(ids)].min() >= np.partition(row, -len(ids))[-len(ids)] - tolerance


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """{name: (the opened file, config)} of every tiny case."""
    folder = tmp_path_factory.mktemp("gguf")
    files = {name: GGUFFile(tiny_gguf.write(folder / f"{name}.gguf", case)) for name, case in CASES.items()}
    return {name: (file, file.config()) for name, file in files.items()}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_checkpoint(name, tiny):
    """Names, row order of q and k, and Gemma's norms are undone exactly."""
    file, cfg = tiny[name]
    state = tiny_gguf.hf_state(CASES[name])
    want = names.flatten(names.from_hf_state(cfg, state))
    got = names.flatten(file.params(cfg))
    assert got.keys() == want.keys()
    for path, leaf in got.items():
        exact = not (name == "gemma3" and path[-1] == "scale")  # (1 + w) - 1 rounds
        np.testing.assert_allclose(leaf, want[path], rtol=0, atol=0 if exact else 1e-6, err_msg=str(path))


@pytest.mark.parametrize("name", CASES)
def test_next_token_log_probs_equal_llama_cpp(name, tiny):
    file, cfg = tiny[name]
    # llama.cpp computes GELU from a table of half-precision values, so Gemma agrees to that only.
    check_next(cfg, file.params(cfg), golden("tiny")[name]["next"], 1e-2 if name == "gemma3" else 2e-4)


@pytest.mark.parametrize("name", CASES)
def test_token_ids_equal_llama_cpp(name, tiny):
    tokenizer = tiny[name][0].tokenizer()
    for text, ids in golden("tiny")[name]["tokens"].items():
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text


@pytest.mark.parametrize("name", CASES)
def test_decoding_gives_the_text_back(name, tiny):
    tokenizer = tiny[name][0].tokenizer()
    for text in tiny_gguf.TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not CASES[name].prefix or CASES[name].tokenizer == "gpt2" or "<" not in text:
            assert tokenizer.decode(ids) == text


def test_markers_are_added_as_the_file_says(tiny):
    for name, adds in {"llama-spm": True, "gemma3": True, "llama3": True, "llama-gpt2": False}.items():
        tokenizer = tiny[name][0].tokenizer()
        plain = tokenizer.encode("hello", add_special_tokens=False)
        assert tokenizer.encode("hello") == ([tokenizer.bos_token_id] if adds else []) + plain
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<BOS>", "<END>", "<PAD>")


def test_config_of_each_architecture(tiny):
    llama3 = tiny["llama3"][1].ropes[0]
    assert (llama3.kind, llama3.factor, llama3.theta) == ("llama3", 8.0, 500000.0)
    linear = tiny["llama-gpt2"][1].ropes[0]
    assert (linear.kind, linear.factor) == ("linear", 4.0)
    gemma = tiny["gemma3"][1]
    assert gemma.windows == (8, 8, 8, 8, 8, 0, 8)
    assert sorted(rope.theta for rope in gemma.ropes) == [1e4, 1e6]
    assert gemma.norm_eps == 1e-6
    assert tiny["qwen2"][1].qkv_bias
    assert tiny["qwen2"][1].tie_embeddings
    assert not tiny["llama-spm"][1].tie_embeddings


@pytest.mark.parametrize("name", CASES)
def test_a_saved_import_loads_again_as_the_same_model(name, tiny, tmp_path):
    file, cfg = tiny[name]
    model = Model(cfg, file.params(cfg), file.tokenizer())
    save_model(tmp_path, model)
    again = load_model(str(tmp_path))
    assert again.cfg == cfg
    for path, leaf in names.flatten(again.params).items():
        np.testing.assert_array_equal(leaf, names.flatten(model.params)[path])
    for text in tiny_gguf.TEXTS:
        assert again.tokenizer.encode(text) == model.tokenizer.encode(text), text


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_whole_weight_is_that_of_the_parameters(name, tiny):
    """`laif convert` takes them one by one."""
    file, cfg = tiny[name]
    whole = names.from_hf_state(cfg, {tensor: file.tensor(tensor) for tensor in file.shapes()})
    for path, leaf in names.flatten(file.params(cfg)).items():
        np.testing.assert_array_equal(leaf, names.flatten(whole)[path], err_msg=str(path))


# ---- metadata and quantisation ---------------------------------------------------------------------------------


def rewrite(source, target, *, architecture="llama", change=None, quantise=None, drop=()):
    """Copies a GGUF file with some metadata changed, tensors quantised, or tensors left out."""
    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(target), architecture)
    fields = {
        key: (field.contents(), field.types)
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and key != "general.architecture"
    }
    for key, value in (change or {}).items():
        fields.pop(key, None)
        if isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for key, (value, types) in fields.items():
        sub = types[-1] if types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, types[0], sub_type=sub)
    for tensor in reader.tensors:
        value = np.array(tensor.data)
        if tensor.name in drop:
            continue
        if quantise is not None and value.ndim == 2:
            writer.add_tensor(tensor.name, gguf.quants.quantize(value, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(tensor.name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture
def small(tmp_path):
    return tiny_gguf.write(tmp_path / "small.gguf", CASES["llama-smollm"])


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("Q8_0", 0.02), ("Q4_1", 0.3), ("F16", 1e-3), ("BF16", 1e-2)]
)
def test_quantised_weights(kind, tolerance, small, tmp_path):
    """Every leaf is near the unquantised one (the rows of q and k too), and norms are exact."""
    path = rewrite(small, tmp_path / "q.gguf", quantise=gguf.GGMLQuantizationType[kind])
    cfg, got, _ = load_gguf(path)
    _, want, _ = load_gguf(small)
    for place, leaf in names.flatten(got).items():
        full = names.flatten(want)[place]
        bound = 0 if place[-1] == "scale" else tolerance * np.abs(full).max()
        np.testing.assert_allclose(leaf, full, atol=bound, rtol=0, err_msg=str(place))
    assert cfg.num_layers == 2


def test_end_of_turn_token_of_chatml_stops_generation(small, tmp_path):
    tokens = tiny_gguf.byte_level_vocab()[0]
    assert GGUFFile(small).config().eos_ids == (1,)
    reader = gguf.GGUFReader(str(small))
    renamed = ["<|im_end|>" if token == "<tag>" else token for token in tokens]
    assert reader.fields["tokenizer.ggml.tokens"].contents() == tokens
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    path = rewrite(small, tmp_path / "chat.gguf", change={"tokenizer.chat_template": template})
    file = GGUFFile(path)
    assert file.config().eos_ids == (1,)  # no such token
    original = file.value
    file.value = lambda key, default=None: renamed if key.endswith("tokens") else original(key, default)
    assert file.config().eos_ids == (1, 3)
    assert GGUFFile(path).tokenizer().chat_template == template


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_target_type_and_sharding(dtype, small):
    cfg, params, _ = load_gguf(small, dtype=states.DTYPES[dtype])
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    flat = dict.fromkeys(names.plans(cfg), placed)
    _, sharded, _ = load_gguf(small, dtype=states.DTYPES[dtype], shardings=names.unflatten(flat))
    for path, leaf in names.flatten(sharded).items():
        assert leaf.dtype == states.DTYPES[dtype]
        assert leaf.sharding == placed
        np.testing.assert_array_equal(leaf, names.flatten(params)[path])


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
def test_a_sharded_import_dequantises_each_devices_part_alone(kind, small, tmp_path, monkeypatch):
    """The same weights, whatever axes are cut and wherever the blocks of a row end, and never a leaf as a whole."""
    path = rewrite(small, tmp_path / "q.gguf", quantise=gguf.GGMLQuantizationType[kind])
    cfg, want, _ = load_gguf(path)
    axes = {"vocab": "tensor", "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shardings = jax.tree.map(
        lambda spec: jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(*[axes.get(axis) for axis in spec.logical_axes])
        ),
        param_specs(cfg),
        is_leaf=lambda leaf: hasattr(leaf, "logical_axes"),
    )
    made = []
    dequantize = gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", lambda *a: made.append(value := dequantize(*a)) or value)
    _, got, _ = load_gguf(path, shardings=shardings)
    placed = names.flatten(shardings)
    for place, leaf in names.flatten(got).items():
        assert leaf.sharding == placed[place]
        np.testing.assert_array_equal(leaf, names.flatten(want)[place], err_msg=str(place))
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    widest = -(-cfg.hidden_size // 4 // block) * block
    assert max(part.size for part in made) <= max(cfg.vocab_size, cfg.intermediate_size) // 2 * widest


# ---- files that are not right ----------------------------------------------------------------------------------


def test_truncated_at_every_kind_of_place(small, tmp_path):
    raw = small.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [4, 7, 20, 30, *range(100, len(raw), len(raw) // 25), len(raw) - 1]:
        path.write_bytes(raw[:size])
        with pytest.raises(WeightsError, match="cut short or malformed") as caught:
            GGUFFile(path)
        assert str(path) in str(caught.value)
        assert f"{size} bytes" in str(caught.value)


def test_missing_file_and_other_files(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        GGUFFile(tmp_path / "none.gguf")
    (tmp_path / "page.gguf").write_text("<!DOCTYPE html>")
    with pytest.raises(WeightsError, match="not a GGUF file"):
        GGUFFile(tmp_path / "page.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(WeightsError, match="not a GGUF file"):
        GGUFFile(tmp_path / "empty.gguf")


def test_missing_tensor_is_named(small, tmp_path):
    path = rewrite(small, tmp_path / "less.gguf", drop=("blk.1.ffn_up.weight",))
    file = GGUFFile(path)
    with pytest.raises(WeightsError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        file.params(file.config())


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"llama.expert_count": 8}, UnsupportedModelError, "expert_count"),
        ({"llama.block_count": None}, WeightsError, "lacks llama.block_count"),
        ({"llama.rope.dimension_count": 4}, UnsupportedModelError, "partial rotary"),
        ({"llama.rope.scaling.type": "longrope"}, UnsupportedModelError, "longrope"),
    ],
)
def test_metadata_that_cannot_be_used(change, error, says, small, tmp_path):
    with pytest.raises(error, match=says):
        GGUFFile(rewrite(small, tmp_path / "odd.gguf", change=change)).config()


def test_unknown_architecture_and_tokenizers(small, tmp_path):
    with pytest.raises(UnsupportedModelError, match="'mamba' is not supported"):
        GGUFFile(rewrite(small, tmp_path / "mamba.gguf", architecture="mamba"))
    odd = rewrite(small, tmp_path / "pre.gguf", change={"tokenizer.ggml.pre": "new-one"})
    with pytest.raises(WeightsError, match="pre-tokenizer 'new-one' is unknown"):
        GGUFFile(odd).tokenizer()
    odd = rewrite(small, tmp_path / "kind.gguf", change={"tokenizer.ggml.model": "rwkv"})
    with pytest.raises(WeightsError, match="kind 'rwkv' is unknown"):
        GGUFFile(odd).tokenizer()


def test_rope_divisors_that_no_setting_explains(tmp_path):
    case = CASES["llama3"]
    path = tiny_gguf.write(tmp_path / "a.gguf", case)
    raw = path.read_bytes()
    known = tiny_gguf.llama3_divisors(case.head_dim, 500000.0, 8.0).tobytes()
    assert raw.count(known) == 1
    path.write_bytes(raw.replace(known, np.array([1, 3, 2, 8], np.float32).tobytes()))
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        GGUFFile(path).config()


# ---- the real model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    known = fetch.KNOWN["smollm2-135m"]
    path = Path(os.environ.get(known.variable) or fetch.cache_dir() / known.filename)
    if not path.exists():
        pytest.skip(f"no {path}: run `laif fetch smollm2-135m`, or name the file in {known.variable}")
    return GGUFFile(path)


@pytest.mark.real
def test_smollm2_log_probs_equal_llama_cpp(smollm2):
    cfg = smollm2.config()
    check_next(cfg, smollm2.params(cfg), golden("smollm2")["next"], 0.02)


@pytest.mark.real
def test_smollm2_token_ids_equal_llama_cpp(smollm2):
    tokenizer = smollm2.tokenizer()
    for text, ids in golden("smollm2")["tokens"].items():
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.decode(ids) == text


@pytest.mark.real
def test_smollm2_chat_template_and_stop_token(smollm2):
    tokenizer = smollm2.tokenizer()
    messages = [{"role": "user", "content": "Name three primary colours."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text in golden("smollm2")["tokens"]
    assert smollm2.config().eos_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
