"""Several processes (here: runners with stores of their own) share one job, over both kinds of store."""

import asyncio

from laif_jax.labeling.jobs import JudgeJob
from laif_jax.labeling.runner import Runner
from laif_jax.labeling.store import Store
from tests.labeling.helpers import planted, simulated


async def settled(runner: Runner, job: str, state: str, seconds: float = 60.0):
    for _ in range(int(seconds / 0.02)):
        status = await runner.status(job)
        if status is not None and status.state == state:
            return status
        await asyncio.sleep(0.02)
    raise AssertionError(await runner.status(job))


def test_two_workers_share_a_job_and_ask_each_request_once(place) -> None:
    job = JudgeJob(
        endpoint=simulated(latency=0.02, concurrency=4), critic="laif_basic", comparisons=tuple(planted(150))
    )

    async def run() -> None:
        one, two = Store(place), Store(place, shared=True)
        first, second = Runner(one, join=True), Runner(two, join=True)
        work = job.work()
        first.submit(work, job.model_dump_json().encode())
        status = await settled(first, work.id, "done")
        assert (status.done, status.counts) == (150, {"ok": 150})
        assert (await settled(second, work.id, "done")).counts == {"ok": 150}
        with one.engine.connect() as connection:
            rows = connection.exec_driver_sql("SELECT count(*), count(DISTINCT key) FROM usage").one()
            owners = connection.exec_driver_sql("SELECT count(*) FROM requests WHERE owner <> ''").scalar()
        assert (tuple(rows), owners) == ((300, 300), 0)
        assert len(list(one.job_results(work.id))) == 150
        assert one.job_body(work.id) is None
        await second.close()
        await first.close()
        two.close()
        one.close()

    asyncio.run(run())


def test_a_job_that_is_run_again_elsewhere_is_never_called_done_here(place) -> None:
    job = JudgeJob(
        endpoint=simulated(latency=0.05, concurrency=1), critic="laif_basic", comparisons=tuple(planted(200))
    )

    async def run() -> None:
        one, two = Store(place), Store(place, shared=True)
        first, second = Runner(one, join=True), Runner(two, join=True)
        work = job.work()
        first.submit(work, job.model_dump_json().encode())
        for _ in range(500):
            if second.running:
                break
            await asyncio.sleep(0.02)
        assert second.running == 1
        first.stop(work.id)
        await settled(first, work.id, "interrupted")
        for _ in range(500):
            if not second.running:
                break
            await asyncio.sleep(0.02)
        status = await second.status(work.id)
        assert status.state == "interrupted"
        await second.close()
        await first.close()
        two.close()
        one.close()

    asyncio.run(run())


def test_claims_run_ahead_of_the_calls_but_not_far(place) -> None:
    """What is claimed when a worker dies counts as perhaps paid for: the queue is short, and never empty."""
    endpoint = simulated(latency=0.05, concurrency=4)
    job = JudgeJob(endpoint=endpoint, critic="laif_basic", comparisons=tuple(planted(400)), order="seeded")

    async def run() -> None:
        store = Store(place)
        runner = Runner(store)
        status = runner.submit(job.work())
        seen = []
        while status.state == "running" and len(seen) < 60:
            await asyncio.sleep(0.01)
            seen.append(store.left().get("in_flight", 0))
            status = await runner.status(status.id)
        runner.stop(status.id)
        await settled(runner, status.id, "interrupted")
        assert 4 < max(seen) <= 4 + 8 + 8  # under way, in the queue, and one claim
        assert "in_flight" not in store.left()
        await runner.close()
        store.close()

    asyncio.run(run())
