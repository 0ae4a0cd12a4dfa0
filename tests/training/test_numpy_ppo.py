"""The whole jitted update (rewards, KL, advantages, whitening, epochs, minibatches, micro-batches, clipping, Adam)
beside a plain float64 NumPy PPO with gradients by hand, over several iterations, to 1e-5."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from laif_jax.config.schema import OptimizerSpec, ScratchSpec
from laif_jax.models.config import scratch
from laif_jax.models.decoder import init_params
from laif_jax.rollout.ppo import Prompts, RolloutConfig, make_rollout
from laif_jax.training.optim import make_optimizer
from laif_jax.training.ppo import UpdateConfig, make_update
from laif_jax.training.state import create_state, state_shardings
from tests.training import small
from tests.training.numpy_ppo import Ppo, Settings

VOCAB, WIDTH, EOS = 11, 8, 3
ROWS, PROMPT, NEW = 8, 4, 6
ITERATIONS, EPOCHS, MINIBATCHES, MICRO = 3, 2, 2, 2
ADAM = OptimizerSpec(name="adamw", b1=0.9, b2=0.95, eps=1e-6)
NUMBERS = {
    "kl_coef": 0.1,
    "gamma": 0.97,
    "lam": 0.9,
    "clip_low": 0.1,
    "clip_high": 0.15,
    "dual_clip": 1.5,
    "value_clip": 0.1,
    "value_coef": 0.3,
    "entropy_coef": 0.01,
    "clip_norm": 0.4,
    "weight_decay": 0.1,
    "temperature": 0.8,
    "reward_clip": 2.0,
    "missing_eos_penalty": 0.7,
}
RATE = 0.02
CASES = {
    "ppo": Settings(),
    "ppo_loss_kl": Settings(
        kl_estimator="full",
        kl_place="loss",
        normalize="sequence",
        whiten_advantages=False,
        whiten_rewards=True,
    ),
    "grpo": Settings("grpo", "k3", "loss", normalize="sequence", samples=2),
    "rloo": Settings("rloo", "k2", samples=2),
    "reinforce": Settings("reinforce", "k3"),
}


def config(head):
    sizes = ScratchSpec(
        hidden_size=WIDTH, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1, max_position=32
    )
    return replace(scratch(sizes, VOCAB), tie_embeddings=False, head=head)


def bigram(cfg, seed):
    """A decoder whose block writes nothing into the residual stream, with weights large enough to matter."""
    params = jax.tree.map(lambda x: np.array(x), init_params(cfg, jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    for path in (("attn", "o"), ("mlp", "down")):
        params["layers"][path[0]][path[1]]["kernel"][:] = 0
    for name, part in (("embed", "embedding"), ("lm_head", "kernel"), ("score", "kernel")):
        if name in params:
            params[name][part] = rng.normal(size=params[name][part].shape).astype(np.float32) * 0.5
    params["final_norm"]["scale"] = (1 + 0.2 * rng.normal(size=WIDTH)).astype(np.float32)
    return params


def plain(tree):
    """The parts of a parameter tree that a bigram model has, in float64."""
    parts = {"embedding": tree["embed"]["embedding"], "scale": tree["final_norm"]["scale"]}
    if "lm_head" in tree:
        parts["head"] = tree["lm_head"]["kernel"]
    if "score" in tree:
        parts["score"] = tree["score"]["kernel"][:, 0]
    return {name: np.array(x, np.float64) for name, x in parts.items()}


def trained(tree):
    """True for all but the blocks, which stay as they are."""
    return {
        p: {k: jax.tree.map(lambda _, k=k: k != "layers", v) for k, v in t.items()} for p, t in tree.items()
    }


def prompts(iteration, samples):
    rng = np.random.default_rng(100 + iteration)
    tokens = np.repeat(rng.integers(4, VOCAB, (ROWS // samples, PROMPT)), samples, 0).astype(np.int32)
    lengths = np.repeat(rng.integers(1, PROMPT + 1, ROWS // samples), samples).astype(np.int32)
    tokens *= np.arange(PROMPT) < lengths[:, None]
    keys = jax.random.split(jax.random.key(iteration), ROWS)
    return Prompts(tokens, lengths, jax.random.key_data(keys), np.full(ROWS, NEW, np.int32))


def orders(iteration):
    """Two passes, each over all rows in an order of its own: [updates, micro-batches, rows]; the last is filled up."""
    rng = np.random.default_rng(200 + iteration)
    passes = [rng.permutation(ROWS).reshape(MINIBATCHES, MICRO, -1) for _ in range(EPOCHS)]
    whole = np.concatenate(passes).astype(np.int32)
    return np.pad(whole, ((0, 0), (0, 0), (0, 1)), constant_values=-1)


def score(response):
    """Any function of the text will do; fractions and signs matter."""
    return float(np.float32(0.7 * sum(token % 2 for token in response) - 0.45 * len(response)))


@pytest.mark.parametrize(
    "case",
    ["ppo", "ppo_loss_kl", "grpo", *(pytest.param(x, marks=pytest.mark.slow) for x in ("rloo", "reinforce"))],
)
def test_every_iteration_equals_plain_numpy(case):
    settings = CASES[case]
    hyper = NUMBERS | ({"value_clip": np.inf} if settings.algorithm == "reinforce" else {})
    policy_cfg, value_cfg = config("lm"), config("score") if settings.has_values else None
    params = {"policy": bigram(policy_cfg, 0)} | ({"value": bigram(value_cfg, 1)} if value_cfg else {})
    reference = bigram(policy_cfg, 2)
    mesh, optimizer = small.mesh(), make_optimizer(ADAM)
    state = create_state(params, optimizer, mesh=mesh, trainable=trained(params))
    update = make_update(
        UpdateConfig(
            policy=policy_cfg,
            value=value_cfg,
            algorithm=settings.algorithm,
            normalize=settings.normalize,
            kl_estimator=settings.kl_estimator,
            kl_place=settings.kl_place,
            whiten_advantages=settings.whiten_advantages,
            whiten_rewards=settings.whiten_rewards,
            samples=settings.samples,
            chunk=8,
        ),
        optimizer,
        mesh,
        state_shardings(state),
    )
    full = settings.kl_estimator == "full"
    rollout = make_rollout(
        RolloutConfig(
            policy_cfg, policy_cfg, NEW, ROWS, ROWS, value=value_cfg, full_kl=full, keep_states=full, chunk=8
        ),
        mesh,
    )
    by_hand = Ppo(
        {name: plain(tree) for name, tree in params.items()},
        plain(reference),
        settings,
        hyper | {"learning_rate": RATE, "b1": ADAM.b1, "b2": ADAM.b2, "adam_eps": ADAM.eps},
        policy_cfg.norm_eps,
    )
    for iteration in range(ITERATIONS):
        models = {"policy": state.params["policy"], "reference": reference, "scorers": {}}
        models |= {"value": state.params["value"]} if value_cfg else {}
        asked = prompts(iteration, settings.samples)
        drawn = rollout(models, asked, np.array([EOS], np.int32), np.float32(hyper["temperature"]))
        rows = [
            (
                asked.tokens[b, : asked.lengths[b]].tolist(),
                drawn.responses[b, : drawn.counts[b]].tolist(),
                bool(drawn.ended[b]),
            )
            for b in range(ROWS)
        ]
        assert all(ended == (response[-1] == EOS) for _, response, ended in rows)
        scores = [score(response) for _, response, _ in rows]
        order = orders(iteration)
        state, metrics = update(
            state,
            reference if full else None,
            drawn,
            {"rule": np.array(scores, np.float32)},
            np.ones(ROWS, np.float32),
            order,
            traced(hyper, len(order)),
        )
        expected = by_hand.iteration(rows, scores, order)
        for name, value in expected.items():
            np.testing.assert_allclose(
                metrics[name], value, rtol=2e-5, atol=1e-5, err_msg=f"{iteration}: {name}"
            )
        for part, tree in by_hand.params.items():
            for name, x in plain(state.params[part]).items():
                np.testing.assert_allclose(
                    x, tree[name], rtol=0, atol=1e-5, err_msg=f"{iteration}: {part} {name}"
                )
    assert_something_happened(case, params, by_hand, expected)


def traced(hyper, updates):
    numbers = {name: np.float32(x) for name, x in hyper.items()}
    return numbers | {
        "learning_rate": np.full(updates, RATE, np.float32),
        "weights": {"rule": np.float32(1)},
        "policy_coef": np.float32(1),
        "missing_eos_reward": np.float32(0),
    }


def assert_something_happened(case, start, by_hand, metrics):
    """Agreement would mean little if nothing had moved, or if no clip had acted."""
    moved = np.abs(plain(start["policy"])["head"] - by_hand.params["policy"]["head"]).max()
    assert moved > 0.1
    assert 0 < metrics["val/num_eos_tokens"] < ROWS
    assert metrics["grad_norm"] > 0
    if case in ("ppo", "ppo_loss_kl", "grpo"):
        assert metrics["policy/clipfrac_avg"] > 0.05
    if case in ("ppo", "ppo_loss_kl"):
        assert metrics["val/clipfrac_avg"] > 0.05
