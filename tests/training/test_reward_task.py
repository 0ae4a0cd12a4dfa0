"""Training reward models: the same update however pairs are laid out, and ensembles that train as each member alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laif_jax.config.rl import RewardSpec
from laif_jax.config.schema import LoraSpec, OptimizerSpec
from laif_jax.models.decoder import hidden_states
from laif_jax.models.lora import trainable_mask
from laif_jax.models.model import Model
from laif_jax.models.reward import RewardModel, member, reward_specs, start_reward_model
from laif_jax.models.tokenizer import symbols_tokenizer
from laif_jax.parallel import param_shardings
from laif_jax.training.feed import to_device
from laif_jax.training.optim import make_optimizer
from laif_jax.training.reward_task import bootstrap_weights, reward_task
from laif_jax.training.state import create_state
from tests.training import small

F32 = {"dtype": "float32", "remat": "none"}
SPEC = RewardSpec(steps=1, centering=0.1, margin=0.5, label_smoothing=0.05)
LORA = LoraSpec(rank=2, targets=("q", "down"))
ADAM = OptimizerSpec(name="adamw", learning_rate=0.01, weight_decay=0.1)


@functools.cache
def fresh(members: int = 1, lora: LoraSpec | None = None) -> RewardModel:
    cfg = dataclasses.replace(small.config(lora), eos_ids=(1,))
    spec = SPEC.model_copy(update={"members": members})
    model = start_reward_model(
        Model(cfg, small.params(small.config(lora)), symbols_tokenizer()), spec, jax.random.key(3)
    )

    def spread(path, leaf):  # members whose gradients differ in size, so that clipping acts on some alone
        if path[0].key != "score" or members == 1:
            return leaf
        return leaf * jnp.asarray([1.0, 30.0, 3.0])[:members].reshape(-1, 1, 1)

    return dataclasses.replace(model, params=jax.tree_util.tree_map_with_path(spread, model.params))


def task_of(model: RewardModel, spec: RewardSpec = SPEC, **options):
    spec = spec.model_copy(update={"members": model.members})
    return reward_task(model.cfg, spec, **F32, **options)


def update(model, batch, on=None, optimizer=small.PLAIN, task=None, steps=1, **numbers):
    """(state, metrics, outputs) of plain updates from fixed weights."""
    on, task = on or small.mesh(), task or task_of(model)
    lora = model.cfg.lora is not None
    state = create_state(
        model.params,
        make_optimizer(optimizer),
        mesh=on,
        shardings=param_shardings(reward_specs(model.cfg, model.members), on),
        trainable=trainable_mask(model.params, model.cfg) if lora else None,
    )
    hyper = {"clip_norm": np.inf, "learning_rate": 0.1, "weight_decay": 0.1} | dict(task.numbers) | numbers
    hyper = {k: np.float32(v) for k, v in hyper.items()}
    step = small.make_step(task, state, batch, on, optimizer)
    for _ in range(steps):
        state, metrics = step(state, to_device(batch, on), hyper)
    outputs = metrics.pop("outputs")
    return state, metrics, outputs


EXTREMES = ("min_reward", "max_reward")  # means over micro-batches, as in TRL


def same(a, b, rtol=1e-5):
    a, b = ((state, {k: v for k, v in metrics.items() if k not in EXTREMES}) for state, metrics, _ in (a, b))
    small.assert_same_update(a, b, rtol)


def pairs(**options):
    batch = small.pair_batch(**options)
    margin = {0: 0.0, 1: 1.0, 2: 2.0, 3: 0.5}
    batch["margin"] = np.vectorize(margin.get)(batch["pair_index"]).astype(np.float32)
    return batch


@pytest.fixture(scope="module")
def one():
    return update(fresh(), pairs())


# ---- one reward model ----------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_mean_over_pairs(one):
    """Against the plain formula on the hidden state of each response's last token, found by its length."""
    model, table = fresh(), pairs()
    lengths = [len(doc.tokens) for doc in small.documents(8)]  # rows are chosen, rejected, chosen, ...

    def mean(params):
        inputs = (table[name][0] for name in ("tokens", "positions", "segment_ids"))
        hidden = hidden_states(params, model.cfg, *inputs)
        scores = [hidden[i, n - 1] @ params["score"]["kernel"][:, 0] for i, n in enumerate(lengths)]
        total = 0.0
        for i in range(4):
            c, r = scores[2 * i], scores[2 * i + 1]
            p, m = table["p_chosen"][0, i], 0.5 * table["margin"][0, i]
            q = 0.95 * p + 0.05 * (1 - p)
            total += q * jnp.log1p(jnp.exp(-(c - r - m))) + (1 - q) * jnp.log1p(jnp.exp(c - r + m))
            total += 0.1 * (c + r) ** 2
        return total / 4

    value, grads = jax.jit(jax.value_and_grad(mean))(model.params)
    state, metrics, _ = one
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    jax.tree.map(
        lambda g, m: np.testing.assert_allclose(m, g, rtol=1e-3, atol=1e-6), grads, state.opt_state[1].trace
    )


