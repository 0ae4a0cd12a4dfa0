"""Errors of the HTTP API: one shape for all of them, without keys and without what was sent."""

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException as StarletteHTTPException

from laif_jax.labeling.errors import LabelError, StoreError
from laif_jax.labeling.keys import redact

log = logging.getLogger(__name__)
MOST = 20  # problems of one request that are listed
_KINDS = {404: "not_found", 405: "not_allowed"}


class ProblemAt(BaseModel):
    """One mistake in a request. `at`: where, as in `comparisons.3.prompt`."""

    at: str
    message: str


class Problem(BaseModel):
    """The body of every error.

    Attributes:
      detail: what is wrong and what to do, for people.
      kind: `unauthorised` (401), `wrong_host`, `wrong_origin`, `endpoint_not_allowed` (403), `not_found` (404),
        `not_allowed` (405), `too_large` (413), `not_json` (415), `invalid` (422), `too_many_requests` (429),
        `internal` (500), `store` (503).
      problems: of `invalid`: the mistakes, the first 20.
    """

    detail: str
    kind: str
    problems: list[ProblemAt] = Field(default_factory=list)


class Refusal(HTTPException):
    """An error that the API answers with."""

    def __init__(self, status: int, kind: str, detail: str, problems: Sequence[ProblemAt] = ()) -> None:
        super().__init__(status, detail=detail)
        self.kind, self.problems = kind, list(problems)


def invalid(error: ValidationError | RequestValidationError) -> Refusal:
    """The refusal of a request that does not fit its schema. What was sent is not quoted: it may hold a secret."""
    found = (
        error.errors(include_url=False, include_context=False, include_input=False)
        if isinstance(error, ValidationError)
        else error.errors()
    )
    problems = [
        ProblemAt(at=".".join(map(str, item["loc"])), message=str(item["msg"])) for item in found[:MOST]
    ]
    lines = [f"{problem.at}: {problem.message}" if problem.at else problem.message for problem in problems]
    more = f" (and {len(found) - MOST} more)" if len(found) > MOST else ""
    return Refusal(422, "invalid", "; ".join(lines)[:2000] + more, problems)


def handle_problems(app: FastAPI) -> None:
    """Gives every error of the application its shape."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        kind = getattr(error, "kind", _KINDS.get(error.status_code, "invalid"))
        body = Problem(detail=str(error.detail), kind=kind, problems=getattr(error, "problems", []))
        return _response(error.status_code, body, error.headers)

    @app.exception_handler(RequestValidationError)
    async def unfit(request: Request, error: RequestValidationError) -> JSONResponse:
        return await refused(request, invalid(error))

    @app.exception_handler(StoreError)
    async def no_store(_: Request, error: StoreError) -> JSONResponse:
        log.error("%s", error)
        return _response(503, Problem(detail=str(error), kind="store"))

    @app.exception_handler(SQLAlchemyError)
    async def no_database(_: Request, error: SQLAlchemyError) -> JSONResponse:
        log.error("the store could not be read: %s", error)
        text = "the store cannot be read at present; see the service's log, and try again"
        return _response(503, Problem(detail=text, kind="store"))

    @app.exception_handler(LabelError)
    async def unusable(_: Request, error: LabelError) -> JSONResponse:
        return _response(422, Problem(detail=str(error), kind="invalid"))

    @app.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _response(500, Problem(detail="internal error; the service's log says more", kind="internal"))


def _clean(text: str) -> str:
    return redact(text, shapes=True).encode("utf-8", "replace").decode()


def _response(status: int, problem: Problem, headers: Any = None) -> JSONResponse:
    problem.detail = _clean(problem.detail)
    for item in problem.problems:
        item.at, item.message = _clean(item.at)[:300], _clean(item.message)[:1000]
    return JSONResponse(problem.model_dump(), status, headers=headers)
