"""The HTTP API of the labelling service. Who may use it is decided in `access`; its pages are in `face`."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Path, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ValidationError

from laif_jax.labeling import examples
from laif_jax.labeling.access import Gate, Limits
from laif_jax.labeling.allowed import Allowed, NotAllowedError
from laif_jax.labeling.errors import CriticError, EndpointError
from laif_jax.labeling.face import add_face
from laif_jax.labeling.jobs import JobStatus, job_request
from laif_jax.labeling.keys import Key
from laif_jax.labeling.metrics import Meters
from laif_jax.labeling.overview import Observer
from laif_jax.labeling.problems import Problem, ProblemAt, Refusal, handle_problems, invalid
from laif_jax.labeling.runner import Runner
from laif_jax.labeling.store import Store
from laif_jax.labeling.work import Work

MOST = 10**12  # no list is longer; a larger number is no SQL integer
JobId = Annotated[
    str,
    Path(pattern="^[0-9a-f]{16}$", description="the `id` of a `JobStatus`", examples=[examples.JOB_ID]),
]


class Health(BaseModel):
    """The service is up. `store`: where its store is ("" for those who gave no token). `stalled`: why it cannot write
    its store at present, "" if it can."""

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


class Live:
    """What lives as long as the application does."""

    runner: Runner
    observer: Observer


def create_app(
    store: Store,
    on_start: Callable[[], None] | None = None,
    *,
    token: Key | None = None,
    limits: Limits | None = None,
    host_names: frozenset[str] | None = None,
    allowed: Allowed | None = None,
) -> FastAPI:
    """The application over an open store, which it closes when it ends.

    Args:
      on_start: called once the application is up.
      token: needed for everything but its pages and `/health`; None: nobody is asked for one.
      host_names: without a token: the names by which requests must address the service; None: any.
      allowed: the endpoints that jobs may ask; None: any.
    """
    live = Live()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        meters = Meters()
        live.runner = Runner(store, join=True, meters=meters)
        live.observer = Observer(store, live.runner, meters)
        if on_start is not None:
            on_start()
        yield
        await live.observer.close()
        await live.runner.close()
        await asyncio.to_thread(store.close)

    app = FastAPI(
        title="laif_jax labelling service",
        description=examples.DESCRIPTION,
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # their target would be the host that the request names
        openapi_tags=examples.TAGS,
        responses=_problems(403, 429, 503) | (_problems(401) if token is not None else {}),
    )
    app.add_middleware(Gate, token=token, limits=limits, host_names=host_names)
    handle_problems(app)
    _add_jobs(app, store, live, trusting=token is not None, allowed=allowed)
    _add_counts(app, store, live, trusting=token is None)
    add_face(app, store, live, needs_token=token is not None)
    return app


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem, "description": examples.PROBLEMS[status]} for status in statuses}


def _add_jobs(app: FastAPI, store: Store, live: Live, *, trusting: bool, allowed: Allowed | None) -> None:
    # The body is read by hand: a job of 20,000 comparisons is decoded in a thread, and others are answered meanwhile.
    content = {"application/json": {"schema": _job_schema(), "examples": examples.JOBS}}
    body_of_job = {"requestBody": {"required": True, "content": content}}

    async def known(job_id: str) -> JobStatus:
        status = await live.runner.status(job_id)
        if status is None:
            raise Refusal(404, "not_found", f"no job {job_id} in {store.where}. Submit it (again)")
        return status

    @app.post(
        "/v1/jobs",
        tags=["jobs"],
        summary="Submit a job",
        openapi_extra=body_of_job,
        status_code=202,
        responses=_problems(413, 415, 422),
    )
    async def submit(request: Request) -> JobStatus:
        """Starts a job and answers at once with its status. The id is a hash of what is asked for: the same job
        submitted while it runs is the same job; submitted after it ended, it runs again over the stored answers, and
        asks only for what failed."""
        _refuse_strangers(request, trusting)
        body = await request.body()
        try:
            work, cap, body = await asyncio.to_thread(_read_work, body, allowed)
            return live.runner.submit(work, body, cap)
        except NotAllowedError as error:
            raise Refusal(403, "endpoint_not_allowed", str(error)) from error
        except ValidationError as error:
            raise invalid(error) from error
        except (CriticError, EndpointError) as error:
            raise Refusal(422, "invalid", str(error), [ProblemAt(at="", message=str(error))]) from error

    @app.get("/v1/jobs", tags=["jobs"], summary="List the newest jobs", responses=_problems(422))
    async def jobs(
        limit: Annotated[int, Query(gt=0, le=1000, description="how many at most")] = 100,
    ) -> list[JobStatus]:
        """The newest first, whichever process runs them."""
        rows = await asyncio.to_thread(store.job_list, limit)
        statuses = [await live.runner.status(row["id"]) for row in rows]
        return [status for status in statuses if status is not None]

    @app.get("/v1/jobs/{job_id}", tags=["jobs"], summary="Where a job stands", responses=_problems(404, 422))
    async def job(job_id: JobId) -> JobStatus:
        """Looks at the job; costs little, so a client may ask several times a second."""
        return await known(job_id)

    @app.post(
        "/v1/jobs/{job_id}/stop",
        tags=["jobs"],
        summary="Stop a job",
        status_code=202,
        responses=_problems(404, 415, 422),
    )
    async def stop(job_id: JobId, request: Request) -> JobStatus:
        """Starts no more calls of the job; the answers under way are stored. Its items can be asked for again."""
        _refuse_strangers(request, trusting)
        await known(job_id)
        live.runner.stop(job_id)
        return await known(job_id)

    @app.get(
        "/v1/jobs/{job_id}/results",
        tags=["jobs"],
        summary="Read a job's results",
        response_class=StreamingResponse,
        responses={200: examples.RESULTS} | _problems(404, 422),
    )
    async def results(
        job_id: JobId,
        parts: Annotated[bool, Query(description="the single orders instead of the final results")] = False,
        offset: Annotated[int, Query(ge=0, le=MOST, description="results to leave out")] = 0,
        limit: Annotated[int | None, Query(gt=0, le=MOST, description="how many at most")] = None,
    ) -> StreamingResponse:
        """JSON lines in the order of the job's items: judgements, ratings, or completions and failures. A job that runs
        gives what it has."""
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


def _add_counts(app: FastAPI, store: Store, live: Live, *, trusting: bool) -> None:
    counting = asyncio.Lock()

    @app.get("/health", tags=["service"], summary="Is it up?")
    async def health() -> Health:
        """Needs no token, for load balancers; where others are asked for one, the store's place is not told."""
        stalled = store.stalled  # its words name the store's place
        return Health(
            store=str(store.path) if trusting else "",
            jobs_running=live.runner.running,
            stalled=stalled if trusting else "the store cannot be written at present" if stalled else "",
        )

    @app.get("/v1/stats", tags=["service"], summary="Counts over the whole store")
    async def stats() -> Stats:
        """Exact, so it reads the whole store: on millions of rows it takes seconds, and the next one who asks waits.
        `/v1/overview` is cheaper."""
        async with counting:  # or a few who ask at once would take all threads from those who work
            return Stats.model_validate(await asyncio.to_thread(store.stats))


