"""Made-up reward models, PPO runs and rounds, in the shape that a real study leaves behind."""

from typing import Any

import numpy as np

from laif_jax.studies.rl_results import _settings
from tests.studies.fake import ARMS

COEFS, RATES = (0.0, 0.05, 0.2), (3e-5, 1e-4)


def fake_curves(seeds: int = 3) -> list[dict[str, Any]]:
    rng = np.random.default_rng(2)
    step = list(range(0, 101, 10))
    return [
        {
            "name": "PPO", "seed": seed, "learning_rate": rate, "step": step, "longest_wins": 0.56,
            "accuracy": (0.5 + top * (1 - np.exp(-np.array(step) / 30)) + rng.normal(0, 0.01, len(step))).tolist(),
        }
        for rate, top in ((1e-5, 0.1), (5e-5, 0.3), (1e-4, 0.25))
        for seed in range(seeds)
    ]  # fmt: skip


def fake_runs(seeds: int = 3) -> list[dict[str, Any]]:
    """Runs that follow the square-root law; without a penalty true quality turns."""
    rng = np.random.default_rng(3)
    runs = []
    for coef in COEFS:
        for rate in RATES:
            for seed in range(seeds):
                iteration = list(range(61))
                kl = 30 * rate / 1e-4 / (1 + 20 * coef) * np.array(iteration) / 60
                reward = 1.2 * np.sqrt(kl) + rng.normal(0, 0.05, 61)
                quality = 0.8 + 0.06 * np.sqrt(kl) - 0.0075 * kl + rng.normal(0, 0.002, 61)
                every = slice(0, None, 5)
                runs.append(
                    {
                        "arm": "PPO", "seed": seed, "own": (coef, rate) == (0.05, 1e-4), "kl_coef": coef,
                        "learning_rate": rate,
                        "train": {"iteration": iteration, "reward": reward.tolist(), "kl": kl.tolist()},
                        "eval": {
                            "iteration": iteration[every], "reward": reward[every].tolist(),
                            "kl": kl[every].tolist(), "true_quality": quality[every].tolist(),
                        },
                    }
                )  # fmt: skip
    return runs


def fake_reinforced(seeds: int = 3) -> dict[str, Any]:
    """The entries of results.json."""
    rng = np.random.default_rng(4)
    rounds = []
    for seed in range(seeds):
        for number in range(4):
            win = 36 + 2.5 * number + rng.normal(0, 0.7)
            row = {
                "seed": seed,
                "round": number,
                "win_rate": win,
                "standard_error": 1.1,
                "true_quality": win / 45,
            }
            if number:
                row |= {
                    "begun": True, "reason": "", "prompts": 900, "comparisons": 890, "preferences": 840, "cost": None,
                }  # fmt: skip
            rounds.append(row)
    last = {"seed": 0, "round": 4, "begun": False, "reason": "890 comparisons more would pass `<b>max</b>`"}
    settings = _settings(fake_runs(seeds))
    model = {"name": "PPO", "set": "held out", "learning_rate": 5e-5, "n": 270, "accuracy": 0.79}
    intervals = {"ci95": [0.74, 0.84], "longest_wins": 0.55, "longest_ci95": [0.5, 0.6]}
    return {
        "rewards": [
            {**model, **intervals, "seed": seed, "gain": 0.24, "gain_ci95": [0.17, 0.31], "ece": 0.041}
            for seed in range(seeds)
        ],
        "rounds": {"laif-weak-rounds": [*rounds, last]},
        "one_round": {"laif-weak-rounds": [next(name for name, arm in ARMS.items() if arm[2] == "dpo")]},
        "ppo": [{"arm": row["arm"]} for row in settings],
        "kl_reward": settings,
        "best_of_n": {
            "best": [
                {
                    "seed": seed, "prompts": 200, "n": 16, "kl_bound": 1.835, "score/mean": 0.1, "score/best": 1.9,
                    "true_quality/mean": 0.8, "true_quality/best": 0.87,
                }
                for seed in range(seeds)
            ]
        },
    }  # fmt: skip
