"""One iteration of TRL's PPO trainer (tests/tools/make_ppo_goldens.py): the same advantages, losses and metrics."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from laif_jax.objectives.rl import gae, kl_estimate, rl_loss, rollout_metrics, token_rewards, whiten

GOLDEN = json.loads((Path(__file__).parent / "trl_ppo.json").read_text())
SETTINGS = GOLDEN["settings"]


@pytest.fixture(scope="module", params=GOLDEN["cases"], ids=lambda case: case["kl_estimator"])
def case(request):
    """(TRL's record, our KL, rewards, advantages, returns)."""
    record = request.param
    logps, ref, values, scores = (
        np.array(record[k], np.float32) for k in ("logps", "ref_logps", "values", "scores")
    )
    mask = np.ones_like(logps)
    kl = kl_estimate(record["kl_estimator"], logps, ref)
    rewards = token_rewards(scores, kl, SETTINGS["kl_coef"], mask)
    return record, mask, kl, *gae(rewards, values, mask, SETTINGS["gamma"], SETTINGS["lam"])


def test_advantages_are_those_of_trl(case):
    record, mask, _, advantages, _ = case
    np.testing.assert_allclose(advantages, record["advantages"], rtol=1e-5, atol=1e-4)
    tokens = mask.size
    bessel = np.sqrt((tokens - 1) / tokens)  # TRL divides the variance by n - 1
    np.testing.assert_allclose(bessel * whiten(advantages, mask), record["whitened"], rtol=1e-4, atol=1e-5)


def test_losses_and_metrics_of_every_update_are_those_of_trl(case):
    record, mask, _, _, returns = case
    old_logps, old_values = jnp.array(record["logps"]), jnp.array(record["values"])
    whitened = jnp.array(record["whitened"])
    hyper = {"clip_low": SETTINGS["cliprange"], "clip_high": SETTINGS["cliprange"]}
    hyper |= {"value_clip": SETTINGS["cliprange_value"], "value_coef": SETTINGS["vf_coef"]}
    means = []
    for update in record["updates"]:
        rows = np.array(update["rows"])
        out = rl_loss(
            "ppo",
            logps=jnp.array(update["logps"]),
            old_logps=old_logps[rows],
            advantages=whitened[rows],
            mask=mask[rows],
            hyper=hyper,
            values=jnp.array(update["values"]),
            old_values=old_values[rows],
            returns=returns[rows],
        )
        np.testing.assert_allclose(out.total / out.weight, update["loss"], rtol=1e-4, atol=1e-5)
        means.append({name: float(total / weight) for name, (total, weight) in out.metrics.items()})
    assert means[-1]["policy/clipfrac_avg"] > 0
    for name in means[0].keys() - {"val/ratio_var"}:  # TRL's is over the means of micro-batches
        found = np.mean([mean[name] for mean in means])
        np.testing.assert_allclose(found, record["metrics"][name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_metrics_of_the_rollouts_are_those_of_trl(case):
    record, mask, kl, _, returns = case
    found = rollout_metrics(
        scores=np.array(record["scores"]),
        kl=kl,
        kl_coef=SETTINGS["kl_coef"],
        logps=np.array(record["logps"]),
        mask=mask,
        ended=np.zeros(len(mask), bool),
        values=np.array(record["values"]),
        returns=returns,
    )
    for name in ("kl", "entropy", "scores", "non_score_reward", "rlhf_reward"):
        name = f"objective/{name}"
        np.testing.assert_allclose(found[name], record["metrics"][name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert found["val/num_eos_tokens"] == record["metrics"]["val/num_eos_tokens"]
