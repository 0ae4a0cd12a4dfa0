"""Reward models: scalar heads against `transformers`, where they are read, ensembles, folders, adapters."""

import dataclasses
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.config.rl import RewardSpec
from laif_jax.config.schema import LoraSpec, ScratchSpec
from laif_jax.models import attention, names
from laif_jax.models.arch import UnsupportedModelError
from laif_jax.models.config import from_hf, scratch, to_hf
from laif_jax.models.convert import convert
from laif_jax.models.decoder import hidden_states, init_params, logits
from laif_jax.models.heads import segment_scores, token_logps, token_scores, token_stats
from laif_jax.models.lora import add_lora, trainable_mask
from laif_jax.models.model import Model, load_model, save_model
from laif_jax.models.reward import (
    RewardModel,
    change_head,
    load_reward_model,
    member,
    reward_scores,
    reward_specs,
    save_reward_model,
    start_reward_model,
)
from laif_jax.models.reward_adapters import base_fingerprint, load_reward_adapters
from laif_jax.models.safetensors import SafetensorsFile
from laif_jax.models.specs import param_specs
from laif_jax.models.tokenizer import symbols_tokenizer
from laif_jax.models.weights import WeightsError
from tests.models import goldens
from tests.models.golden_state import draw
from tests.models.goldens import CASES, FOLDER, LENGTHS, packed, quick_jit, rows

GOLDEN = json.loads((FOLDER / "rewards.json").read_text())
FAMILIES = ("smollm2", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "pythia")
HEADS = ("lm_head.weight", "embed_out.weight")
SIZES = ScratchSpec(
    hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, max_position=64
)
EOC = "<end>"
LORA = LoraSpec(rank=2, targets=("q", "down"))


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Many small programs whose numbers are compared to a tolerance need no machine-code optimisation."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def classifier(name):
    """(configuration, parameters, state dict) of a golden model with one label, from names and shapes of
    `transformers`."""
    case = CASES[name]
    cfg = dataclasses.replace(from_hf(case["config"]), head="score", pad_id=98)
    shapes = {key: shape for key, shape in case["shapes"].items() if key not in HEADS}
    shapes["score.weight"] = [1, cfg.hidden_size]
    state = {key: draw(key, tuple(shape), cfg.unit_offset) for key, shape in shapes.items()}
    return cfg, jax.tree.map(jnp.asarray, names.from_hf_state(cfg, state)), state


def golden_reward_model(name, tokenizer) -> RewardModel:
    cfg, params, _ = classifier(name)
    return RewardModel(cfg, params, tokenizer)


def policy(seed=0, lora=None) -> Model:
    return Model(*weights(seed, lora), symbols_tokenizer())


@cache
def weights(seed, lora):
    cfg = scratch(SIZES, len(symbols_tokenizer()), eos_ids=(1,), pad_id=0, lora=lora)
    return cfg, init_params(cfg, jax.random.key(seed))


SCORES = quick_jit(reward_scores, static_argnums=1, static_argnames=("members", "max_segments"))


def scores(model: RewardModel, tokens, lengths):
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    segments = (positions < np.asarray(lengths)[:, None]).astype(np.int32)
    return np.asarray(
        SCORES(model.params, model.cfg, tokens, positions, segments, members=model.members)[..., 0]
    )


TOKENS = np.random.default_rng(0).integers(2, 30, (3, 9)).astype(np.int32)


