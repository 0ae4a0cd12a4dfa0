"""What a provider is."""

from typing import Any, Protocol

from laif_jax.labeling.calls import Call


class Provider(Protocol):
    """Makes one attempt of one call.

    Attributes:
      free: calls cost nothing and cannot be overrun: no back-off between attempts, no early stop after many failures.
      width: calls in flight that make sense.
    """

    free: bool
    width: int

    async def call(self, call: Call, attempt: int) -> dict[str, Any]:
        """The decoded body of the endpoint's answer, in the OpenAI chat wire format.

        Args:
          attempt: 0, 1, ... over all jobs.

        Raises:
          CallError: no answer.
        """
        ...

    async def close(self) -> None: ...
