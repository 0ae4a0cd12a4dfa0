"""Runs jobs: looks answers up, claims and asks for the rest, stores the results. Several processes may share a job."""

import asyncio
import contextlib
import gc
import logging
from datetime import UTC, datetime

from laif_jax.labeling.budget import set_cap
from laif_jax.labeling.errors import LabelError
from laif_jax.labeling.jobs import JobStatus, job_request
from laif_jax.labeling.metrics import Meters
from laif_jax.labeling.prices import need_price
from laif_jax.labeling.run import JobRun
from laif_jax.labeling.scheduler import Scheduler
from laif_jax.labeling.store import Row, Store
from laif_jax.labeling.work import Work

log = logging.getLogger(__name__)
LOOK = 0.5  # seconds between two looks for jobs of others
COLLECT = (20_000, 20, 50)  # see `gc.set_threshold`
UNDER_WAY = ("running", "out_of_budget")


class Runner:
    """All jobs of one process.

    Args:
      join: take part in the jobs that other processes on the same store run.
    """

    def __init__(self, store: Store, *, join: bool = False, meters: Meters | None = None) -> None:
        # By its own thresholds Python walks through all items of all jobs again and again, for a tenth of a second.
        gc.set_threshold(*map(max, gc.get_threshold(), COLLECT))
        self.store = store
        self.scheduler = Scheduler(store, meters)
        self._jobs: dict[str, tuple[JobRun, asyncio.Task[None]]] = {}
        self._ended: dict[str, JobStatus] = {}  # without the items, which are large
        self._refused: dict[str, str] = {}  # jobs of others that cannot be run here, and why
        self._join = join
        self._closed = asyncio.Event()
        self._care = asyncio.create_task(self._look_after(), name="label-care")

    def submit(self, work: Work, body: bytes | None = None, cap: int | None = None) -> JobStatus:
        """Starts a job, or finds it running.

        Args:
          body: the job as JSON, for other workers. cap: what it may cost, in nano-dollars.

        Raises:
          EndpointError: the endpoint cannot be used, or has no price although there is a budget.
        """
        if work.id in self._jobs:
            if cap is not None:  # perhaps another one than before
                self.store.do(lambda connection: set_cap(connection, work.id, cap))
            return self._jobs[work.id][0].status
        party = self.scheduler.party(work.id, work.endpoint)
        if cap is not None or self.store.account().cap is not None:
            need_price(work.endpoint, datetime.now(UTC).date())
        return self._start(JobRun(work, self.store, self.scheduler, party, body=body, cap=cap))

    def _start(self, job: JobRun) -> JobStatus:
        task = asyncio.create_task(job.run(), name=f"job-{job.id}")
        self._jobs[job.id] = (job, task)
        self._ended.pop(job.id, None)
        task.add_done_callback(lambda _: self._end(job))
        return job.status

    def stop(self, job_id: str) -> None:
        """Stops a job that runs: it starts no more calls, and ends when those under way are answered and stored."""
        if job_id in self._jobs:
            self._jobs[job_id][0].stop()

    def _end(self, job: JobRun) -> None:
        del self._jobs[job.id]
        if not job.shared:  # of a shared job the store knows better how it stands
            self._ended[job.id] = job.status

    async def status(self, job_id: str) -> JobStatus | None:
        if job_id in self._jobs:
            job = self._jobs[job_id][0]
            if job.shared:
                await job.count()
            return job.status.model_copy(update={"stalled": self.store.stalled})
        if job_id in self._ended and self._ended[job_id].state != "interrupted":
            return self._ended[job_id]
        row = await asyncio.to_thread(self.store.job, job_id)
        if row is None:
            return None
        status = JobStatus.from_row(row)
        if status.state in UNDER_WAY:  # others run it
            counts = await asyncio.to_thread(self.store.job_counts, job_id, row["run"])
            status = status.model_copy(update={"counts": counts, "done": sum(counts.values())})
        return status

    @property
    def running(self) -> int:
        """How many jobs run."""
        return len(self._jobs)

    @property
    def running_ids(self) -> list[str]:
        """The jobs that run in this process."""
        return list(self._jobs)

    # ---- other workers -----------------------------------------------------------------------------------------

    async def _look_after(self) -> None:
        """Renews the lease, gives back what dead workers held, joins jobs of others and leaves those that ended."""
        beat_every = max(1, round(self.store.lease / 6 / LOOK))
        count = 0
        while not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), LOOK)
            count += 1
            try:
                others = await asyncio.to_thread(self.store.others)
                if others or count % beat_every == 0:
                    await asyncio.wrap_future(self.store.beat())
                if others:
                    for job, _ in self._jobs.values():
                        job.shared = True
                    await self._follow()
            except LabelError as error:
                log.error("%s", error)
            except Exception:
                log.exception("looking after other workers failed; tried again")

    async def _follow(self) -> None:
        rows = await asyncio.to_thread(self.store.open_jobs)
        for row in rows:
            if self._join and not self.scheduler.closing and row["id"] not in {*self._jobs, *self._refused}:
                await self._take_part(row)
        open_runs = {row["id"]: row["run"] for row in rows}
        for job_id, (job, _) in list(self._jobs.items()):
            if job.joined and open_runs.get(job_id) != job.run_number:
                job.leave()

    async def _take_part(self, row: Row) -> None:
        body = await asyncio.to_thread(self.store.job_body, row["id"])
        if body is None:
            return
        try:
            work = await asyncio.to_thread(_read, body)
            party = self.scheduler.party(work.id, work.endpoint)
        except (LabelError, ValueError) as error:
            self._refused[row["id"]] = str(error)
            log.error("job %s cannot be run by this worker: %s", row["id"], error)
            return
        log.info("taking part in job %s (%s, %d items)", row["id"], row["kind"], row["total"])
        self._start(JobRun(work, self.store, self.scheduler, party, joined=row))

    async def close(self, grace: float = 10.0) -> None:
        """Starts no more calls, waits for those in flight so that their answers are stored, then stops."""
        self.scheduler.stop()
        self._closed.set()
        tasks = [task for _, task in self._jobs.values()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._care
        await self.scheduler.close()


def _read(body: bytes) -> Work:
    work = job_request.validate_json(body).work()
    assert work.id
    return work