# ---- against transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, "llama3", "llama_biases", "neox_full_rotary_linear"])
def test_scores_are_those_of_transformers_padded_and_packed(name):
    cfg, params, _ = classifier(name)
    tokens, positions, segments = rows(cfg, pad=5)
    got = SCORES(params, cfg, tokens, positions, segments)
    np.testing.assert_allclose(got[:, 0], GOLDEN["scores"][name], atol=2e-5)
    together = SCORES(params, cfg, *packed(cfg), max_segments=len(LENGTHS) + 1)
    np.testing.assert_allclose(together[0], [*GOLDEN["scores"][name], 0.0], atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_classifiers_config_is_read_as_transformers_saves_it_and_written_back(name):
    cfg = from_hf(GOLDEN["saved_configs"][name])
    assert cfg == dataclasses.replace(classifier(name)[0], eos_ids=cfg.eos_ids, bos_id=cfg.bos_id)
    assert from_hf(to_hf(cfg)) == cfg
    assert to_hf(cfg)["architectures"] == GOLDEN["saved_configs"][name]["architectures"]
    assert to_hf(cfg)["num_labels"] == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_written_folder_has_the_tensors_that_transformers_has(tmp_path, name):
    _, _, state = classifier(name)
    save_reward_model(tmp_path, golden_reward_model(name, symbols_tokenizer()))
    file = SafetensorsFile(tmp_path / "model.safetensors")
    assert {key: entry.shape for key, entry in file.entries.items()} == {
        key: value.shape for key, value in state.items()
    }
    for key, value in state.items():
        np.testing.assert_array_equal(file.read(key, value.shape, (slice(None),) * value.ndim), value)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == GOLDEN["saved_configs"][name]["architectures"]
    assert config["pad_token_id"] == 98
    assert config["id2label"] == {"0": "reward"}


def test_a_classifier_without_our_description_is_loaded(tmp_path):
    save_reward_model(tmp_path, golden_reward_model("qwen2", symbols_tokenizer()))
    (tmp_path / "reward.json").unlink()
    model = load_reward_model(tmp_path)
    got = SCORES(model.params, model.cfg, *rows(model.cfg))
    np.testing.assert_allclose(got[:, 0], GOLDEN["scores"]["qwen2"], atol=2e-5)
    assert (model.members, model.end_of_context, model.mean, model.std) == (1, None, 0.0, 1.0)


def test_more_labels_and_other_tasks_are_refused():
    config = GOLDEN["saved_configs"]["qwen2"]
    with pytest.raises(UnsupportedModelError, match="2 labels"):
        from_hf({name: value for name, value in config.items() if name not in ("id2label", "label2id")})
    with pytest.raises(UnsupportedModelError, match="TokenClassification"):
        from_hf(config | {"architectures": ["Qwen2ForTokenClassification"]})


def test_a_reward_model_is_no_language_model_and_the_other_way_round(tmp_path):
    model = policy()
    save_model(tmp_path / "lm", model)
    save_reward_model(tmp_path / "rm", start(model))
    with pytest.raises(WeightsError, match="is a reward model"):
        load_model(str(tmp_path / "rm"))
    with pytest.raises(WeightsError, match="is a language model"):
        load_reward_model(tmp_path / "lm")
    both = change_head(model.cfg, model.params, "both", key=jax.random.key(0))
    with pytest.raises(ValueError, match="save the two apart"):
        save_model(tmp_path / "both", Model(both[0], both[1], model.tokenizer))


# ---- which token ---------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_score_is_the_heads_value_at_each_segments_last_token(data):
    """Whatever lies behind it, and even if that is the pad id or the sequence ends with it."""
    cfg, params, _ = classifier("qwen2")
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    segments = np.zeros((1, 12), np.int32)
    ends = np.cumsum(lengths, dtype=int)
    for s, (end, length) in enumerate(zip(ends, lengths), 1):
        segments[0, end - length : end] = s
    hidden = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=(1, 12, cfg.hidden_size))
    hidden = hidden.astype(np.float32)
    got = np.asarray(segment_scores(params, cfg, hidden, segments, 3))[0]
    expected = np.zeros(3)
    for s, end in enumerate(ends):
        expected[s] = (
            hidden[0, end - 1].astype(np.float64) @ np.asarray(params["score"]["kernel"], np.float64)[:, 0]
        )
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_pad_id_inside_and_at_the_end_changes_nothing_and_neither_does_what_follows():
    model = start(policy())
    pad = model.cfg.pad_id
    tokens = TOKENS.copy()
    tokens[0, 4:] = pad  # a sequence of 6 tokens that ends with two pads
    first = scores(model, tokens, [6, 9, 2])
    assert scores(model, tokens, [4, 9, 2])[0] != first[0]
    tokens[0, 6:], tokens[2, 2:] = 7, pad
    np.testing.assert_array_equal(scores(model, tokens, [6, 9, 2]), first)
    wider = np.concatenate([tokens, np.full((3, 5), 3, np.int32)], axis=1)
    np.testing.assert_allclose(scores(model, wider, [6, 9, 2]), first, atol=1e-6)


