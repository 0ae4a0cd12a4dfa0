"""Pairs of completions -> comparisons for people to label -> preferences, in the artifact layout of the stage `label`.

The first run writes `comparisons.jsonl` into the folder `comparisons-<key>` and ends with a message. People put
`labels.jsonl` beside it. The next run reads it. Labels count by their content: changed labels make a new stage, and
everything behind it is run again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from laif_jax.evaluation.labels import label_summary
from laif_jax.labeling.critic import instruction_text
from laif_jax.parallel import distributed
from laif_jax.records import Comparison, Judgement, Status, file_sha256, read_jsonl, write_jsonl
from laif_jax.records.io import read_jsonl_numbered
from laif_jax.stages import label
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages import sample as sample_stage
from laif_jax.stages import teach as teach_stage
from laif_jax.stages.artifact import Artifact, StageError, run_stage
from laif_jax.stages.context import Context
from laif_jax.stages.usage import usage_of

COMPARISONS, LABELS = "comparisons.jsonl", "labels.jsonl"
NAME = "human"  # as the critic of the judgements
HOW = (
    'one JSON object per line: {"id": <the comparison\'s id>, "preference": 1 (a is better), 2 (b is better) or 0 (a '
    'tie)}, or "p_b": <probability that b is better> in place of "preference"; several lines with one id are averaged'
)


def run(ctx: Context, prompts: Artifact, samples: Artifact, teacher: Artifact | None = None) -> Artifact:
    """Preferences of people, as `stages.label.run` gives those of a critic: `judgements.jsonl.gz`,
    `single_order_judgements.jsonl.gz` (one per label), `preferences.jsonl.gz`, `ties.jsonl.gz`.

    Args:
      samples: completions of the policy; two per prompt when there is no teacher.
      teacher: the other side of each pair, or None.

    Raises:
      StageError: there are no labels yet, fewer than `labeling.min_coverage`, or a row that is no label; the message
        says which file, and what to do.
    """
    asked = _ask(ctx, prompts, samples, teacher)
    path = asked.path / LABELS
    digest = distributed.from_main(lambda: file_sha256(path) if path.exists() else "")
    if not digest:
        raise StageError(
            f"{asked.metrics['comparisons']} comparisons wait for people in {asked.path / COMPARISONS}. Write their "
            f"labels to {path}, {HOW}. Then run the same command again"
        )

    def work(folder: epath.Path) -> dict[str, Any]:
        rows = list(read_jsonl(asked.path / "pairs.jsonl.gz"))
        comparisons = [Comparison.from_row(row["comparison"]) for row in rows]
        swapped = {row["comparison"]["id"]: row["swapped"] for row in rows}
        single, counts = _read(path, swapped)
        judgements = [_merge(c, single[c.id], swapped[c.id]) for c in comparisons if c.id in single]
        missing = len(comparisons) - len(judgements)
        if len(judgements) < ctx.config.labeling.min_coverage * len(comparisons):
            first = next(c.id for c in comparisons if c.id not in single)
            raise StageError(
                f"{path} labels {len(judgements)} of {len(comparisons)} comparisons, fewer than "
                f"`labeling.min_coverage` {ctx.config.labeling.min_coverage:.0%} asks for; {missing} are missing, the "
                f"first is {first}. Add them and run the same command again, or lower `labeling.min_coverage`"
            )
        preferences, states = label.write_preferences(folder, comparisons, judgements)
        if not preferences:
            raise StageError(f"{path} prefers nothing: all {len(judgements)} labels are ties")
        every = [judgement for parts in single.values() for judgement in parts]
        write_jsonl(folder / "judgements.jsonl.gz", judgements)
        write_jsonl(folder / "single_order_judgements.jsonl.gz", every)
        return {
            "comparisons": len(comparisons),
            "preferences": len(preferences),
            "usage": usage_of((), None),
            **label_summary(judgements),
            **states,
            **counts,
        }

    settings = {"critic": NAME, "labels": digest, "min_coverage": ctx.config.labeling.min_coverage}
    return run_stage("label", settings, {"comparisons": asked}, ctx.root, work, main_only=True)


def _ask(ctx: Context, prompts: Artifact, samples: Artifact, teacher: Artifact | None) -> Artifact:
    """The stage that writes what people are to compare: `comparisons.jsonl` for them, `pairs.jsonl.gz` for us."""
    settings = {"pairs": "policy" if teacher is None else "teacher", "seed": ctx.config.seed}
    inputs = {"prompts": prompts, "samples": samples} | ({"teacher": teacher} if teacher else {})

    def work(folder: epath.Path) -> dict[str, Any]:
        by_id = {row.prompt.id: row.prompt for row in prompts_stage.read(prompts, "train")}
        given = teach_stage.read(teacher) if teacher else None
        every = list(label.pairs_of(by_id, sample_stage.read(samples), given))
        # Equal texts are a tie that nobody needs to say.
        comparisons = [c for c in every if c.a.text != c.b.text]
        if not comparisons:
            raise StageError(f"nothing to compare: in all {len(every)} pairs the two completions are equal")
        swapped = [_is_swapped(ctx.config.seed, comparison) for comparison in comparisons]
        write_jsonl(folder / COMPARISONS, (_shown(c, s) for c, s in zip(comparisons, swapped)))
        pairs = [{"comparison": c.to_row(), "swapped": s} for c, s in zip(comparisons, swapped)]
        write_jsonl(folder / "pairs.jsonl.gz", pairs)
        return {"comparisons": len(comparisons), "identical": len(every) - len(comparisons)}

    return run_stage("comparisons", settings, inputs, ctx.root, work, main_only=True)


def _is_swapped(seed: int, comparison: Comparison) -> bool:
    """Whether the comparison's own b is shown as a: people, too, lean to one side."""
    return bool(hashlib.sha256(f"{seed}:{comparison.id}".encode()).digest()[0] & 1)


