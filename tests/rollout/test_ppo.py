"""The rollout draws what the sampler draws, and scores it as a forward pass over each row alone would."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laif_jax.config.schema import MeshSpec
from laif_jax.models.decoder import hidden_states, init_params, logits
from laif_jax.models.specs import param_specs
from laif_jax.parallel import make_mesh, param_shardings
from laif_jax.rollout.engine import Engine, Row
from laif_jax.rollout.generate import row_keys
from laif_jax.rollout.ppo import TRACES, Prompts, RolloutConfig, ScorerConfig, auto_mesh, join, make_rollout
from laif_jax.rollout.ppo_heads import in_groups
from tests.rollout.tiny import EOS, prompts, tiny

PLACES, ROWS, WIDTH = 6, 6, 8
EOS_IDS = np.asarray([EOS] + [-1] * 7, np.int32)
TEMPERATURE = 0.7


def asked(longest: int = WIDTH) -> tuple[list[list[int]], Prompts]:
    """Four prompts, and two rows of padding."""
    rows = prompts(ROWS - 2, longest)
    tokens, lengths = np.zeros((ROWS, WIDTH), np.int32), np.ones(ROWS, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    keys = row_keys(jax.random.key(3), range(ROWS), 1)[:, 0]
    limits = np.asarray([PLACES, PLACES, PLACES, 3, 0, 0], np.int32)
    return rows, Prompts(tokens, lengths, keys, limits)


@pytest.fixture(scope="module")
def models() -> dict:
    cfg, policy = tiny()
    scorer = dataclasses.replace(cfg, head="score")
    members = [init_params(scorer, jax.random.key(i)) for i in (5, 6)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    scale = {"mean": jnp.float32(0.5), "std": jnp.float32(2.0)}
    none = {"mean": jnp.float32(0.0), "std": jnp.float32(1.0)}
    return {
        "policy": policy,
        "reference": tiny(1)[1],
        "value": members[0],
        "scorers": {"one": {"params": members[1], **scale}, "two": {"params": stacked, **none}},
    }


def config(**changes) -> RolloutConfig:
    cfg, _ = tiny()
    scorer = dataclasses.replace(cfg, head="score")
    scorers = (
        ("one", ScorerConfig(scorer, end_of_context=7)),
        ("two", ScorerConfig(scorer, members=2, how="lower")),
    )
    made = RolloutConfig(cfg, cfg, PLACES, ROWS, 3, value=scorer, scorers=scorers, full_kl=True, chunk=16)
    return dataclasses.replace(made, **changes)


def mesh(devices: int = 1):
    return make_mesh(MeshSpec(), jax.devices()[:devices])


@pytest.fixture(scope="module")
def found(models):
    return jax.device_get(
        make_rollout(config(), mesh())(models, asked()[1], EOS_IDS, np.float32(TEMPERATURE))
    )


@functools.cache
def forward(head: str):
    """A jitted forward pass over one row of the greatest width; what is beyond a causal row changes nothing before."""
    cfg, _ = tiny()

    def run(params, row):
        hidden = hidden_states(params, cfg, row, jnp.arange(row.shape[1])[None], jnp.ones_like(row))
        return logits(params, cfg, hidden) if head == "lm" else hidden @ params["score"]["kernel"]

    return jax.jit(run)


def read(head: str, params, tokens: list[int]) -> np.ndarray:
    row = np.zeros((1, WIDTH + PLACES + 1), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(forward(head)(params, row)[0, : len(tokens)], np.float64)


def distribution(params, tokens: list[int]) -> np.ndarray:
    """Log-probs [T, V] of what follows each token, in float64, at the temperature."""
    out = read("lm", params, tokens) / TEMPERATURE
    return out - np.log(np.exp(out).sum(-1, keepdims=True))


def scalar(params, tokens: list[int]) -> np.ndarray:
    return read("score", params, tokens)[:, 0]


def test_it_draws_what_the_engine_draws(found, models):
    cfg, policy = tiny()
    rows, batch = asked()
    engine = Engine(policy, cfg, pad_id=0)
    drawn = engine.run(
        [Row(t, batch.keys[i], int(batch.limits[i]), TEMPERATURE) for i, t in enumerate(rows)],
        capacity=PLACES,
        batch_size=ROWS,
    )
    for i, out in enumerate(drawn):
        n = found.counts[i]
        assert found.responses[i, :n].tolist() == out.drawn
        assert bool(found.ended[i]) == out.stopped
        np.testing.assert_allclose(found.sampled_logps[i, :n], out.logps, atol=1e-5)
        assert found.tokens[i, : len(rows[i]) + n].tolist() == rows[i] + out.drawn
        assert not found.tokens[i, len(rows[i]) + n :].any()
    assert set(found.counts[4:]) == {0}
    assert not found.ended[4:].any()


def test_log_probs_values_and_kl_are_those_of_each_row_alone(found, models):
    rows, _ = asked()
    for i, prompt in enumerate(rows):
        n, start = found.counts[i], len(prompt)
        row = found.tokens[i, : start + n].tolist()
        before = slice(start - 1, start + n - 1)
        mine, theirs = (distribution(models[name], row)[before] for name in ("policy", "reference"))
        picked = np.arange(n), row[start:]
        np.testing.assert_allclose(found.logps[i, :n], mine[picked], atol=2e-5)
        np.testing.assert_allclose(found.ref_logps[i, :n], theirs[picked], atol=2e-5)
        np.testing.assert_allclose(found.full_kl[i, :n], (np.exp(mine) * (mine - theirs)).sum(-1), atol=2e-5)
        np.testing.assert_allclose(found.values[i, :n], scalar(models["value"], row)[before], atol=2e-5)
    beyond = np.arange(PLACES) >= found.counts[:, None]
    for name in ("logps", "ref_logps", "values", "full_kl"):
        assert not getattr(found, name)[beyond].any(), name
    assert np.abs(found.sampled_logps - found.logps).max() < 2e-5


def test_scores_are_read_at_the_last_token_or_the_end_of_context(found, models):
    rows, _ = asked()
    one, two = models["scorers"]["one"], models["scorers"]["two"]
    for i, prompt in enumerate(rows):
        row = found.tokens[i, : len(prompt) + found.counts[i]].tolist()
        score = (scalar(one["params"], [*row, 7])[-1] - 0.5) / 2.0
        np.testing.assert_allclose(found.scores["one"][i], score, atol=2e-5)
        every = [scalar(jax.tree.map(lambda x, k=k: x[k], two["params"]), row)[-1] for k in range(2)]
        np.testing.assert_allclose(found.scores["two"][i], np.mean(every) - np.std(every), atol=2e-5)


def test_devices_and_groups_change_nothing_and_temperatures_are_one_program(found, models):
    on = mesh(8)
    batch = asked()[1]
    batch = Prompts(*(np.concatenate([x, x[-2:]]) for x in batch))  # 8 rows, one per device
    placed = {
        name: jax.device_put(
            tree, param_shardings(param_specs(dataclasses.replace(tiny()[0], head=head)), on)
        )
        for name, head, tree in (
            ("policy", "lm", models["policy"]),
            ("reference", "lm", models["reference"]),
            ("value", "score", models["value"]),
        )
    }
    run = make_rollout(config(decode_rows=8, score_rows=8), on)
    other = jax.device_get(
        run(placed | {"scorers": models["scorers"]}, batch, EOS_IDS, np.float32(TEMPERATURE))
    )
    for name in ("responses", "counts", "ended", "tokens"):
        np.testing.assert_array_equal(getattr(other, name)[:ROWS], getattr(found, name), err_msg=name)
    for name in ("logps", "ref_logps", "values", "full_kl", "sampled_logps"):
        np.testing.assert_allclose(getattr(other, name)[:ROWS], getattr(found, name), atol=2e-5, err_msg=name)
    np.testing.assert_allclose(other.scores["two"][:4], found.scores["two"][:4], atol=2e-5)
    before = TRACES["rollout"]
    make_rollout(config(), mesh())(models, asked()[1], EOS_IDS, np.float32(1.3))
    assert TRACES["rollout"] == before


def test_join_puts_the_response_behind_the_prompt():
    rows = join(
        jnp.asarray([[5, 6, 0], [7, 8, 9]]),
        jnp.asarray([2, 3]),
        jnp.asarray([[1, 2], [3, 0]]),
        jnp.asarray([2, 1]),
    )
    assert rows.tolist() == [[5, 6, 1, 2, 0], [7, 8, 9, 3, 0]]


def test_groups_are_rejoined_in_order():
    x = jnp.arange(12).reshape(6, 2)
    np.testing.assert_array_equal(in_groups(lambda part: part * 2, x, 3), x * 2)


def test_an_explicit_mesh_is_taken_to_automatic_axes():
    explicit = make_mesh(MeshSpec(axis_type="explicit"), jax.devices()[:2])
    assert set(auto_mesh(explicit).axis_types) == {jax.sharding.AxisType.Auto}
    assert auto_mesh(mesh()) == mesh()
