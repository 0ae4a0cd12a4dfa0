"""Pairs of completions -> a critic's judgements -> preferences."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from etils import epath

from laif_jax.config import CriticSpec
from laif_jax.config.endpoints import VoiceSpec
from laif_jax.evaluation.labels import label_summary
from laif_jax.labeling.critic import Critic, load_critic, shipped_critics
from laif_jax.labeling.panel import Panel, Voice, ask_panel
from laif_jax.labeling.preferences import to_preferences
from laif_jax.labeling.probe import ask_probe
from laif_jax.parallel import distributed
from laif_jax.records import Comparison, Completion, Judgement, Preference, Prompt, read_jsonl, write_jsonl
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages import sample as sample_stage
from laif_jax.stages import teach as teach_stage
from laif_jax.stages.artifact import Artifact, StageError, run_stage
from laif_jax.stages.context import Context
from laif_jax.stages.patience import ask_patiently
from laif_jax.stages.progress import job_lines
from laif_jax.stages.usage import calls_of, cost_of, usage_of

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
        lists = load_voice(spec).kind == "listwise"
        other = teach_stage.read(teacher) if teacher else None
        comparisons = list(pairs_of(by_id, policy, other, every=lists))
        panel = judge_panel(ctx, spec, comparisons)
        judgements, single = panel.final, panel.single
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
            "usage": panel_usage(ctx, spec, judgements),
            **label_summary(judgements, single),
            **panel.summary,
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
    """The labels of `judge_panel`."""
    return judge_panel(ctx, spec, comparisons).final


def judge_panel(ctx: Context, spec: CriticSpec, comparisons: list[Comparison]) -> Panel:
    """One judgement per comparison, in their order, through the labelling service: by one critic, by an ensemble, or by
    two tiers.

    Where fewer are decided than `labeling.min_coverage` asks for, because a critic is not there for a while, it is
    asked again for the rest until `labeling.max_wait` seconds have passed without one more answer.
    """
    below = spec.strong.below if spec.strong else None

    def ask(number: int, some: Sequence[Comparison]) -> Voice:
        return _ask(ctx, spec.voices[number], list(some), cost=not spec.alone)

    return ask_panel(ask, 1 + len(spec.ensemble), comparisons, below=below)


def _ask(ctx: Context, spec: VoiceSpec, comparisons: list[Comparison], *, cost: bool) -> Voice:
    """What one critic says; with its `cost`, where there are others with other prices."""
    client, critic = ctx.services.client, load_voice(spec)

    def ask() -> list[Judgement]:
        return client.judge(
            ctx.services.endpoint(spec.endpoint),
            critic,
            comparisons,
            order=spec.order,
            seed=ctx.config.seed,
            on_progress=job_lines(f"judgements of {spec.endpoint}"),
        )

    final = ask_patiently(ask, spec.endpoint, ctx.config.labeling, "comparisons")
    single = client.judgements() if spec.order == "both" else []
    if ctx.config.labeling.probe:
        ask_probe(client, ctx.services.endpoint(spec.endpoint), critic, ctx.config.labeling.probe)
    if cost:
        endpoint = ctx.config.endpoints[spec.endpoint]
        final = [j.model_copy(update={"cost": cost_of(j.usage, endpoint, calls_of(j))}) for j in final]
    return Voice(final, single)


def load_voice(spec: VoiceSpec) -> Critic:
    """A critic with what the configuration sets instead of its own options; raises `CriticError`."""
    critic = load_critic(spec.critic)
    return critic.adapted(**spec.changes) if spec.changes else critic


def panel_usage(ctx: Context, spec: CriticSpec, judgements: Sequence[Judgement]) -> dict[str, Any]:
    """What judgements used. Several critics have several prices: then each judgement carries its own cost."""
    if spec.alone:
        return usage_of(judgements, ctx.config.endpoints[spec.endpoint])
    used = usage_of(judgements, None)
    costs = [judgement.cost for judgement in judgements if judgement.usage is not None]
    known = None if None in costs else sum(cost for cost in costs if cost is not None)
    return used | {"cost": known, "priced": "per critic"}


def critic_settings(ctx: Context, spec: CriticSpec) -> dict[str, Any]:
    """What a critic's verdicts depend on. A critic's own folder counts by its content, not by its path."""
    settings = spec.resolved() | _voice_settings(ctx, spec)
    if spec.ensemble:
        settings["ensemble"] = [_voice_settings(ctx, voice) for voice in spec.ensemble]
    if spec.strong:
        settings["strong"] = _voice_settings(ctx, spec.strong)
    return settings


def _voice_settings(ctx: Context, spec: VoiceSpec) -> dict[str, Any]:
    own = spec.critic not in shipped_critics() or spec.principles is not None
    critic = distributed.from_main(lambda: load_voice(spec).hash) if own else spec.critic
    settings = spec.resolved() | {
        "endpoint": teach_stage.endpoint_settings(ctx, spec.endpoint),
        "critic": critic,
    }
    settings.pop("principles", None)  # in the critic's hash, by content
    return settings


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
    prompts: Mapping[str, Prompt],
    policy: list[Completion],
    teacher: list[Completion] | None,
    *,
    every: bool = False,
) -> Iterable[Comparison]:
    """One comparison per prompt that has both sides; empty texts cannot be compared and are left out.

    Args:
      every: all pairs of a prompt's completions, the teacher's among them: for critics that rank whole lists.
    """
    sides: dict[str, list[Completion]] = {}
    for completion in policy:
        sides.setdefault(completion.prompt_id, []).append(completion)
    other = {completion.prompt_id: completion for completion in teacher or ()}
    for prompt_id, samples in sides.items():
        if every:
            shown = [s for s in [*samples, *filter(None, [other.get(prompt_id)])] if s.text.strip()]
            yield from (Comparison(prompt=prompts[prompt_id], a=a, b=b) for a, b in combinations(shown, 2))
            continue
        if teacher is not None:
            pair = [samples[0], other[prompt_id]] if prompt_id in other else []
        else:
            pair = samples[:2]
        if len(pair) == 2 and all(side.text.strip() for side in pair):
            yield Comparison(prompt=prompts[prompt_id], a=pair[0], b=pair[1])
