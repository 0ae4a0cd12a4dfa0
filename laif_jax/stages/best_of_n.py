"""Best-of-n: of several samples per prompt, the one that a reward model scores highest."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from laif_jax.models.reward import load_reward_model
from laif_jax.parallel import distributed
from laif_jax.records import Completion, Prompt, write_jsonl
from laif_jax.rollout.rewards import RewardScorer, combine, encode_response
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages import sample
from laif_jax.stages.artifact import Artifact, run_stage
from laif_jax.stages.base import compute_dtype, model_folder
from laif_jax.stages.context import StudyContext
from laif_jax.worlds import symbols

SCORES = "scores.jsonl.gz"


def run(
    ctx: StudyContext,
    prompts: Artifact,
    samples: Artifact,
    reward: Artifact,
    *,
    split: str,
    generator: str,
    batch_size: int = 32,
) -> Artifact:
    """Scores all samples and writes

    * `completions.jsonl.gz`: per prompt the best one, by `generator`, its score in `meta`; as the stage `sample` does;
    * `scores.jsonl.gz`: per prompt the scores of all its samples.

    An ensemble's scores are averaged. Of equal scores the first sample's counts.

    Args:
      samples: of the stage `sample`, n per prompt. reward: of the stage `reward`.
      batch_size: responses scored together.
    """
    settings = {"split": split, "generator": generator}
    inputs = {"prompts": prompts, "samples": samples, "reward": reward}

    def work(folder: epath.Path) -> dict[str, Any]:
        by_id = {row.prompt.id: row.prompt for row in prompts_stage.read(prompts, split)}
        groups = _by_prompt(sample.read(samples))
        table = score(ctx, reward, by_id, [c for group in groups for c in group], batch_size)
        scores = _split(table, [len(group) for group in groups])
        best = [int(np.argmax(row)) for row in scores]
        chosen = [
            _renamed(group[index], generator, float(row[index]))
            for group, index, row in zip(groups, best, scores)
        ]
        if distributed.is_main():
            write_jsonl(folder / sample.FILE, chosen)
            rows = [{"prompt_id": g[0].prompt_id, "scores": row.tolist()} for g, row in zip(groups, scores)]
            write_jsonl(folder / SCORES, rows)
        n = max(len(group) for group in groups)
        return {
            "prompts": len(groups),
            "n": n,
            "kl_bound": kl_bound(n),
            "score/mean": float(np.mean(table)),
            "score/best": float(np.mean([row.max() for row in scores])),
            **_truth(by_id, groups, chosen),
        }

    return run_stage("best_of_n", settings, inputs, ctx.root, work)


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n: what the KL divergence of best-of-n from the policy that it samples from cannot exceed
    (Stiennon et al. 2020, appendix G.3; exact where no two samples are alike; HH-RLHF states log n)."""
    return math.log(n) - (n - 1) / n


def score(
    ctx: StudyContext,
    reward: Artifact,
    prompts: dict[str, Prompt],
    completions: Sequence[Completion],
    batch_size: int,
) -> np.ndarray:
    """The reward model's score of each completion, float32 [n]; of an ensemble the mean."""
    model = load_reward_model(model_folder(reward), mesh=ctx.mesh)
    scorer = RewardScorer(model, mesh=ctx.mesh, dtype=compute_dtype(ctx), batch_size=batch_size)
    encoded = [
        encode_response(model, prompts[c.prompt_id].messages, c.text, c.finish_reason) for c in completions
    ]
    return combine(scorer.score(encoded), "mean")


def _by_prompt(completions: Sequence[Completion]) -> list[list[Completion]]:
    groups: dict[str, list[Completion]] = {}
    for completion in completions:
        groups.setdefault(completion.prompt_id, []).append(completion)
    return list(groups.values())


def _split(values: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    return np.split(values, np.cumsum(sizes)[:-1])


def _renamed(completion: Completion, generator: str, value: float) -> Completion:
    row = completion.to_row() | {"generator": generator, "id": "", "meta": {"score": value}}
    return Completion.from_row(row)


def _truth(
    prompts: dict[str, Prompt], groups: Sequence[Sequence[Completion]], chosen: Sequence[Completion]
) -> dict[str, float]:
    """In the synthetic world, the quality of all samples and of the chosen ones."""
    if any(prompts[group[0].prompt_id].source != "symbols" for group in groups):
        return {}

    def mean(completions: Sequence[Completion]) -> float:
        return float(
            np.mean([symbols.quality(prompts[c.prompt_id].instruction, c.text) for c in completions])
        )

    return {
        "true_quality/mean": mean([c for group in groups for c in group]),
        "true_quality/best": mean(chosen),
    }
