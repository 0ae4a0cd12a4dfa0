"""Pairs of completions -> a critic's judgements -> preferences."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from laif_jax.config import CriticSpec
from laif_jax.evaluation.labels import label_summary
from laif_jax.labeling.critic import load_critic, shipped_critics
from laif_jax.labeling.preferences import to_preferences
from laif_jax.parallel import distributed
from laif_jax.records import Comparison, Completion, Judgement, Preference, Prompt, read_jsonl, write_jsonl
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages import sample as sample_stage
from laif_jax.stages import teach as teach_stage
from laif_jax.stages.artifact import Artifact, StageError, run_stage
from laif_jax.stages.context import Context
from laif_jax.stages.patience import ask_patiently
from laif_jax.stages.progress import job_lines
from laif_jax.stages.usage import usage_of

PREFERENCES = "preferences.jsonl.gz"
TIES = "ties.jsonl.gz"


def run(
    ctx: Context, prompts: Artifact, samples: Artifact, teacher: Artifact | None, *, critic: str
) -> Artifact:
    """Judges pairs and writes `judgements.jsonl.gz`, the verdicts in single orders, `preferences.jsonl.gz` and
    `ties.jsonl.gz`.

    Args:
      samples: completions of the policy; two per prompt when there is no teacher.
      teacher: the other side of each pair ("policy_vs_teacher"), or None ("policy_vs_policy").
    """
    spec = ctx.config.critics[critic]
    settings = {"critic": critic_settings(ctx, spec), "pairs": "policy" if teacher is None else "teacher"}
    inputs = {"prompts": prompts, "samples": samples} | ({"teacher": teacher} if teacher else {})

    def work(folder: epath.Path) -> dict[str, Any]:
        by_id = {row.prompt.id: row.prompt for row in prompts_stage.read(prompts, "train")}
        policy = sample_stage.read(samples)
        comparisons = list(pairs_of(by_id, policy, teach_stage.read(teacher) if teacher else None))
        judgements = judge(ctx, spec, comparisons)
        single = ctx.services.client.judgements() if spec.order == "both" else []
        write_jsonl(folder / "judgements.jsonl.gz", judgements)
        # The verdicts in one order each, which the `parts` of the merged ones name.
        write_jsonl(folder / "single_order_judgements.jsonl.gz", single)
        preferences, counts = write_preferences(folder, comparisons, judgements)
        decided = sum(judgement.p_b is not None for judgement in judgements)
        check_coverage(ctx, f"critic `{critic}`", decided, judgements)
        if not preferences:
            raise StageError(
                f"critic `{critic}` preferred nothing in {len(comparisons)} comparisons: {counts}. What it said in "
                f"each order is in {folder / 'single_order_judgements.jsonl.gz'}; take another critic or endpoint"
            )
        return {
            "comparisons": len(comparisons),
            "preferences": len(preferences),
            "usage": usage_of(judgements, ctx.config.endpoints[spec.endpoint]),
            **label_summary(judgements, single),
            **counts,
        }

    return run_stage("label", settings, inputs, ctx.root, work, main_only=True)


def write_preferences(
    folder: epath.Path, comparisons: Sequence[Comparison], judgements: Sequence[Judgement]
) -> tuple[list[Preference], dict[str, int]]:
    """Writes preferences and ties. Returns the preferences, and the counts of `to_preferences`, without the ties."""
    rows, counts = to_preferences(comparisons, judgements, keep_ties=True)
    preferences = [row for row in rows if row.p_chosen != 0.5]
    write_jsonl(folder / PREFERENCES, preferences)
    write_jsonl(folder / TIES, [row for row in rows if row.p_chosen == 0.5])
    return preferences, counts | {"preferences": len(preferences)}


def read_preferences(artifact: Artifact) -> list[Preference]:
    """The preferences, in the order of the prompts."""
    return [Preference.from_row(row) for row in read_jsonl(artifact.path / PREFERENCES)]


def read_ties(artifact: Artifact) -> list[Preference]:
    """Pairs that the critic found equal, with p_chosen = 1/2: nothing for DPO, but a reward model can learn from them.
    None for labels that were written before ties were kept."""
    path = artifact.path / TIES
    return [Preference.from_row(row) for row in read_jsonl(path)] if path.exists() else []


def judge(ctx: Context, spec: CriticSpec, comparisons: list[Comparison]) -> list[Judgement]:
    """One judgement per comparison, in their order, through the labelling service.

    Where fewer are decided than `labeling.min_coverage` asks for, because the critic is not there for a while, it is
    asked again for the rest until `labeling.max_wait` seconds have passed without one more answer.
    """

    def ask() -> list[Judgement]:
        return ctx.services.client.judge(
            ctx.services.endpoint(spec.endpoint),
            spec.critic,
            comparisons,
            order=spec.order,
            seed=ctx.config.seed,
            on_progress=job_lines(f"judgements of {spec.endpoint}"),
        )

    return ask_patiently(ask, spec.endpoint, ctx.config.labeling)


def critic_settings(ctx: Context, spec: CriticSpec) -> dict[str, Any]:
    """What a critic's verdicts depend on. A critic's own folder counts by its content, not by its path."""
    own = spec.critic not in shipped_critics()
    critic = distributed.from_main(lambda: load_critic(spec.critic).hash) if own else spec.critic
    return spec.resolved() | {
        "endpoint": teach_stage.endpoint_settings(ctx, spec.endpoint),
        "critic": critic,
    }


def check_coverage(ctx: Context, who: str, decided: int, judgements: list[Judgement]) -> None:
    """Raises StageError, with the states counted, if fewer comparisons than asked for were decided."""
    if decided < ctx.config.labeling.min_coverage * len(judgements):
        states = dict(Counter(str(judgement.status) for judgement in judgements))
        reason = next((j.reason for j in judgements if j.reason), "")
        raise StageError(
            f"{who} decided {decided} of {len(judgements)} comparisons, fewer than `labeling.min_coverage` "
            f"{ctx.config.labeling.min_coverage:.0%} asks for. States: {states} "
            f"(first reason: {reason or 'none given'}). Verdicts that came are kept in the labelling store; "
            "run again to ask for the rest only."
        )


def pairs_of(
    prompts: Mapping[str, Prompt], policy: list[Completion], teacher: list[Completion] | None
) -> Iterable[Comparison]:
    """One comparison per prompt that has both sides; empty texts cannot be compared and are left out."""
    sides: dict[str, list[Completion]] = {}
    for completion in policy:
        sides.setdefault(completion.prompt_id, []).append(completion)
    other = {completion.prompt_id: completion for completion in teacher or ()}
    for prompt_id, samples in sides.items():
        if teacher is not None:
            pair = [samples[0], other[prompt_id]] if prompt_id in other else []
        else:
            pair = samples[:2]
        if len(pair) == 2 and all(side.text.strip() for side in pair):
            yield Comparison(prompt=prompts[prompt_id], a=pair[0], b=pair[1])
