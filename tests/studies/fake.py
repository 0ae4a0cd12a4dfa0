"""A made-up study, in the shape that a real one leaves behind."""

from typing import Any

import numpy as np

from laif_jax.config.schema import QuestionSpec
from laif_jax.evaluation.bootstrap import paired_difference
from laif_jax.evaluation.winrate import win_rate
from laif_jax.studies.answer import answers

ARMS = {
    "sft-weak-10": (0.22, "SFT on 10% of weak's completions", "none"),
    "sft-weak-100": (0.30, "SFT on 100% of weak's completions", "none"),
    "sft-strong-10": (0.41, "SFT on 10% of strong's completions", "none"),
    "sft-strong-100": (0.52, "SFT on 100% of strong's completions", "none"),
    "laif-weak-strong": (0.46, "SFT on 10% of weak's completions, then DPO on strong's judgements", "dpo"),
    "laif-strong-strong": (
        0.55,
        "SFT on 10% of strong's completions, then DPO on strong's judgements",
        "dpo",
    ),
}
QUESTIONS = (
    QuestionSpec(laif="laif-weak-strong", sft="sft-strong-100"),
    QuestionSpec(laif="laif-strong-strong", sft="sft-weak-100"),
)


def fake_results(seeds: int = 3, prompts: int = 200) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 0.2, prompts)
    table = {}
    for name, (rate, _, _) in ARMS.items():
        noise = rng.normal(0, 0.25, (seeds, prompts)) + rng.normal(0, 0.01, (seeds, 1))
        table[name] = np.clip(rate + difficulty + noise, 0, 1).round(3)
    arms = {
        name: {
            **win_rate(p).to_dict(),
            "mean_length": 6.1 + 5 * rate,
            "true_quality": 0.4 + rate,
            "per_seed": [{"seed": i, **win_rate(row).to_dict()} for i, row in enumerate(p)],
            "description": text,
            "method": method,
        }
        for (name, (rate, text, method)), p in zip(ARMS.items(), table.values())
    }
    names = list(table)
    results: dict[str, Any] = {
        "name": "quickstart",
        "created": "2025-01-31T12:00:00+00:00",
        "config_path": "configs/quickstart.yaml",
        "scale": "default",
        "seeds": list(range(seeds)),
        "versions": {"laif_jax": "0.1.0", "jax": "0.10.2"},
        "judge": {
            "endpoint": "judge",
            "model": "simulated",
            "critic": "laif_basic",
            "order": "both",
            "agreement": [
                {
                    "source": source, "n": 600, "coverage": 0.97, "with_ties": 0.41, "without_ties": 0.531,
                    "ci95": [0.49, 0.572], "n_decided": 480, "kappa": 0.04, "longest_wins": 0.58, "majority": 0.52,
                    "random": 0.5,
                }
                for source in ("all", "pandalm", "auto-j")
            ],
        },
        "arms": arms,
        "comparisons": [
            {"a": a, "b": b, **paired_difference(table[a], table[b], samples=300).to_dict()}
            for i, a in enumerate(names)
            for b in names[i + 1 :]
        ],
        "labels": {
            "laif-weak-strong": {
                "seed": 0, "n": 360, "preferences": 341, "ok": 330, "tie": 12, "failed": 18, "mean_margin": 0.41,
            },
            "laif-strong-strong": {
                "n": 360, "ok": 350, "tie": 10, "mean_margin": 0.43, "swap_consistency": 0.91,
                "first_shown_wins": 0.52,
            },
        },
        "stages": _stages(seeds),
        "warnings": ["`label` (seed 2) failed: the endpoint refused the connection"],
    }  # fmt: skip
    return results | answers(results, QUESTIONS)


def _stages(seeds: int) -> list[dict[str, Any]]:
    usage = {"prompt_tokens": 41000, "completion_tokens": 3600, "cost": 0.12}
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        rows.append(
            {"stage": "prompts", "arm": "", "seed": seed, "status": "done", "seconds": 0.4, "key": "shared"}
        )
        for i, arm in enumerate(ARMS):
            for kind, seconds in (("sft", 21.4), ("evaluate", 7.25)):
                row = {"stage": f"{kind} {arm}", "kind": kind, "arm": arm, "seed": seed, "status": "done"}
                rows.append({**row, "seconds": seconds, "key": f"{kind}{i}{seed}", "usage": usage})
    failed = {"stage": "label", "arm": "laif-weak-strong", "seed": 2, "status": "failed"}
    return [*rows, {**failed, "error": "the endpoint refused the connection"}]


def fake_curves(seeds: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    curves: dict[str, Any] = {}
    for name, (rate, _, method) in ARMS.items():
        curves[name] = {}
        for seed in range(seeds):
            step = list(range(0, 400, 10))
            fall = np.exp(-np.array(step) / 120)
            sft = {"stage": "sft", "step": step, "loss": (1 + 2 * fall + rng.normal(0, 0.05, 40)).tolist()}
            stages = [sft]
            if method == "dpo":
                stages.append(
                    {
                        "stage": "dpo",
                        "step": step,
                        "loss": (0.35 + 0.34 * fall + rng.normal(0, 0.02, 40)).tolist(),
                        "rewards/margins": (2 * rate * (1 - fall) + rng.normal(0, 0.05, 40)).tolist(),
                        "rewards/accuracies": np.clip(
                            0.85 - 0.35 * fall + rng.normal(0, 0.03, 40), 0, 1
                        ).tolist(),
                    }
                )
            curves[name][str(seed)] = stages
    return curves


def fake_samples() -> list[dict[str, Any]]:
    verdicts: list[float | None] = [0.91, 0.2, 0.5, None, 0.7, 0.66]
    return [
        {
            "prompt": "rev sort:dbacfe",
            "reference": "abcdef",
            "outputs": {name: "abcdef"[: i + 2] for i, name in enumerate(ARMS)},
            "verdicts": dict(zip(ARMS, verdicts)),
        },
        {
            "prompt": "Write a short note about <b>HTML</b>.\n" * 3,
            "reference": "A reference that is long. " * 40,
            "outputs": {name: f"An answer by {name}. " * 20 for name in ARMS},
            "verdicts": dict(zip(ARMS, verdicts)),
        },
    ]
