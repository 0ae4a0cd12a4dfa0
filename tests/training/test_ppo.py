"""The update: the same for every split, padding and number of devices; rewards in float32; what each option does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laif_jax.training.ppo import TRACES, experience
from laif_jax.training.ppo_loop import culprits
from laif_jax.training.ppo_plan import Numbers, make_layout, prompts_of, update_config, update_order
from tests.training.ppo_small import (
    LORA,
    PLACES,
    ROWS,
    SCORES,
    WIDTH,
    assert_same,
    mesh,
    models,
    params,
    rollout,
    scorer,
    spec,
    update,
)


@pytest.fixture(scope="module")
def whole():
    return update(spec())


def changes(state, made=None) -> dict[str, float]:
    """How far each trained leaf moved, by path."""
    start = models(spec()) if made is None else made
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.trainable, start.state.trainable)
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(moved)}


# ---- the same update -------------------------------------------------------------------------------------------


def test_micro_batches_change_nothing(whole):
    assert_same(whole, update(spec(micro_batch=2)))


def test_devices_and_padding_change_nothing(whole):
    options = spec(micro_batch=4)
    longer = rollout(padded=ROWS + 8, places=PLACES + 3)
    # Everything beyond a response is padding: even what is not finite there must not be seen.
    junk = jnp.arange(PLACES + 3) >= longer.counts[:, None]
    longer = longer._replace(
        ref_logps=jnp.where(junk, jnp.nan, longer.ref_logps), values=jnp.where(junk, jnp.inf, longer.values)
    )
    eight = update(options, devices=8, experience=longer)
    assert eight[0].trainable["policy"]["embed"]["embedding"].sharding.mesh.size == 8
    assert_same(whole, eight)


def test_sequences_as_the_unit_are_split_alike():
    options = {"normalize": "sequence", "kl": {"estimator": "k3", "place": "loss", "coef": 0.1}}
    assert_same(update(spec(**options)), update(spec(micro_batch=2, **options)))


def test_numbers_are_traced():
    before = TRACES["update"]
    first = update(spec())
    second = update(
        spec(
            optimizer={"name": "rmsprop", "decay": 1.0, "eps": 1.0, "learning_rate": 0.05, "clip_norm": 0.1},
            kl={"coef": 0.3},
            clip_low=0.1,
            clip_high=0.3,
            dual_clip=3.0,
            value_clip=None,
            value_coef=0.5,
            entropy_coef=0.0,
            gamma=0.9,
            lam=0.5,
            reward_clip=0.5,
            missing_eos_penalty=1.0,
            sampling={"max_new_tokens": PLACES, "temperature": 0.7},
        )
    )
    assert TRACES["update"] <= before + 1
    assert first[1]["loss"] != second[1]["loss"]


# ---- rewards ---------------------------------------------------------------------------------------------------


def advantages(options, scores=SCORES, experience_of=None, weight=None):
    made = experience_of or rollout()
    config = update_config(options, models(options), dtype="float32", remat="none", chunk=32)
    hyper = Numbers(options, {"score": 1.0}).hyper(0, options.kl.coef)
    weight = np.ones(ROWS, np.float32) if weight is None else weight
    return experience(config, made, {"score": jnp.asarray(scores)}, jnp.asarray(weight), hyper), made


def test_a_score_of_0_7_reaches_the_advantage_as_0_7():
    """A published PPO keeps rewards as integers, so that 0.7 becomes 0."""
    options = spec(kl={"coef": 0.0}, whiten_advantages=False, lam=1.0)
    made = rollout()
    made = made._replace(values=jnp.zeros_like(made.values))
    for scores in (SCORES, SCORES.astype(np.float64), jnp.asarray(SCORES, jnp.bfloat16)):
        found, _ = advantages(options, scores, made)
        expected = np.asarray(scores, np.float32)[:, None] * np.asarray(found.mask)
        for name in ("advantages", "returns"):
            value = getattr(found, name)
            assert value.dtype == jnp.float32, name
            np.testing.assert_array_equal(value, expected, err_msg=name)
    assert np.asarray(found.mask)[0, 0] * np.float32(0.7) == pytest.approx(SCORES[0])
    last = np.asarray(made.counts) - 1
    np.testing.assert_array_equal(
        np.asarray(found.rewards)[np.arange(ROWS), last],
        np.asarray(jnp.asarray(SCORES, jnp.bfloat16), np.float32),
    )
    assert found.rewards.dtype == jnp.float32


def test_missing_ends_are_told_by_the_flag_of_sampling():
    made = rollout()
    ended = np.asarray(made.ended)
    assert 0 < ended.sum() < ROWS
    # An EOS id in the text of a response, or as padding, must not count as an end.
    made = made._replace(responses=jnp.ones_like(made.responses))
    lowered, _ = advantages(spec(missing_eos_penalty=0.5), experience_of=made)
    replaced, _ = advantages(spec(missing_eos_reward=-3.0), experience_of=made)
    np.testing.assert_allclose(lowered.scores, SCORES - 0.5 * ~ended, rtol=1e-6)
    np.testing.assert_allclose(replaced.scores, np.where(ended, SCORES, -3.0), rtol=1e-6)


def test_scores_are_clipped_and_weighted():
    found, _ = advantages(spec(reward_clip=0.5))
    np.testing.assert_allclose(found.scores, np.clip(SCORES, -0.5, 0.5))


def test_rows_without_a_score_do_not_count():
    weight = np.ones(ROWS, np.float32)
    weight[3] = 0
    other = SCORES.copy()
    other[3] = np.nan
    with_junk, without = update(spec(), scores=other, weight=weight), update(spec(), weight=weight)
    assert with_junk[1]["rewards/rows"] == ROWS - 1
    assert with_junk[1]["healthy"]
    assert_same(with_junk, without, rtol=0)


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_samples_of_a_prompt_are_compared_among_themselves(algorithm):
    options = spec(
        algorithm=algorithm,
        batch_size=4,
        minibatches=1,
        sampling={"max_new_tokens": PLACES, "samples": 2},
        kl={"coef": 0.0},
        whiten_advantages=False,
    )
    found, _ = advantages(options)
    rows = np.asarray(found.advantages)[:, 0]
    pairs = SCORES.reshape(4, 2)
    expected = pairs - pairs[:, ::-1]
    if algorithm == "grpo":
        centred = pairs - pairs.mean(1, keepdims=True)
        expected = centred / (pairs.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(rows, expected.ravel(), rtol=1e-5)
    state, metrics = update(options)
    assert set(state.trainable) == {"policy"}
    assert "loss/value_avg" not in metrics
    assert metrics["healthy"]


# ---- what is trained -------------------------------------------------------------------------------------------


def test_the_head_start_trains_the_values_alone():
    for options in (spec(head_start=1), spec(head_start=1, value="shared")):
        made = models(options)
        moved = changes(update(options)[0], made)
        values = {name for name in moved if name.startswith("['value']") or "['score']" in name}
        assert all(moved[name] > 0 for name in values if "scale" not in name), moved
        assert not any(moved[name] for name in set(moved) - values)


def test_adapters_alone_are_trained_and_the_reference_is_the_same_arrays():
    for options in (spec(value="shared"), spec()):
        made = models(options, lora=LORA)
        base = params(LORA)["layers"]["mlp"]["gate"]["kernel"]
        before = jax.tree.map(np.asarray, made.state.frozen)
        kernel = made.reference_params["layers"]["mlp"]["gate"]["kernel"]
        assert kernel is made.state.frozen["policy"]["layers"]["mlp"]["gate"]["kernel"]
        if "value" in made.state.trainable:
            assert kernel is made.state.frozen["value"]["layers"]["mlp"]["gate"]["kernel"]
        if options.value == "shared":  # what is trained can be seen; one program is enough
            assert "score" in made.state.trainable["policy"]
            assert set(made.state.trainable["policy"]["layers"]["attn"]["q"]) == {"lora_a", "lora_b"}
            continue
        state, metrics = update(options, lora=LORA, made=made)
        names = {
            jax.tree_util.keystr(p).split("'")[-2]
            for p, _ in jax.tree_util.tree_leaves_with_path(state.trainable)
        }
        assert names == {"lora_a", "lora_b", "kernel"}  # the last is the scalar head's
        trained = jax.tree_util.tree_leaves_with_path(state.trainable)
        assert all(
            "['score']" in jax.tree_util.keystr(p) or "lora" in jax.tree_util.keystr(p) for p, _ in trained
        )
        jax.tree.map(np.testing.assert_array_equal, state.frozen, before)
        np.testing.assert_array_equal(base, kernel)
        assert metrics["grad_norm"] > 0


def test_a_value_model_starts_from_the_reward_model():
    made = models(spec(), scorers={"score": scorer()}, value_from=scorer())
    start = made.state.trainable["value"]
    jax.tree.map(np.testing.assert_array_equal, start, dict(scorer().params))
    assert (
        start["embed"]["embedding"] is not scorer().params["embed"]["embedding"]
    )  # a copy: this one is donated
    adapted = models(spec(), lora=LORA, scorers={"score": scorer()}, value_from=scorer())
    assert set(adapted.state.trainable["value"]["layers"]["attn"]["q"]) == {"lora_a", "lora_b"}
    frozen = adapted.state.frozen["value"]["layers"]["mlp"]["up"]["kernel"]
    assert frozen is adapted.scorers["score"].params["layers"]["mlp"]["up"]["kernel"]


def test_a_full_kl_in_the_loss_pulls_towards_the_reference():
    """With no reward but a strong KL, the policy moves to the reference's distributions."""
    options = spec(
        value="shared",
        kl={"estimator": "full", "place": "loss", "coef": 1.0},
        value_coef=0.0,
        entropy_coef=0.0,
        minibatches=1,
    )
    _, metrics = update(options, scores=np.zeros(ROWS, np.float32))
    assert metrics["loss/kl_avg"] > 0
    assert metrics["objective/non_score_reward"] == 0.0
    assert metrics["grad_norm"] > 0


