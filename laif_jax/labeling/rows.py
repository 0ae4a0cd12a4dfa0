"""The rows that a run writes, from what it knows."""

from collections.abc import Sequence
from typing import Any

from laif_jax.labeling.calls import Call
from laif_jax.labeling.scheduler import utf8
from laif_jax.labeling.store import Row, now
from laif_jax.labeling.work import Result, Work


def job_row(job: str, work: Work, created: str) -> Row:
    """The `jobs` row of a job that begins."""
    return {
        "id": job,
        "kind": work.kind,
        "endpoint": work.endpoint.name,
        "endpoint_key": work.endpoint.key,
        "critic": work.critic,
        "state": "running",
        "reason": "",
        "total": len(work),
        "counts": "{}",
        "created": created,
        "updated": created,
    }


def request_row(call: Call) -> Row:
    """The `requests` row of a call that has not been made."""
    date = now()
    return {
        "key": call.key,
        "endpoint_key": call.endpoint.key,
        "model": call.endpoint.model,
        "state": "pending",
        "attempts": 0,
        "reason": "",
        "owner": "",
        "job": "",
        "reserved": 0,
        "created": date,
        "updated": date,
    }


def result_rows(
    job: str, run: int, position: int, endpoint_key: str, results: Sequence[Result]
) -> dict[str, Any]:
    """The `results` and `job_items` rows of an item. Two of its parts may be one and the same result."""
    date = now()
    rows = {
        result.key: {
            "key": result.key,
            "kind": result.kind,
            "item": result.item,
            "status": result.status,
            "endpoint_key": endpoint_key,
            "critic_hash": result.critic_hash,
            "record": utf8(result.record),
            "updated": date,
        }
        for result in results
    }
    common = {"job": job, "position": position, "run": run}
    places = [
        {**common, "part": result.part, "result": result.key, "status": result.status} for result in results
    ]
    return {"results": list(rows.values()), "job_items": places}
