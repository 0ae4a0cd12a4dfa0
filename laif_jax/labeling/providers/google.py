"""Gemini, and models on Vertex AI, through the official package `google-genai`."""

import contextvars
import importlib
import importlib.util
from typing import Any

from laif_jax.labeling.calls import SERVICES, VERTEX, Endpoint
from laif_jax.labeling.errors import BadRequest, EndpointError
from laif_jax.labeling.keys import Key, redact
from laif_jax.labeling.providers.remote import Exchange, connection_error, is_loopback, require, unreachable

# What came over the wire in the present task: the package gives only its own reading of it.
_seen: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("google_exchange", default=None)


async def _keep(response: Any) -> None:
    seen = _seen.get()
    if seen is not None:
        await response.aread()
        seen.append(response)


def make_client(endpoint: Endpoint, key: Key | None) -> tuple[Any, Any]:
    """(the package, its client), without retries of its own.

    Raises:
      EndpointError: the package is not there, or no key and no project is given, or Google's credentials are missing.
    """
    genai = require("google.genai", "google", "google")
    http = http_package()
    if not endpoint.project and key is None and endpoint.base_url is None:
        raise EndpointError(
            f"endpoint {endpoint.name}: Gemini needs a key (`api_key_env` or `api_key_file`), or `project` for "
            "Vertex AI"
        )
    url = endpoint.base_url
    options: dict[str, Any] = {
        "timeout": int(endpoint.timeout * 1000),
        # One attempt. Without this the package quietly tries a broken connection again, and pays twice.
        "retry_options": {"attempts": 1},
        "httpx_async_client": http.AsyncClient(
            limits=http.Limits(
                max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency
            ),
            event_hooks={"response": [_keep]},
            trust_env=not (url and is_loopback(url)),
        ),
    }
    if url:
        options["base_url"] = url
    if endpoint.project:
        account: dict[str, Any] = {
            "vertexai": True,
            "project": endpoint.project,
            "location": endpoint.location or "global",
        }
        if url and is_loopback(url):  # an emulator on this machine has no log-in
            account["credentials"] = _anonymous()
    else:
        account = {"vertexai": False, "api_key": key.reveal() if key else "none"}
    try:
        return genai, genai.Client(**account, http_options=options)
    except Exception as error:
        auth = importlib.import_module("google.auth.exceptions")
        if isinstance(error, (auth.GoogleAuthError, ValueError)):
            raise EndpointError(
                f"endpoint {endpoint.name}: {error}. For Vertex AI do: gcloud auth application-default login"
            ) from error
        raise


def _anonymous() -> Any:
    credentials = importlib.import_module("google.oauth2.credentials")
    return credentials.Credentials(token="none")


def http_package() -> Any:
    """httpx2 where it is installed, which costs a tenth of httpx per call."""
    name = "httpx2" if importlib.util.find_spec("httpx2") else "httpx"
    return importlib.import_module(name)


class GoogleTransport:
    """POST .../models/MODEL:generateContent."""

    def __init__(self, endpoint: Endpoint, key: Key | None) -> None:
        self._genai, self.client = make_client(endpoint, key)
        self._http, self._model = http_package(), endpoint.model
        home = VERTEX if endpoint.project else SERVICES["google"]
        self.url = f"{endpoint.base_url or home}/models/{endpoint.model}:generateContent"

    async def send(self, body: dict[str, Any]) -> Exchange:
        errors, auth = self._genai.errors, importlib.import_module("google.auth.exceptions")
        seen: list[Any] = []
        token = _seen.set(seen)
        try:
            await self.client.aio.models.generate_content(
                model=self._model, contents=body["contents"], config=config_of(body)
            )
        except errors.APIError as error:
            if not seen:
                raise unreachable(self.url, error, sent=True) from error
        except self._http.TransportError as error:
            raise connection_error(self.url, error) from error
        except auth.GoogleAuthError as error:
            raise unreachable(self.url, error, sent=False) from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            # Before the exchange: a field that the package does not have. After it: a body that it cannot read,
            # which is told by our own reading of it.
            if not seen:
                raise BadRequest(
                    reason=redact(f"{self.url}: the request cannot be written: {error!r}")
                ) from error
        finally:
            _seen.reset(token)
        response = seen[-1]
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Exchange(response.status_code, headers, response.content)

    async def close(self) -> None:
        await self.client.aio.aclose()


def config_of(body: dict[str, Any]) -> dict[str, Any]:
    """The package's `config` of a request's body."""
    config = dict(body.get("generationConfig", {}))
    for name in ("systemInstruction", "safetySettings"):
        if name in body:
            config[name] = body[name]
    return config