# ---- trouble ---------------------------------------------------------------------------------------------------


def test_experience_that_is_not_finite_changes_nothing_and_is_named():
    made = rollout()
    made = made._replace(ref_logps=made.ref_logps.at[5, 0].set(-jnp.inf))
    state, metrics = update(spec(), experience=made)
    assert not metrics["healthy"]
    assert np.flatnonzero(~metrics["rows_finite"]).tolist() == [5]
    assert not any(changes(state).values())
    assert int(state.step) == 0
    order = update_order(spec(), make_layout(spec(), mesh(), WIDTH, PLACES), 0, 0)
    assert culprits(metrics, order)[0] == [5]


def test_an_update_that_is_not_finite_is_refused_and_its_rows_are_named():
    options = spec(
        optimizer={"name": "rmsprop", "decay": 1.0, "eps": 1.0, "learning_rate": 1e30, "clip_norm": None}
    )
    state, metrics = update(options)
    assert not metrics["healthy"]
    assert metrics["update_finite"].tolist() == [True, False]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.trainable)))
    layout = make_layout(options, mesh(), WIDTH, PLACES)
    rows, where = culprits(metrics, update_order(options, layout, 0, 0))
    assert set(rows) <= set(update_order(options, layout, 0, 0)[1].ravel().tolist())
    assert "update 2 of 2" in where


