"""Anthropic's models through the official package."""

from laif_jax.labeling.calls import SERVICES, Endpoint
from laif_jax.labeling.errors import EndpointError
from laif_jax.labeling.keys import Key
from laif_jax.labeling.providers.remote import require
from laif_jax.labeling.providers.sdk import SdkTransport, http_client

PATH = "/v1/messages"


class AnthropicTransport(SdkTransport):
    """POST /v1/messages."""

    def __init__(self, endpoint: Endpoint, key: Key | None) -> None:
        if key is None and endpoint.base_url is None:
            raise EndpointError(
                f"endpoint {endpoint.name}: Anthropic needs a key. Name the variable that holds it in `api_key_env`, "
                "or the file in `api_key_file`"
            )
        sdk = require("anthropic", "anthropic", "anthropic")
        url = endpoint.base_url or SERVICES["anthropic"]
        client = sdk.AsyncAnthropic(
            # Given explicitly, so that the package does not look for other credentials.
            api_key=key.reveal() if key else "none",
            base_url=url,
            max_retries=0,
            timeout=endpoint.timeout,
            http_client=http_client(sdk, endpoint, url),
        )
        super().__init__(sdk, client, url, PATH)
