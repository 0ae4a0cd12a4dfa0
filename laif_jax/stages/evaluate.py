"""One arm's completions against the reference completions, by the judge."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from laif_jax.evaluation.export import write_alpaca_eval
from laif_jax.evaluation.length import longest_wins_rate, mean_length
from laif_jax.evaluation.winrate import align, win_rate
from laif_jax.records import Comparison, Completion, Prompt, read_jsonl, write_jsonl
from laif_jax.stages import label, sample, teach
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages.artifact import Artifact, run_stage
from laif_jax.stages.context import StudyContext
from laif_jax.worlds import symbols

VERDICTS = "verdicts.jsonl.gz"


def run(ctx: StudyContext, prompts: Artifact, samples: Artifact, references: Artifact) -> Artifact:
    """Judges every evaluation prompt (a: the reference, b: the arm) and writes

    * `verdicts.jsonl.gz`: one row per prompt, in order: prompt, reference, output, `p` (of the arm being better);
    * `judgements.jsonl.gz`: what the judge said;
    * `model_outputs.json`: for `alpaca_eval`.

    Metrics: the win rate's fields, mean lengths in characters, the "longest wins" judge's win rate on the same pairs,
    and, in the synthetic world, the true quality and true win rate.
    """
    judge = ctx.config.evaluation.judge
    settings = {"judge": label.critic_settings(ctx, judge), "samples_per_prompt": 1}
    inputs = {"prompts": prompts, "samples": samples, "references": references}

    def work(folder: epath.Path) -> dict[str, Any]:
        rows = [row.prompt for row in prompts_stage.read(prompts, "eval")]
        outputs = _first_samples(sample.read(samples))
        targets = {completion.prompt_id: completion for completion in teach.read(references)}
        comparisons = [
            Comparison(prompt=prompt, a=targets[prompt.id], b=outputs[prompt.id])
            for prompt in rows
            if prompt.id in targets
        ]
        judgements = label.judge(ctx, judge, comparisons)
        write_jsonl(folder / "judgements.jsonl.gz", judgements)
        p = align(judgements, [comparison.id for comparison in comparisons])
        label.check_coverage(ctx, "the judge", int(np.sum(~np.isnan(p))), judgements)
        by_prompt = {
            c.prompt.id: None if np.isnan(value) else float(value) for c, value in zip(comparisons, p)
        }
        write_jsonl(folder / VERDICTS, (_verdict_row(prompt, targets, outputs, by_prompt) for prompt in rows))
        texts = [outputs[prompt.id].text for prompt in rows]
        _export(folder, rows, texts, outputs[rows[0].id].generator)
        pairs = [(c.a.text, c.b.text) for c in comparisons]
        metrics = win_rate(
            [np.nan if by_prompt.get(prompt.id) is None else by_prompt[prompt.id] for prompt in rows]
        )
        return {
            **metrics.to_dict(),
            "usage": label.panel_usage(ctx, judge, judgements),
            "mean_length": mean_length(texts),
            "reference_mean_length": mean_length([a for a, _ in pairs]),
            "longest_wins": longest_wins_rate([a for a, _ in pairs], [b for _, b in pairs]).win_rate,
            **_truth(comparisons, rows, outputs),
        }

    return run_stage("evaluate", settings, inputs, ctx.root, work, main_only=True)


def read(artifact: Artifact) -> list[dict[str, Any]]:
    """The verdict rows, in the order of the evaluation prompts."""
    return list(read_jsonl(artifact.path / VERDICTS))


def _first_samples(completions: Sequence[Completion]) -> dict[str, Completion]:
    return {completion.prompt_id: completion for completion in reversed(completions)}


def _verdict_row(
    prompt: Prompt,
    targets: Mapping[str, Completion],
    outputs: Mapping[str, Completion],
    p: Mapping[str, float | None],
) -> dict[str, Any]:
    return {
        "prompt_id": prompt.id,
        "prompt": prompt.instruction,
        "reference": targets[prompt.id].text if prompt.id in targets else None,
        "output": outputs[prompt.id].text,
        "finish_reason": outputs[prompt.id].finish_reason,
        "p": p.get(prompt.id),
    }


def _export(folder: epath.Path, prompts: Sequence[Prompt], texts: Sequence[str], generator: str) -> None:
    """AlpacaEval's format holds single instructions only; other prompt sets have no such file."""
    if all(len(prompt.messages) == 1 for prompt in prompts):
        write_alpaca_eval(folder / "model_outputs.json", prompts, texts, generator)


def _truth(
    comparisons: Sequence[Comparison], prompts: Sequence[Prompt], outputs: Mapping[str, Completion]
) -> dict[str, float]:
    """What the world knows and no judge does; nothing where there is no truth."""
    if any(prompt.source != "symbols" for prompt in prompts):
        return {}
    quality = [symbols.quality(prompt.instruction, outputs[prompt.id].text) for prompt in prompts]
    wins = [
        0.5
        + 0.5
        * np.sign(
            symbols.quality(c.prompt.instruction, c.b.text) - symbols.quality(c.prompt.instruction, c.a.text)
        )
        for c in comparisons
    ]
    return {"true_quality": float(np.mean(quality)), "true_win_rate": 100.0 * float(np.mean(wins))}