def test_the_update_is_the_same_split_and_on_a_mesh(one):
    same(one, update(fresh(), pairs(micro=2), small.mesh(data=2, fsdp=2, tensor=2)))


def test_the_update_is_the_same_packed_in_one_forward(one):
    batch = pairs(length=32, packed=True)
    assert batch["segment_ids"].max() > 1
    same(one, update(fresh(), batch, task=task_of(fresh(), max_segments=4)))


def test_the_update_is_the_same_for_any_pad_id_and_padding(one):
    for pad in (0, 7, 1):  # 1 is EOS
        other = update(fresh(), pairs(pad_id=pad))
        jax.tree.map(np.testing.assert_array_equal, one[0].params, other[0].params)
    batch = pairs(length=24)
    tables = {k: np.concatenate([v, v[:, :1]], axis=1) for k, v in batch.items() if v.ndim == 2}
    tables["weight"][:, -1] = 0.0
    tables["margin"][:, -1] = np.nan
    same(one, update(fresh(), batch | tables))


def test_outputs_are_the_scores_of_each_pair(one):
    _, metrics, outputs = one
    batch = pairs()
    assert outputs["chosen"].shape == batch["weight"].shape
    np.testing.assert_allclose(metrics["rewards/chosen"], np.mean(outputs["chosen"]), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["accuracy"], np.mean(np.asarray(outputs["chosen"]) > np.asarray(outputs["rejected"]))
    )
    names = {"accuracy", "margin", "min_reward", "mean_reward", "max_reward", "rewards/accuracies"}
    assert names <= metrics.keys()
    assert metrics["min_reward"] <= metrics["mean_reward"] <= metrics["max_reward"]


def test_hard_labels_are_rounded_and_ties_stay_ties():
    batch = pairs()
    batch["p_chosen"] = np.asarray([[0.9, 0.2, 0.5, 1.0]], np.float32)
    rounded = batch | {"p_chosen": np.asarray([[1.0, 0.0, 0.5, 1.0]], np.float32)}
    hard = update(fresh(), batch, soft_labels=0.0)
    same(hard, update(fresh(), rounded, soft_labels=1.0))
    dropped = update(fresh(), batch, drop_ties=1.0)
    assert float(dropped[1]["weight"]) == 3.0
    without = batch | {"weight": np.asarray([[1.0, 1.0, 0.0, 1.0]], np.float32)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        dropped[0].params,
        update(fresh(), without)[0].params,
    )


def test_a_sweep_of_numbers_shares_one_program(one):
    model = fresh()
    other = task_of(model, SPEC.model_copy(update={"margin": 1.0, "centering": 0.0}))
    assert other == task_of(model)
    assert hash(other) == hash(task_of(model))
    changed = update(model, pairs(), task=other)
    assert not np.isclose(changed[1]["loss"], one[1]["loss"])


