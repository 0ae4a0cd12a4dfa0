"""Teacher completions: asked from a model through the labelling service, or taken from the data."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from etils import epath

from laif_jax.config import TeacherSpec
from laif_jax.data.sources import SourceRow
from laif_jax.labeling.complete import Failure
from laif_jax.labeling.judge import sum_usage
from laif_jax.labeling.local_servers import weights_id
from laif_jax.labeling.revise import load_reviser
from laif_jax.models import fetch
from laif_jax.parallel import distributed
from laif_jax.records import Completion, DataError, read_jsonl, write_jsonl
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages.artifact import Artifact, StageError, run_stage
from laif_jax.stages.context import Context, StudyContext
from laif_jax.stages.patience import ask_patiently
from laif_jax.stages.progress import job_lines
from laif_jax.stages.usage import usage_of

FILE, REVISIONS = "completions.jsonl.gz", "revisions.jsonl.gz"


def run(
    ctx: StudyContext, prompts: Artifact, *, teacher: str, split: str, start: int = 0, stop: int | None = None
) -> Artifact:
    """Completions of one teacher for the rows `start:stop` of a split, in their order.

    An answer that failed, was refused or is empty is left out and counted. Where too few came because the teacher is
    not there for a while, it is asked again for the rest until `labeling.max_wait` seconds have passed without one more
    answer; too few even then end the stage.
    """
    spec = ctx.config.teachers[teacher]
    settings = {
        "teacher": teacher_settings(ctx, spec),
        "split": split,
        "start": start,
        "stop": stop,
    }

    def work(folder: epath.Path) -> dict[str, Any]:
        rows = prompts_stage.read(prompts, split)[start:stop]
        completions, counts, reason = (
            _from_data(rows, spec) if spec.completions else _from_service(ctx, rows, teacher)
        )
        coverage = len(completions) / len(rows)
        if coverage < ctx.config.labeling.min_coverage:
            raise StageError(
                f"teacher `{teacher}` answered {len(completions)} of {len(rows)} prompts ({coverage:.1%}), fewer than "
                f"`labeling.min_coverage` {ctx.config.labeling.min_coverage:.0%} asks for: {counts} (first "
                f"reason: {reason}). The answers that came are kept in the labelling store; run again to ask for the "
                "rest only."
            )
        write_jsonl(folder / FILE, completions)
        if spec.revisions:  # of all steps, for who trains on all of them
            write_jsonl(folder / REVISIONS, ctx.services.client.revisions())
        usage = usage_of(completions, ctx.config.endpoints[spec.endpoint] if spec.endpoint else None)
        return {"completions": len(completions), "asked": len(rows), "usage": usage, **counts}

    return run_stage("teach", settings, {"prompts": prompts}, ctx.root, work, main_only=True)


def read(artifact: Artifact) -> list[Completion]:
    """The completions, in the order of the prompts."""
    return [Completion.from_row(row) for row in read_jsonl(artifact.path / FILE)]


def teacher_settings(ctx: StudyContext, spec: TeacherSpec) -> dict[str, Any]:
    """What a teacher's answers depend on: not how many calls are in flight, nor where a local server listens."""
    settings = spec.resolved()
    if spec.endpoint:
        settings["endpoint"] = endpoint_settings(ctx, spec.endpoint)
    if spec.revisions:
        settings["reviser"] = distributed.from_main(lambda: load_reviser(spec.reviser, spec.principles).hash)
        settings.pop("principles", None)  # in the reviser's hash, by content
        settings["seed"] = ctx.config.seed
    return settings


def endpoint_settings(ctx: Context, name: str) -> dict[str, Any]:
    """The settings of an endpoint that its answers depend on. A local model counts by its weights, not by its path."""
    operational = {
        *("concurrency", "timeout", "max_attempts", "api_key_env", "api_key_file", "client"),
        *("batch", "batch_folder"),
        *("prompt_price", "completion_price", "cached_prompt_price", "batch_discount"),
    }
    spec = ctx.config.endpoints[name]
    operational |= {option for option in ("options", "cassette") if not getattr(spec, option)}
    settings = {key: value for key, value in spec.resolved().items() if key not in operational}
    if spec.gguf in fetch.KNOWN:  # its weights are known by its name
        return settings
    local = [key for key in ("gguf", "checkpoint") if key in settings]
    return settings | {key: distributed.from_main(lambda: weights_id(spec)) for key in local}


def _from_data(rows: Sequence[SourceRow], spec: TeacherSpec) -> tuple[list[Completion], dict[str, int], str]:
    """(completions, counts, why the first missing one is missing)."""
    column = spec.completions or ""
    known = sorted({name for row in rows for name in row.completions})
    if column not in known:
        raise DataError(
            f"the data holds no completions of `{column}`; it holds: {', '.join(known) or 'none'}"
        )
    found = [
        Completion(prompt_id=row.prompt.id, generator=column, text=row.completions[column])
        for row in rows
        if row.completions.get(column, "").strip()
    ]
    return found, {"missing": len(rows) - len(found)}, f"no text in column `{column}`"


def _from_service(
    ctx: StudyContext, rows: Sequence[SourceRow], teacher: str
) -> tuple[list[Completion], dict[str, int], str]:
    """(completions, counts by how the others ended, why the first missing one is missing)."""
    spec = ctx.config.teachers[teacher]

    def ask() -> list[Completion | Failure]:
        return ctx.services.client.complete(
            ctx.services.endpoint(spec.endpoint or ""),
            [row.prompt for row in rows],
            system=spec.system,
            temperature=spec.temperature,
            max_tokens=spec.max_tokens,
            generator=teacher,
            seed=ctx.config.seed,
            on_progress=job_lines(f"completions of {teacher}"),
        )

    answers = ask_patiently(ask, spec.endpoint or "", ctx.config.labeling, "prompts")
    found = [answer for answer in answers if isinstance(answer, Completion) and answer.text.strip()]
    if spec.revisions:
        revised = _revised(ctx, rows, found, teacher)
        answers = [answer for answer in answers if isinstance(answer, Failure)] + revised
        found = [answer for answer in revised if isinstance(answer, Completion) and answer.text.strip()]
    failures = [answer for answer in answers if isinstance(answer, Failure)]
    states = Counter(str(failure.status) for failure in failures)
    counts = {"missing": len(rows) - len(found), "failed": states["failed"], "refused": states["refused"]}
    return found, counts, failures[0].reason if failures else "the answer is empty"


def _revised(
    ctx: StudyContext, rows: Sequence[SourceRow], completions: Sequence[Completion], teacher: str
) -> list[Completion | Failure]:
    """The teacher's revisions of its own answers (SL-CAI). Each carries the usage of the answer too."""
    spec, prompts = ctx.config.teachers[teacher], {row.prompt.id: row.prompt for row in rows}

    def ask() -> list[Completion | Failure]:
        return ctx.services.client.revise(
            ctx.services.endpoint(spec.endpoint or ""),
            [(prompts[completion.prompt_id], completion) for completion in completions],
            generator=teacher,
            reviser=load_reviser(spec.reviser, spec.principles),
            steps=spec.revisions,
            seed=ctx.config.seed,
            on_progress=job_lines(f"revisions of {teacher}"),
        )

    found = ask_patiently(ask, spec.endpoint or "", ctx.config.labeling, "revisions")
    return [
        answer.model_copy(update={"usage": sum_usage([first.usage, answer.usage])})
        if isinstance(answer, Completion)
        else answer
        for first, answer in zip(completions, found, strict=True)
    ]
