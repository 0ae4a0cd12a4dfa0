"""`laif label run`: the plan, the labels, what was spent, and how good the labels are. No JAX here."""

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from laif_jax.config.label import LabelConfig
from laif_jax.labeling.client import Progress
from laif_jax.labeling.judged import Judged, read_store
from laif_jax.labeling.pairs import LabelledFile, Role, label_pairs
from laif_jax.labeling.pairs_plan import PairsPlan, plan_pairs
from laif_jax.labeling.probe import PROBE
from laif_jax.labeling.spending import Amount, booked_for, entry, last_booked, total
from laif_jax.labeling.store import Store
from laif_jax.records import fingerprint, write_json
from laif_jax.studies.quality import quality
from laif_jax.studies.quality_report import write_quality_report

TIERS = "two tiers"
MOST_SAMPLES, LEAST_SAMPLES = 1000, 200  # resamples of the intervals
_WORK = 2_000_000  # pairs x resamples: a few seconds; a report of many pairs must not take longer than asking for them


@dataclasses.dataclass(frozen=True)
class Shown:
    """Who is told what, and when.

    Attributes:
      plan: before anything is sent. start: the address of the service. progress: while it is asked.
      spending: planned against spent, also where the run ends with an error.
    """

    plan: Callable[[PairsPlan], None]
    start: Callable[[str], None]
    progress: Progress
    spending: Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Labelled:
    """What a run gave: the labels, and what stands in `files` of its folder: results, report."""

    file: LabelledFile
    quality: dict[str, Any]
    files: dict[str, Path]


def run_labels(config: LabelConfig, shown: Shown) -> Labelled:
    """Plans, labels, and reports.

    Writes the labels, and into the folder `config.report`: `config.yaml`, `plan.json`, `results.json` (counts, planned
    against spent, what a second tier saved; and planned against spent of the runs before), `quality.json` and
    `quality.html`.

    Raises: as `plan_pairs` and `label_pairs`.
    """
    plan, folder = plan_pairs(config), Path(config.report)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.resolved(), sort_keys=False), "utf-8")
    write_json(folder / "plan.json", plan.to_json() | {"pairs": plan.pairs})
    shown.plan(plan)
    since = _read(config, last_booked) or 0
    jobs: dict[Role, str] = {}
    results: dict[str, Any] = {}
    try:
        done = label_pairs(config, shown.start, shown.progress, jobs)
        results = _results(done)
    except BaseException as error:
        results = {"error": str(error) or type(error).__name__}
        raise
    finally:
        results["spending"] = spent(config, plan, jobs, since)
        results["runs"] = [*_runs_before(folder), _run_of(results)]
        shown.spending(results["spending"])
        write_json(folder / "results.json", results)
    report = _quality(config, done) | {name: results[name] for name in ("spending", "runs", "tiers")}
    write_json(folder / "quality.json", report)
    page = write_quality_report(folder / "quality.html", report, name=config.labels)
    return Labelled(done, report, {"results": folder / "results.json", "report": Path(page)})


def _results(done: LabelledFile) -> dict[str, Any]:
    names = ("path", "counts", "agreement", "agreed_on", "calls", "cached", "tiers")
    return {"pairs": len(done.pairs), **{name: getattr(done, name) for name in names}}


def _run_of(results: dict[str, Any]) -> dict[str, Any]:
    """What stays of a run when the same command is given again."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    spending = results["spending"]
    return {"date": date, "error": results.get("error", ""), **{k: spending[k] for k in ("planned", "spent")}}


def _runs_before(folder: Path) -> list[dict[str, Any]]:
    file = folder / "results.json"
    return json.loads(file.read_text("utf-8")).get("runs", []) if file.is_file() else []


def spent(config: LabelConfig, plan: PairsPlan, jobs: dict[Role, str], since: int) -> dict[str, Any]:
    """Planned against spent, of this run alone: a row per critic.

    Args:
      jobs: of the roles that came to be asked. since: the store's newest entry before the run.
    """
    others = config.labeling.url is not None
    rows, spent_rows = [], []
    for row in plan.rows:
        amount = None if others else _booked(config, jobs.get((row.role, row.name)), since)
        spent_rows += [] if amount is None else [amount]
        rows.append(
            entry([f"{row.role} {row.name}"], row.endpoint, row.model, row.critic, total([row]), amount)
        )
    notes = [*plan.notes, *plan.reasons]
    if others:
        notes.append("what was spent is known to the service at `labeling.url`; its dashboard shows it")
    return {
        "rows": rows,
        "planned": dataclasses.asdict(total(plan.rows)),
        "spent": None if others else dataclasses.asdict(total(spent_rows)),
        "notes": notes,
    }


def _booked(config: LabelConfig, job: str | None, since: int) -> Amount:
    if job is None:
        return Amount()
    return _read(config, lambda engine: booked_for(engine, job, since)) or Amount()


def _read(config: LabelConfig, read: Callable[..., Any]) -> Any:
    """What is read from the run's store; None if it is another's, or not there yet."""
    where = Path(config.labeling.store or "labels")
    if config.labeling.url is not None or not (where / "labels.sqlite").is_file():
        return None
    store = Store(where, shared=True)
    try:
        return read(store.engine)
    finally:
        store.close()


# ---- quality -----------------------------------------------------------------------------------------------------


def _quality(config: LabelConfig, done: LabelledFile) -> dict[str, Any]:
    """How good these labels are: each critic's, and those of both tiers together; drift, where a probe is asked."""
    judged = Judged()
    for said in done.said:
        for judgement in (*said.voice.final, *said.voice.single):
            judged.add(judgement, endpoint=said.endpoint.key, model=said.endpoint.model)
    judged.label(done.pairs)
    if config.labeling.probe is not None and config.labeling.url is None:
        hashes = [said.tier.critic.hash for said in done.said]
        store = Store(config.labeling.store or "labels", shared=True)
        try:
            read_store(store, judged, kinds=(PROBE,), critics=hashes)
        finally:
            store.close()
    samples = max(LEAST_SAMPLES, min(MOST_SAMPLES, _WORK // len(done.pairs)))
    report = quality(judged, samples=samples)
    if len(done.said) > 1:
        # Apart: what both tiers gave together is no third critic who could agree with them.
        both = quality(_together(done), samples=samples)
        for name in ("critics", "verdicts", "warnings"):
            report[name] += both[name]
    return report


def _together(done: LabelledFile) -> Judged:
    """The labels of both tiers as those of one critic."""
    judged, models = Judged(), " > ".join(said.endpoint.model for said in done.said)
    named = {
        "critic": f"{TIERS}: {done.said[1].tier.name}",
        "critic_hash": fingerprint([said.tier.critic.hash for said in done.said]),
    }
    for judgement in done.judgements:
        judged.add(judgement.model_copy(update=named), endpoint=TIERS, model=models)
    judged.label(done.pairs)
    return judged
