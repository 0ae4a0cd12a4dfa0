"""The simulated provider over HTTP, in OpenAI's chat protocol: python -m benchmarks.labeling_endpoint --ready FILE.

It judges pairs as `laif_basic` shows them, by the quality that each response tells in its first words
(`[quality 0.7] ...`), after `--latency` seconds. `GET /stats` tells how many requests came, the most at once, and the
seconds from the first request's arrival to the last answer; `POST /reset` begins anew.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from laif_jax.config.schema import SimulatedSpec
from laif_jax.labeling.calls import Call, Endpoint, Truth
from laif_jax.labeling.critic import load_critic
from laif_jax.labeling.providers.simulated import SimulatedProvider

CRITIC = "laif_basic"


class Judge:
    """Answers chat requests."""

    def __init__(self, latency: float) -> None:
        self.endpoint = Endpoint(
            provider="simulated", simulated=SimulatedSpec(world="planted", accuracy=0.9, latency=latency)
        )
        self.provider, self.reader = SimulatedProvider(self.endpoint), load_critic(CRITIC).reader
        self.reset()

    def reset(self) -> None:
        self.requests = self.in_flight = self.most = 0
        self.first = self.last = 0.0

    def stats(self) -> dict[str, Any]:
        return {"requests": self.requests, "most": self.most, "seconds": self.last - self.first}

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/stats":
            return web.json_response(self.stats())
        if request.path == "/reset":
            self.reset()
            return web.json_response({})
        self.first = self.first or time.perf_counter()
        self.requests += 1
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        body = await request.json()
        messages = tuple(body["messages"])
        reply = await self.provider.call(Call(self.endpoint, messages, {}, truth=self._truth(messages)), 0)
        self.in_flight -= 1
        self.last = time.perf_counter()
        return web.Response(text=json.dumps(reply.raw), content_type="application/json")

    def _truth(self, messages: tuple[dict[str, str], ...]) -> Truth:
        """What the critic was shown: the last pair in the prompt (the first is its example)."""
        before, _, pair = messages[-1]["content"].rpartition("## Output (a):\n")
        first, _, rest = pair.partition("\n\n## Output (b):\n")
        second, _, _ = rest.partition("\n\n## Which")
        instruction = before.rpartition("## Instruction:\n")[2].strip()
        return Truth(instruction, first, second, parser=self.reader)


async def serve(latency: float, ready: Path) -> None:
    runner = web.ServerRunner(web.Server(Judge(latency).handle))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    port = runner.addresses[0][1]
    partial = ready.with_name("url.part")
    partial.write_text(f"http://127.0.0.1:{port}")
    partial.replace(ready)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--ready", type=Path, required=True, help="gets the address")
    options = parser.parse_args()
    asyncio.run(serve(options.latency, options.ready))


if __name__ == "__main__":
    main()
