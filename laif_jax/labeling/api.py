"""The HTTP API of the labelling service. It listens on this machine only, unless told otherwise."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ValidationError

from laif_jax.labeling.errors import CriticError, EndpointError
from laif_jax.labeling.jobs import JobStatus, job_request
from laif_jax.labeling.runner import Runner
from laif_jax.labeling.store import Store
from laif_jax.labeling.work import Work


class Health(BaseModel):
    """The service is up. `stalled`: why it cannot write its store at present, "" if it can."""

    status: str = "ok"
    store: str
    jobs_running: int
    stalled: str


class Stats(BaseModel):
    """Counts over the whole store: requests by state, failed attempts by kind, results by status, jobs by state, and
    the usage of all stored answers (`cost` in US dollars, where prices are known)."""

    requests: dict[str, int]
    failures: dict[str, int]
    results: dict[str, int]
    jobs: dict[str, int]
    answers: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    budget: dict[str, int | None] | None = None


def create_app(store: Store, on_start: Callable[[], None] | None = None) -> FastAPI:
    """The application over an open store, which it closes when it ends.

    Args:
      on_start: called once the application is up.
    """
    state: dict[str, Runner] = {}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        state["runner"] = Runner(store, join=True)
        if on_start is not None:
            on_start()
        yield
        await state["runner"].close()
        await asyncio.to_thread(store.close)

    app = FastAPI(title="laif_jax labelling service", lifespan=lifespan)

    @app.get("/health")
    async def health() -> Health:
        return Health(store=str(store.path), jobs_running=state["runner"].running, stalled=store.stalled)

    # The body is read by hand: a job of 20,000 comparisons is decoded in a thread, and others are answered meanwhile.
    schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": _job_schema()}}}}

    @app.post("/v1/jobs", openapi_extra=schema, status_code=202)
    async def submit(request: Request) -> JobStatus:
        _refuse_strangers(request)
        body = await request.body()
        try:
            work, cap = await asyncio.to_thread(_read_work, body)
            return state["runner"].submit(work, body, cap)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False, include_input=False)
            raise HTTPException(422, detail=problems[:20]) from error
        except (CriticError, EndpointError) as error:
            raise HTTPException(422, detail=str(error)) from error

    @app.get("/v1/jobs")
    async def jobs(limit: Annotated[int, Query(gt=0, le=1000)] = 100) -> list[JobStatus]:
        rows = await asyncio.to_thread(store.job_list, limit)
        live = [await state["runner"].status(row["id"]) for row in rows]
        return [status for status in live if status is not None]

    async def known(job_id: str) -> JobStatus:
        status = await state["runner"].status(job_id)
        if status is None:
            raise HTTPException(404, detail=f"no job {job_id} in {store.path}. Submit it (again)")
        return status

    @app.get("/v1/jobs/{job_id}")
    async def job(job_id: str) -> JobStatus:
        return await known(job_id)

    @app.post("/v1/jobs/{job_id}/stop", status_code=202)
    async def stop(job_id: str, request: Request) -> JobStatus:
        """Starts no more calls of the job; the answers under way are stored. Its items can be asked for again."""
        _refuse_strangers(request)
        await known(job_id)
        state["runner"].stop(job_id)
        return await known(job_id)

    @app.get("/v1/jobs/{job_id}/results")
    async def results(
        job_id: str,
        parts: bool = False,
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int | None, Query(gt=0)] = None,
    ) -> StreamingResponse:
        """JSON lines in the order of the job's items; with `parts`, the single orders instead of the final results."""
        await known(job_id)

        def lines() -> Iterator[str]:
            batch: list[str] = []
            for record in store.job_results(job_id, parts=parts, offset=offset, limit=limit):
                batch.append(record)
                if len(batch) == 500:
                    yield "\n".join(batch) + "\n"
                    batch = []
            if batch:
                yield "\n".join(batch) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    @app.get("/v1/stats")
    async def stats() -> Stats:
        return Stats.model_validate(await asyncio.to_thread(store.stats))

    return app


def _refuse_strangers(request: Request) -> None:
    """A job names an address and the variable that holds the key for it, so a web page that the user of this machine
    happens to look at must not be able to submit one. Browsers let pages of other sites send no JSON unasked, and
    say from which site a request comes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(
            415, detail="send the job as JSON, with the header Content-Type: application/json"
        )
    origin = request.headers.get("origin")
    # The service's own /docs page on this machine has an origin too.
    if origin is not None and (urlsplit(origin).hostname or "") not in _OWN_NAMES:
        raise HTTPException(403, detail=f"jobs are not taken from web pages of other sites ({origin})")


_OWN_NAMES = ("127.0.0.1", "localhost", "::1")


def _read_work(body: bytes) -> tuple[Work, int | None]:
    """The work of a job, and its budget in nano-dollars."""
    job = job_request.validate_json(body)
    work = job.work()
    assert work.id  # hashed here, in the thread
    return work, job.cap


def _job_schema() -> dict[str, Any]:
    return job_request.json_schema(ref_template="#/components/schemas/{model}")