def test_the_head_computes_in_float32():
    cfg, params, _ = classifier("qwen2")
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, cfg.hidden_size)), jnp.bfloat16)
    got = token_scores(params, cfg, hidden)
    assert got.dtype == jnp.float32
    exact = np.asarray(hidden, np.float64) @ np.asarray(params["score"]["kernel"], np.float64)
    np.testing.assert_allclose(got, exact[..., 0], rtol=1e-5, atol=1e-6)


# ---- heads ---------------------------------------------------------------------------------------------------------


def test_the_specs_of_each_head():
    cfg = policy().cfg
    cfg = dataclasses.replace(cfg, tie_embeddings=False)
    trees = {head: param_specs(dataclasses.replace(cfg, head=head)) for head in ("lm", "score", "both")}
    assert {head: {"lm_head", "score"} & set(tree) for head, tree in trees.items()} == {
        "lm": {"lm_head"},
        "score": {"score"},
        "both": {"lm_head", "score"},
    }
    spec = trees["score"]["score"]["kernel"]
    assert (spec.shape, spec.logical_axes) == ((16, 1), ("embed", None))
    assert spec.stddev == pytest.approx(17**-0.5)
    assert jax.tree.map(jnp.shape, init_params(dataclasses.replace(cfg, head="both"), jax.random.key(0))) == (
        jax.tree.map(lambda spec: spec.shape, trees["both"])
    )


def test_changing_the_head_shares_the_trunk():
    model = policy()
    cfg, params = change_head(model.cfg, model.params, "both", key=jax.random.key(1))
    assert params["layers"]["attn"]["q"]["kernel"] is model.params["layers"]["attn"]["q"]["kernel"]
    hidden = np.random.default_rng(0).normal(size=(*TOKENS.shape, 16)).astype(np.float32)
    np.testing.assert_array_equal(
        token_logps(params, cfg, hidden, TOKENS, positions_of(TOKENS)[1]),
        token_logps(model.params, model.cfg, hidden, TOKENS, positions_of(TOKENS)[1]),
    )
    assert change_head(cfg, params, "lm")[1].keys() == model.params.keys()
    with pytest.raises(ValueError, match="no vocabulary head"):
        change_head(*change_head(cfg, params, "score"), "lm")
    with pytest.raises(ValueError, match="`key`"):
        change_head(model.cfg, model.params, "score")


def positions_of(tokens):
    return np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape), np.ones_like(tokens)


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_temperature_divides_the_logits_and_may_be_traced(temperature):
    cfg, params = goldens.model("gemma2")
    tokens, positions, segments = rows(cfg)
    hidden = hidden_states(params, cfg, tokens, positions, segments)
    scaled = jax.tree.map(lambda x: x, params)
    plain = quick_jit(token_stats, static_argnums=1)(params, cfg, hidden, tokens, segments)
    got = quick_jit(lambda t: token_stats(scaled, cfg, hidden, tokens, segments, chunk=16, temperature=t))(
        jnp.float32(temperature)
    )
    logp = jax.nn.log_softmax(logits(params, cfg, hidden) / temperature, axis=-1)
    expected = np.take_along_axis(np.asarray(logp[:, :-1]), tokens[:, 1:, None], -1)[..., 0]
    entropy = np.asarray(-jnp.sum(jnp.exp(logp) * logp, -1))[:, :-1]
    valid = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    np.testing.assert_allclose(np.asarray(got.logps)[:, 1:][valid], expected[valid], atol=1e-5)
    np.testing.assert_allclose(np.asarray(got.entropy)[:, 1:][valid], entropy[valid], atol=1e-5)
    np.testing.assert_array_equal(got.correct, plain.correct)
    assert np.abs(np.asarray(got.logps - plain.logps)).max() > 0.1