def _refuse_strangers(request: Request, trusting: bool) -> None:
    """A job names an address and the variable that holds the key for it, so a web page that the user of this machine
    happens to look at must not be able to submit one. Browsers let pages of other sites send no JSON unasked, and
    say from which site a request comes. (A page of another site knows no token.)"""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "not_json", "send the job as JSON, with the header Content-Type: application/json")
    origin = request.headers.get("origin")
    # The service's own pages on this machine have an origin too.
    if not trusting and origin is not None and _host_of(origin) not in _OWN_NAMES:
        raise Refusal(403, "wrong_origin", f"jobs are not taken from web pages of other sites ({origin})")


_OWN_NAMES = ("127.0.0.1", "localhost", "::1")


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def _read_work(body: bytes, allowed: Allowed | None) -> tuple[Work, int | None, bytes]:
    """The work of a job, its budget in nano-dollars, and the job as other workers shall read it."""
    job = job_request.validate_json(body)
    if allowed is not None:
        # The only way in: what runs, and what workers of the same store find there, is the operator's own entry.
        job = job.model_copy(update={"endpoint": allowed.admit(job.endpoint)})
        body = job.model_dump_json().encode("utf-8", "surrogatepass")
    work = job.work()
    assert work.id  # hashed here, in the thread
    return work, job.cap, body


def _job_schema() -> dict[str, Any]:
    return job_request.json_schema(ref_template="#/components/schemas/{model}")
