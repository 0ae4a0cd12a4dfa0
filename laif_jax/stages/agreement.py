"""How far the judge itself can be trusted: its agreement with human labels, beside trivial baselines."""

from typing import Any

from etils import epath

from laif_jax.data.readers import resolve
from laif_jax.evaluation.agreement import agreement_by_source, labels_from_p, read_human_labels
from laif_jax.records import Comparison, Completion, Prompt, Status, file_sha256, write_jsonl
from laif_jax.stages import label
from laif_jax.stages.artifact import Artifact, StageError, run_stage
from laif_jax.stages.context import StudyContext


def run(ctx: StudyContext) -> Artifact:
    """Judges pairs with human labels. Metrics: `by_source`, a list of the fields of `evaluation.agreement.Agreement`,
    and `usage`.

    A weak judge is a finding, not a failure: unparsable answers lower the coverage and are reported. A judge that gave
    no answer at all to more pairs than `labeling.min_coverage` allows ends the stage.
    """
    evaluation = ctx.config.evaluation
    path = resolve(evaluation.agreement or "", ctx.config.data.root)
    if not path.exists():
        raise StageError(
            f"{path}: no such file of human labels (`evaluation.agreement`); check it and `data.root`"
        )
    settings = {
        "judge": label.critic_settings(ctx, evaluation.judge),
        "labels": file_sha256(path),
        "limit": evaluation.agreement_limit,
        "seed": ctx.config.seed,
    }

    def work(folder: epath.Path) -> dict[str, Any]:
        rows = read_human_labels(path, limit=evaluation.agreement_limit, seed=ctx.config.seed)
        comparisons = [_comparison(row.prompt, row.a, row.b) for row in rows]
        judgements = label.judge(ctx, evaluation.judge, comparisons)
        write_jsonl(folder / "judgements.jsonl.gz", judgements)
        answered = sum(judgement.status is not Status.FAILED for judgement in judgements)
        label.check_coverage(ctx, "the judge, asked about pairs with human labels,", answered, judgements)
        results = agreement_by_source(
            labels_from_p([judgement.p_b for judgement in judgements]),
            [row.human for row in rows],
            [(row.a, row.b) for row in rows],
            [row.source for row in rows],
        )
        return {
            "by_source": [result.to_dict() for result in results],
            "usage": label.panel_usage(ctx, evaluation.judge, judgements),
        }

    return run_stage("agreement", settings, {}, ctx.root, work, main_only=True)


def _comparison(instruction: str, a: str, b: str) -> Comparison:
    prompt = Prompt.from_text(instruction)
    return Comparison(
        prompt=prompt,
        a=Completion(prompt_id=prompt.id, generator="a", text=a),
        b=Completion(prompt_id=prompt.id, generator="b", text=b),
    )