# ---- a reward model to train ---------------------------------------------------------------------------------------


def start(model=None, **options) -> RewardModel:
    spec = RewardSpec(steps=1, max_length=40, max_prompt_length=16, **options)
    return start_reward_model(model or policy(), spec, jax.random.key(7))


def test_members_start_from_one_trunk_with_heads_of_their_own():
    model = policy()
    one, three = start(model), start(model, members=3)
    assert jax.tree.map(jnp.shape, three.params) == jax.tree.map(
        lambda spec: spec.shape, reward_specs(three.cfg, 3)
    )
    np.testing.assert_allclose(scores(three, TOKENS, [9, 4, 2])[0], scores(one, TOKENS, [9, 4, 2]), atol=1e-6)
    heads = np.asarray(three.params["score"]["kernel"])
    assert not np.allclose(heads[0], heads[1])
    for k in range(3):
        trunk = member(three.params, three.cfg, k)
        np.testing.assert_array_equal(
            trunk["layers"]["mlp"]["up"]["kernel"], model.params["layers"]["mlp"]["up"]["kernel"]
        )
    assert 0.5 < np.std(heads) * 17**0.5 < 1.5


def test_an_end_of_context_that_the_tokenizer_has_not_is_added_to_a_copy():
    model = policy()
    before = len(model.tokenizer)
    reward = start(model, end_of_context=EOC)
    assert len(model.tokenizer) == before
    assert reward.end_of_context == before
    assert reward.added == (before,)
    assert reward.tokenizer.encode(EOC, add_special_tokens=False) == [before]
    assert reward.cfg.vocab_size == 64  # a multiple of 64
    table = np.asarray(reward.params["embed"]["embedding"])
    np.testing.assert_array_equal(table[:before], model.params["embed"]["embedding"])
    np.testing.assert_allclose(table[before], table[:before].mean(axis=0), atol=1e-6)
    known = start(model, end_of_context="<user>")
    assert known.added == ()
    assert known.cfg.vocab_size == before
    assert known.end_of_context == model.tokenizer.convert_tokens_to_ids("<user>")


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_padding_never_is_a_token_that_ends_a_sequence(tmp_path, pad):
    model = policy()
    model.tokenizer.pad_token = pad
    reward = start(model)
    assert reward.cfg.pad_id == len(model.tokenizer)
    assert model.tokenizer.pad_token == pad
    save_reward_model(tmp_path, reward)
    loaded = load_reward_model(tmp_path)
    assert loaded.tokenizer.pad_token_id == loaded.cfg.pad_id == reward.cfg.pad_id
    with pytest.raises(ValueError, match="ends a sequence"):
        save_reward_model(
            tmp_path / "bad", dataclasses.replace(reward, cfg=dataclasses.replace(reward.cfg, pad_id=1))
        )


def test_a_reward_model_can_be_trained_on():
    first = start()
    again = start(Model(first.cfg, first.params, first.tokenizer))
    np.testing.assert_array_equal(scores(first, TOKENS, [9, 4, 2]), scores(again, TOKENS, [9, 4, 2]))


def test_an_ensemble_keeps_to_attention_that_can_be_vectorised(monkeypatch):
    """cuDNN's call has no right rule for it; what would run on a GPU fails on this machine."""
    monkeypatch.setattr(attention, "_gpu_has_fused", lambda: True)
    cfg, params, _ = classifier("smollm2")  # its heads have a size that cuDNN takes
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    inputs = [x[:, :22] for x in rows(cfg)]

    def trace(params, members):
        jax.eval_shape(lambda p: reward_scores(p, cfg, *inputs, members=members, dtype=jnp.bfloat16), params)

    calls = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *a, **k: calls.append(1) or q)
    trace(stacked, 2)
    assert not calls
    trace(params, 1)
    assert calls