def _shown(comparison: Comparison, swapped: bool) -> dict[str, Any]:
    a, b = (comparison.b, comparison.a) if swapped else (comparison.a, comparison.b)
    return {"id": comparison.id, "prompt": instruction_text(comparison.prompt), "a": a.text, "b": b.text}


# ---- labels ----------------------------------------------------------------------------------------------------


def _read(path: epath.Path, swapped: Mapping[str, bool]) -> tuple[dict[str, list[Judgement]], dict[str, int]]:
    """The labels by comparison, each as a judgement of the comparison's own a and b; and counts.

    Raises:
      StageError: a row is no label, or of an unknown comparison.
    """
    found: dict[str, list[Judgement]] = {}
    for number, row in read_jsonl_numbered(path):
        key = row.get("id")
        if not isinstance(key, str) or key not in swapped:
            raise StageError(
                f"{path}, line {number}: there is no comparison {key!r} in {path.parent / COMPARISONS}. Mend or delete "
                "the line"
            )
        p_shown = _p_b(row)
        if p_shown is None:
            raise StageError(f"{path}, line {number}: {json.dumps(row)[:200]} is no label. A label is {HOW}")
        p_b = 1.0 - p_shown if swapped[key] else p_shown
        found.setdefault(key, []).append(
            Judgement(
                comparison_id=key,
                critic=NAME,
                order="ba" if swapped[key] else "ab",
                status=Status.TIE if p_b == 0.5 else Status.OK,
                p_b=p_b,
                raw=json.dumps(row),
                meta={"line": number},
            )
        )
    labels = sum(map(len, found.values()))
    return found, {"labels": labels, "duplicates": labels - len(found)}


def _p_b(row: Mapping[str, Any]) -> float | None:
    """Probability that the response shown as b is better; None if the row does not say it in one way."""
    preference, p_b = row.get("preference"), row.get("p_b")
    if (preference is None) == (p_b is None):
        return None
    if p_b is not None:
        is_number = isinstance(p_b, int | float) and not isinstance(p_b, bool)
        return float(p_b) if is_number and 0.0 <= p_b <= 1.0 else None
    if isinstance(preference, bool) or preference not in (0, 1, 2):
        return None
    return {1: 0.0, 2: 1.0, 0: 0.5}[int(preference)]


def _merge(comparison: Comparison, parts: Sequence[Judgement], swapped: bool) -> Judgement:
    """The average of a comparison's labels."""
    if len(parts) == 1:
        return parts[0]
    p_b = sum(part.p_b or 0.0 for part in parts) / len(parts)
    tie = abs(p_b - 0.5) < 1e-12
    return Judgement(
        comparison_id=comparison.id,
        critic=NAME,
        order="ba" if swapped else "ab",
        status=Status.TIE if tie else Status.OK,
        p_b=0.5 if tie else p_b,
        parts=tuple(part.id for part in parts),
        meta={"labels": len(parts)},
    )
