"""Words and examples of the API's description at `/openapi.json` and `/docs`."""

from typing import Any

JOB_ID = "5f0c2a9be1d34c77"

DESCRIPTION = """\
Asks teacher models for completions and critic models for judgements, and never asks for the same thing twice: every
answer is stored before it counts.

Submit a job (`POST /v1/jobs`), look at it until its `state` is `done` (`GET /v1/jobs/{id}`), and read its results
(`GET /v1/jobs/{id}/results`). The Python client, `laif_jax.labeling.LabelClient`, does these three.

**Token.** A service that others than this machine can reach needs `Authorization: Bearer TOKEN` with every request but
those to its pages and to `/health`. It asks only the endpoints that its operator listed (and simulated ones), with the
operator's keys and prices: a job gives provider, model, address, `options` and `batch` as listed, and no key.

**Errors** have one shape, `Problem`: `detail` for people, `kind` for programs, `problems` for mistakes in a request.
After 429, wait as `Retry-After` says.

**Keys** of endpoints are never sent: a job names the environment variable (`api_key_env`) or the file (`api_key_file`)
on the service's machine, or, with a token, neither.
"""

TAGS = [
    {"name": "jobs", "description": "Lists of items put to one endpoint."},
    {"name": "service", "description": "The service as a whole: for dashboards and monitoring."},
]

PROBLEMS = {
    401: "the token is missing or wrong",
    403: "another host's name, a web page of another site, or an endpoint that this service does not ask for others",
    404: "no such job",
    413: "the body is too large",
    415: "the body was not sent as `application/json`",
    422: "the request cannot be accepted as it stands",
    429: "too many requests from this address; `Retry-After` says how long to wait",
    503: "the store cannot be read or written at present",
}

_PROMPT = {"messages": [{"role": "user", "content": "Name a prime above 10."}], "id": "f3b1f0a1c2d34e55"}
_ENDPOINT = {
    "provider": "openai",
    "base_url": "https://api.openai.com/v1",
    "model": "gpt-4.1",
    "api_key_env": "OPENAI_API_KEY",
}
_SIMULATED = {"provider": "simulated", "simulated": {"world": "planted", "accuracy": 0.9}}


def _completion(generator: str, text: str, quality: float) -> dict[str, Any]:
    return {
        "prompt_id": _PROMPT["id"],
        "generator": generator,
        "text": text,
        "meta": {"quality": quality},
    }


_A, _B = _completion("base", "12", 0.1), _completion("tuned", "11", 0.9)

JOBS: dict[str, Any] = {
    "judge": {
        "summary": "judgements of comparisons, by planted truth",
        "value": {
            "kind": "judge",
            "endpoint": _SIMULATED,
            "critic": "laif_basic",
            "order": "both",
            "comparisons": [{"prompt": _PROMPT, "a": _A, "b": _B}],
        },
    },
    "rate": {
        "summary": "ratings of single completions, within a budget",
        "value": {
            "kind": "rate",
            "endpoint": _ENDPOINT,
            "budget": "2.50USD",
            "critic": "rating_1_10",
            "items": [{"prompt": _PROMPT, "completion": _B}],
        },
    },
    "complete": {
        "summary": "completions of prompts",
        "value": {
            "kind": "complete",
            "endpoint": _ENDPOINT,
            "generator": "gpt-4.1",
            "prompts": [_PROMPT],
            "temperature": 1.0,
            "max_tokens": 512,
        },
    },
}

RESULTS: dict[str, Any] = {
    "description": "one JSON object per line: a `Judgement`, `Rating`, `Completion` or `Failure`",
    "content": {
        "application/x-ndjson": {
            "schema": {"type": "string"},
            "example": '{"comparison_id": "77aa...", "critic": "laif_basic", "order": "both", "status": "ok", '
            '"p_b": 1.0}\n',
        }
    },
}