def test_conversion_keeps_a_reward_model(tmp_path):
    model = dataclasses.replace(start(members=2, end_of_context=EOC), mean=1.5)
    save_reward_model(tmp_path / "a", model)
    loaded = load_reward_model(convert(str(tmp_path / "a"), tmp_path / "b", "bfloat16"))
    assert (loaded.members, loaded.mean, loaded.end_of_context) == (2, 1.5, model.end_of_context)
    np.testing.assert_allclose(scores(loaded, TOKENS, [9, 4, 2]), scores(model, TOKENS, [9, 4, 2]), atol=0.05)


# ---- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("lora", [None, LORA])
def test_folders_give_the_reward_model_back(tmp_path, members, lora):
    model = dataclasses.replace(
        trained(start(policy(lora=lora), members=members, end_of_context=EOC)), mean=0.25, std=2.0
    )
    save_reward_model(tmp_path, model)
    loaded = load_reward_model(tmp_path)
    assert loaded.cfg == dataclasses.replace(model.cfg, lora=None)
    for name in ("members", "end_of_context", "mean", "std", "template", "max_length", "added"):
        assert getattr(loaded, name) == getattr(model, name)
    want = scores(model, TOKENS, [9, 4, 2])
    np.testing.assert_allclose(scores(loaded, TOKENS, [9, 4, 2]), want, atol=2e-6)
    assert want.shape == ((3,) if members == 1 else (2, 3))
    for k in range(members):  # each a classifier of its own
        folder = tmp_path if members == 1 else tmp_path / f"member-{k}"
        alone = load_model(str(folder), head="score")
        single = RewardModel(alone.cfg, alone.params, alone.tokenizer)
        np.testing.assert_allclose(
            scores(single, TOKENS, [9, 4, 2]), want if members == 1 else want[k], atol=2e-6
        )


def trained(model: RewardModel) -> RewardModel:
    """With adapters that are not zero."""
    random = np.random.default_rng(3)

    def one(path, leaf):
        if path[-1].key != "lora_b":
            return leaf
        return jnp.asarray(random.normal(size=leaf.shape), leaf.dtype)

    return dataclasses.replace(model, params=jax.tree_util.tree_map_with_path(one, model.params))


@pytest.mark.parametrize("members", [1, 2])
def test_adapters_are_a_view_of_the_base_in_memory(tmp_path, members):
    base = policy()
    reward = trained(start(policy(lora=LORA), members=members, end_of_context=EOC))
    assert reward.params["layers"]["mlp"]["up"]["kernel"].ndim == 3  # the base is shared by the members
    chosen = [
        jax.tree_util.keystr(p)
        for p, on in jax.tree_util.tree_leaves_with_path(trainable_mask(reward.params, reward.cfg))
        if on
    ]
    assert len(chosen) == 5
    assert all("lora_" in path or "score" in path for path in chosen)
    save_reward_model(tmp_path, reward)
    adapters = load_reward_adapters(tmp_path)
    assert adapters is not None
    assert adapters.fits(base.params)
    assert adapters.fits(jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.params))
    assert not adapters.fits(policy(seed=1).params)
    cfg, params = adapters.over(base.params, base.cfg)
    assert params["layers"]["attn"]["q"]["kernel"] is base.params["layers"]["attn"]["q"]["kernel"]
    view = dataclasses.replace(reward, cfg=cfg, params=params)
    tokens = TOKENS.copy()
    tokens[:, -1] = reward.end_of_context
    np.testing.assert_array_equal(scores(view, tokens, [9, 9, 9]), scores(reward, tokens, [9, 9, 9]))
    # A policy with adapters of its own has the same base.
    own = dataclasses.replace(base.cfg, lora=LoraSpec(rank=3, targets=("v", "q")))
    other = add_lora(base.params, own, jax.random.key(5))
    assert base_fingerprint(other) == adapters.base
    assert jax.tree.structure(adapters.over(other, own)[1]) == jax.tree.structure(params)


def test_a_malformed_description_is_told(tmp_path):
    save_reward_model(tmp_path, start())
    assert load_reward_adapters(tmp_path) is None  # trained without
    path = tmp_path / "reward.json"
    other = json.dumps(json.loads(path.read_text()) | {"format": 9})
    for content, message in (("{", "Copy it again"), ('{"format": 1}', "members"), (other, "format 9")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_reward_model(tmp_path)
