"""A store that an older release wrote is upgraded in place and goes on."""

import gzip
from pathlib import Path

import pytest
import sqlalchemy as sa

from laif_jax.labeling import schema
from laif_jax.labeling.errors import StoreError
from laif_jax.labeling.jobs import CompleteJob, JudgeJob
from laif_jax.labeling.store import Store
from laif_jax.records import Judgement, Prompt
from tests.labeling.helpers import planted, run_job, simulated

GOLDEN = Path(__file__).parent / "golden" / "store_v1.sqlite.gz"
JUDGE = JudgeJob(endpoint=simulated(failure_rate=0.2), critic="laif_basic", comparisons=tuple(planted(6)))
TEACH = CompleteJob(
    endpoint=simulated(skill=0.5, failure_rate=0.9, max_attempts=2),
    prompts=(Prompt.from_text("Q1"), Prompt.from_text("Q2")),
    generator="t",
    n=2,
)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Six comparisons judged in both orders, and four completions of which two failed (one marked as in flight), as
    version 1 left them."""
    (tmp_path / "labels.sqlite").write_bytes(gzip.decompress(GOLDEN.read_bytes()))
    return tmp_path


def test_a_store_of_version_1_is_upgraded_with_all_that_it_holds(old) -> None:
    store = Store(old)
    stats = store.stats()
    assert stats["requests"] == {"ok": 14, "failed": 1, "pending": 1}
    assert (stats["answers"], stats["results"], stats["jobs"]) == (14, {"ok": 20, "failed": 2}, {"done": 2})
    assert stats["prompt_tokens"] > 0
    job = JUDGE.work().id
    judgements = [Judgement.model_validate_json(line) for line in store.job_results(job)]
    assert [j.comparison_id for j in judgements] == [c.id for c in JUDGE.comparisons]
    assert store.job_counts(job, 0) == {"ok": 6}
    with store.engine.connect() as connection:
        names = set(sa.inspect(connection).get_table_names())
        assert names == set(schema.metadata.tables)
        indexes = {index["name"] for index in sa.inspect(connection).get_indexes("requests")}
        assert "requests_open" in indexes
        texts = connection.execute(sa.select(sa.func.count()).select_from(schema.request_texts)).scalar_one()
        assert texts == 16
    store.close()
    Store(old).close()  # and is not upgraded again


def test_its_answers_are_not_asked_for_again(old) -> None:
    status, *_ = run_job(old, JUDGE)
    assert (status.state, status.calls, status.cached) == ("done", 0, 12)
    status, *_ = run_job(old, TEACH)
    assert (status.calls, status.cached) == (2, 2)


def test_an_upgrade_that_breaks_off_leaves_the_old_store(old, monkeypatch) -> None:
    from laif_jax.labeling import migrations

    def broken(connection: sa.Connection) -> None:
        migrations._from_1(connection)
        raise StoreError("no more")

    monkeypatch.setitem(migrations.STEPS, 1, broken)
    with pytest.raises(StoreError, match="no more"):
        Store(old)
    monkeypatch.undo()
    test_its_answers_are_not_asked_for_again(old)
