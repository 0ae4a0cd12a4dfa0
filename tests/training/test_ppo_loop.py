"""The loop: it learns, evaluates, stops with named examples, and resumes bitwise after SIGKILL."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from laif_jax.parallel.preemption import Preempted, listening
from laif_jax.records import LaifError
from laif_jax.training.checkpoint import Checkpointer
from laif_jax.training.metrics import read_metrics
from laif_jax.training.ppo_loop import run_ppo
from laif_jax.training.progress import describe
from laif_jax.training.recorder import NonFiniteError
from tests.training import killed_ppo
from tests.training.ppo_small import count_of, models, scorer, spec, task

OPTIONS = {
    "iterations": 20,
    "batch_size": 16,
    "epochs": 2,
    "eval_every": 10,
    "optimizer": {"learning_rate": 1e-2},
    "kl": {"coef": 0.02},
    "value": "shared",
}
TIMES = ("timing_s/", "perf/", "eps")


def numbers(row: dict) -> dict:
    """A row without what no two runs have alike."""
    return {name: value for name, value in row.items() if not name.startswith(TIMES)}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    out = tmp_path_factory.mktemp("ppo")
    snapshots = []
    options = spec(**OPTIONS, keep_every=10)
    result = run_ppo(
        options,
        models(options),
        task(quality=lambda prompts, completions: [float(len(c.text)) for c in completions]),
        out,
        seed=0,
        snapshot=lambda number, state: snapshots.append((number, int(state.step))),
        progress=False,
    )
    return out, result, snapshots


def test_the_progress_line_leads_with_score_and_kl(learned):
    _, result, _ = learned
    row = result.history[-1]
    expected = (
        f"score {row['objective/scores']:.4f}, KL {row['objective/kl']:.3f}, loss {row['loss']:.4f}, "
        f"{row['perf/tokens_per_second_per_device']:,.0f} tokens/s/device"
    )
    assert describe(row) == expected


def test_it_learns_and_says_how(learned):
    out, result, snapshots = learned
    rows = read_metrics(out / "metrics.jsonl")
    assert rows == result.history
    assert [row["step"] for row in rows] == list(range(21))
    assert [row["step"] for row in rows if "eval/reward" in row] == [0, 10, 20]
    assert np.mean([row["rewards/sevens/mean"] for row in rows[-3:]]) > rows[1]["rewards/sevens/mean"] + 0.2
    assert rows[20]["eval/reward"] > rows[0]["eval/reward"] + 0.2
    assert rows[0]["eval/objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert rows[20]["eval/objective/kl"] > 0.1
    assert rows[20]["eval/quality"] > 0
    assert snapshots == [(10, 10), (20, 20)]
    last = rows[-1]
    assert last["episode"] == 320
    assert last["sampling/logp_diff_max"] < 1e-4
    assert last["objective/rlhf_reward"] == pytest.approx(
        last["objective/scores"] + last["objective/non_score_reward"], abs=1e-5
    )
    wanted = {
        "objective/entropy", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg",
        "loss/value_avg", "val/clipfrac_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens", "lr", "eps",
        "critic/vf_explained_var", "response_length/mean", "response_length/empty", "prompt_length/cut", "kl_coef",
        "timing_s/rollout", "timing_s/update", "perf/tokens_per_second_per_device",
    }  # fmt: skip
    assert wanted <= set(last)


def test_a_finished_run_is_not_run_again(learned):
    out, result, _ = learned
    again = run_ppo(spec(**OPTIONS), models(spec(**OPTIONS)), task(), out, seed=0, progress=False)
    assert again.resumed_from == 20
    assert again.history == result.history


def test_a_reward_that_fails_leaves_a_checkpoint_and_the_run_goes_on(learned, tmp_path):
    class CriticDied(LaifError):
        pass

    reward, calls = count_of(7), []

    def dies(prompts, completions):
        calls.append(len(prompts))
        if len(calls) == 4:  # an evaluation and two iterations were rated
            raise CriticDied("the critic is gone")
        return reward(prompts, completions)

    options = spec(**OPTIONS)
    with pytest.raises(CriticDied):
        run_ppo(options, models(options), task(rewards={"sevens": dies}), tmp_path, seed=0, progress=False)
    assert Checkpointer(tmp_path / "checkpoints").latest_step() == 2
    result = run_ppo(options, models(options), task(), tmp_path, seed=0, progress=False)
    assert result.resumed_from == 2
    calm = learned[1].history
    assert [numbers(r)["loss"] for r in result.history[1:]] == [numbers(r)["loss"] for r in calm[1:]]


@pytest.mark.parametrize("call", [1, 4])  # in the evaluation before training; in the third rollout
def test_a_notice_in_a_rollout_saves_the_iteration_before_and_the_run_goes_on(learned, tmp_path, call):
    reward, calls = count_of(7), []

    def asked(prompts, completions):
        calls.append(len(prompts))
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return reward(prompts, completions)

    options = spec(**OPTIONS)
    done = max(0, call - 2)
    with pytest.raises(Preempted, match=f"ppo: step {done} was saved"), listening():
        run_ppo(options, models(options), task(rewards={"sevens": asked}), tmp_path, seed=0, progress=False)
    assert len(calls) == max(call, 2)
    result = run_ppo(options, models(options), task(), tmp_path, seed=0, progress=False)
    assert result.resumed_from == done
    calm = learned[1].history
    assert [numbers(r)["loss"] for r in result.history[1:]] == [numbers(r)["loss"] for r in calm[1:]]


def test_a_reward_that_is_not_finite_stops_the_run_and_names_the_prompts(tmp_path):
    reward, calls = count_of(7), []

    def spoiled(prompts, completions):
        scores, ok = reward(prompts, completions)
        calls.append([prompt.id for prompt in prompts])
        if len(calls) == 3:
            scores[2] = np.nan
        return scores, ok

    options, job = spec(**OPTIONS), task(rewards={"sevens": spoiled})
    with pytest.raises(
        NonFiniteError, match=r"iteration 2: .* rewards of the rollout are not finite"
    ) as caught:
        run_ppo(options, models(options), job, tmp_path, seed=0, progress=False)
    guilty = [i for i, p in enumerate(job.prompts) if p.prompt.id == calls[2][2]]
    assert f"Prompts (rows of the training prompts, from 0): {guilty}" in str(caught.value)
    assert Checkpointer(tmp_path / "checkpoints").latest_step() == 1
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]


def test_rows_that_are_not_rated_do_not_count_and_reward_models_and_functions_are_summed(tmp_path):
    reward = count_of(7)

    def partial(prompts, completions):
        scores, ok = reward(prompts, completions)
        return np.where(np.arange(len(ok)) % 2, scores, np.nan), np.arange(len(ok)) % 2 == 1

    options = spec(**OPTIONS | {"iterations": 1, "kl": {"coef": 0.02, "target": 1.0, "horizon": 100}})
    made = models(options, scorers={"model": scorer()})
    job = task(rewards={"sevens": partial}, weights={"sevens": 2.0, "model": -1.0})
    result = run_ppo(options, made, job, tmp_path, seed=0, progress=False)
    row = result.history[-1]
    assert row["rewards/rows"] == 8
    # The KL is 0 at the start, as far below its target as counts, over 8 responses and not the 16 that were drawn.
    assert result.kl_coef == pytest.approx(0.02 * (1 - 0.2 * 8 / 100))
    assert row["objective/scores"] == pytest.approx(
        2 * row["rewards/sevens/mean"] - row["rewards/model/mean"], abs=1e-5
    )
    assert row["eval/reward"] == pytest.approx(
        2 * row["eval/rewards/sevens/mean"] - row["eval/rewards/model/mean"], abs=1e-5
    )


def test_weights_and_rewards_that_do_not_match_are_told():
    options = spec(**OPTIONS)
    with pytest.raises(ValueError, match="rewards without a weight"):
        run_ppo(options, models(options), task(weights={"eights": 1.0}), "unused", seed=0)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_runs_killed_at_any_moment_end_bitwise_where_calm_ones_do(tmp_path, kills):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="")
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "cache")
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, "-m", "tests.training.killed_ppo", str(tmp_path), str(kills), "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    calm, killed = (np.load(tmp_path / name / "params.npz") for name in ("calm", "killed"))
    assert set(calm.files) == set(killed.files)
    for name in calm.files:
        np.testing.assert_array_equal(calm[name], killed[name], err_msg=name)
    assert int((tmp_path / "killed" / "resumed_from").read_text()) > 0
    rows = [
        [json.dumps(numbers(row), sort_keys=True) for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("calm", "killed")
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == killed_ppo.ITERATIONS + 1
