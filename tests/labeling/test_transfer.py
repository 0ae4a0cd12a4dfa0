"""Export, import and garbage collection, over both kinds of store."""

import pytest

from laif_jax.labeling.collect import Garbage, collect
from laif_jax.labeling.errors import StoreError
from laif_jax.labeling.jobs import JudgeJob
from laif_jax.labeling.store import Store
from laif_jax.labeling.transfer import export_store, import_store, rows_of
from laif_jax.records import read_rows
from tests.labeling.helpers import planted, run_job, simulated

PRICED = simulated(failure_rate=0.3, garbage_rate=0.1).model_copy(
    update={"prompt_price": 1.0, "completion_price": 1.0}
)
JOB = JudgeJob(endpoint=PRICED, critic="laif_basic", comparisons=tuple(planted(30)))


@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz", "all.parquet"])
def test_an_export_goes_into_another_store_without_being_paid_again(place, tmp_path, name: str) -> None:
    run_job(place, JOB)
    file = tmp_path / name
    store = Store(place)
    counts = export_store(store, file)
    spent, original = store.account().spent, list(rows_of(store))
    store.close()
    assert spent > 0
    assert counts["requests"] == counts["responses"] == counts["usage"] == 60
    assert sum(counts.values()) == sum(1 for _ in read_rows(file)) == len(original)

    other = Store(tmp_path / "other")
    added = import_store(other, file)
    assert added == {**dict.fromkeys(added, 0), **counts}
    assert import_store(other, file) == dict.fromkeys(added, 0)  # once is enough
    assert other.account().spent == 0
    copies = [row for row in rows_of(other) if row["table"] == "results"]
    assert copies == [row for row in original if row["table"] == "results"]
    other.close()
    status, *_ = run_job(tmp_path / "other", JOB)
    assert (status.calls, status.cached, status.state) == (0, 60, "done")


def test_an_import_leaves_what_is_there_and_answers_what_is_open(tmp_path) -> None:
    run_job(tmp_path / "a", JOB)
    source = Store(tmp_path / "a")
    export_store(source, tmp_path / "a.jsonl")
    source.close()
    dead = simulated(failure_rate=1.0, max_attempts=1)
    assert dead.key != PRICED.key
    run_job(tmp_path / "b", JudgeJob(endpoint=dead, critic="laif_basic", comparisons=tuple(planted(3))))
    store = Store(tmp_path / "b")
    assert store.left() == {"failed": 6}
    import_store(store, tmp_path / "a.jsonl")
    assert store.stats()["requests"] == {"failed": 6, "ok": 60}
    store.close()


def test_files_that_are_no_export_are_refused(tmp_path) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(StoreError, match=r"\.parquet"):
        export_store(store, tmp_path / "all.csv")
    (tmp_path / "x.jsonl").write_text('{"table": "passwords"}\n')
    with pytest.raises(StoreError, match="row 1"):
        import_store(store, tmp_path / "x.jsonl")
    store.close()


def test_garbage_is_shown_first_and_paid_answers_go_only_when_named(place) -> None:
    status, *_ = run_job(place, JOB)
    store = Store(place)
    before = store.stats()
    nothing = collect(store)
    assert (nothing.results, nothing.requests, nothing.answers) == (0, 0, 0)
    plan = collect(store, jobs=[status.id], answers=True)
    assert (plan.results, plan.answers, plan.requests) == (90, 60, 0)
    assert plan.bytes > 10_000
    assert store.stats() == before  # only looked
    gone = collect(store, jobs=[status.id], dry_run=False)
    assert (gone.results, gone.answers) == (90, 0)
    assert store.stats()["answers"] == 60
    store.close()
    again, *_ = run_job(place, JOB)
    assert (again.calls, again.cached) == (0, 60)
    store = Store(place)
    assert collect(store, jobs=[status.id], answers=True, dry_run=False).answers == 60
    assert collect(store) == Garbage()
    with pytest.raises(StoreError, match="no such job"):
        collect(store, jobs=["0" * 16])
    other = Store(place, shared=True)
    with pytest.raises(StoreError, match="other workers"):
        collect(store, dry_run=False)
    other.close()
    store.close()