# ---- plan ------------------------------------------------------------------------------------------------------


def test_every_prompt_is_asked_once_a_pass_and_every_row_is_learned_from_once_an_epoch():
    asked = np.concatenate([prompts_of(3, i, 10, 4) for i in range(5)])
    assert sorted(asked[:10]) == sorted(asked[10:]) == list(range(10))
    assert asked[:10].tolist() != asked[10:].tolist()
    assert prompts_of(3, 2, 10, 4).tolist() == prompts_of(3, 2, 10, 4).tolist()
    assert len(prompts_of(0, 0, 3, 8)) == 8
    options = spec(epochs=2, micro_batch=2)
    order = update_order(options, make_layout(options, mesh(8), WIDTH, PLACES), 0, 0)
    assert order.shape == (4, 2, 8)  # two real rows and six of padding, one row per device
    for epoch in (order[:2], order[2:]):
        assert sorted(epoch[epoch >= 0]) == list(range(ROWS))


def test_learning_rates_follow_the_updates_and_the_last_is_reached():
    options = spec(
        iterations=3, optimizer={"name": "adamw", "learning_rate": 1.0, "schedule": "linear", "warmup": 2}
    )
    rates = np.concatenate([Numbers(options, {}).hyper(i, 0.1)["learning_rate"] for i in range(3)])
    np.testing.assert_allclose(rates, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25])