# ---- ensembles -----------------------------------------------------------------------------------------------------


def alone(model: RewardModel, k: int) -> RewardModel:
    return dataclasses.replace(model, params=member(model.params, model.cfg, k), members=1)


def ensemble_pairs():
    """Two micro-batches of pairs that three members see under weights of their own, [A, N, K]."""
    batch = pairs(micro=2)
    return batch | {"member_weight": bootstrap_weights(4, 3, seed=1)[batch["pair_index"]]}


def assert_members_train_alone(model, batch, rtol=1e-4, **options):
    together, metrics, outputs = update(model, batch, **options)
    single = []
    for k in range(model.members):
        own = {name: value for name, value in batch.items() if name != "member_weight"}
        if "member_weight" in batch:
            own["weight"] = batch["weight"] * batch["member_weight"][..., k]
        state, found, scores = update(alone(model, k), own, **options)
        mine = member(together.params, model.cfg, k)

        def close(path, a, b):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5, err_msg=jax.tree_util.keystr(path))

        jax.tree_util.tree_map_with_path(close, state.params, mine)
        np.testing.assert_allclose(scores["chosen"], outputs["chosen"][:, k], rtol=1e-4, atol=1e-4)
        single.append(found)
    for name in ("loss", "grad_norm", "accuracy", "margin"):
        np.testing.assert_allclose(metrics[name], np.mean([m[name] for m in single]), rtol=1e-4)
    return single


def test_each_member_trains_as_it_would_alone():
    """Also where clipping acts on one member and not on another, and where they see pairs under own weights."""
    batch = ensemble_pairs()
    single = assert_members_train_alone(fresh(3), batch, clip_norm=20.0, steps=2)
    norms = [float(metrics["grad_norm"]) for metrics in single]
    assert min(norms) < 20.0 < max(norms)


def test_members_with_adapters_share_the_frozen_base():
    model = fresh(2, LORA)
    assert_members_train_alone(model, pairs(), optimizer=ADAM, clip_norm=5.0)
    state, _, _ = update(model, pairs(), optimizer=ADAM, clip_norm=5.0)  # as above, so compiled already
    base = state.frozen["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(base, small.params(small.config(LORA))["layers"]["mlp"]["up"]["kernel"])
    assert state.trainable["layers"]["attn"]["q"]["lora_b"].shape[0] == 2


def test_an_ensembles_update_is_the_same_on_a_mesh():
    model, batch = fresh(3), ensemble_pairs()
    mesh = small.mesh(data=2, fsdp=2, tensor=2, axis_type="explicit")
    same(update(model, batch), update(model, batch, mesh), rtol=2e-5)


def test_a_member_that_is_not_finite_stops_all():
    model = fresh(3)
    broken = jax.tree.map(lambda x: x, model.params)
    broken["score"]["kernel"] = broken["score"]["kernel"].at[1].set(jnp.inf)
    state, metrics, _ = update(dataclasses.replace(model, params=broken), ensemble_pairs())
    assert not bool(state.healthy)
    assert float(metrics["healthy"]) == 0.0
    np.testing.assert_array_equal(state.params["score"]["kernel"][0], model.params["score"]["kernel"][0])


def test_bootstrap_weights_are_exponential_and_seeded():
    weights = bootstrap_weights(20000, 2, seed=0)
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, bootstrap_weights(20000, 2, seed=0))
    assert not np.array_equal(weights, bootstrap_weights(20000, 2, seed=1))
    np.testing.assert_allclose(weights.mean(axis=0), 1.0, atol=0.03)
    np.testing.assert_allclose(weights.var(axis=0), 1.0, atol=0.08)
    assert abs(np.corrcoef(weights.T)[0, 1]) < 0.03


def test_adafactor_and_ensembles_do_not_go_together():
    with pytest.raises(ValueError, match="adafactor"):
        RewardSpec(steps=1, members=2, optimizer=OptimizerSpec(name="adafactor"))
