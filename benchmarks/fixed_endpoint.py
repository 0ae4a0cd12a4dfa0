"""A chat endpoint over HTTP that gives each request one answer after a fixed time.

    python -m benchmarks.fixed_endpoint --latency 0.05

It reads no more of a request than where it ends, so that a client is measured and not this server. The first line
that it prints is its address. It ends when its standard input does.
"""

import argparse
import asyncio
import json
import re
import sys

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def answer(text: str) -> bytes:
    """The HTTP response that holds `text` as a chat completion."""
    body = json.dumps(
        {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "model": "fixed",
            "system_fingerprint": "fp_fixed",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop",
                    "logprobs": None,
                }
            ],
            "usage": {"prompt_tokens": 200, "completion_tokens": 4, "total_tokens": 204},
        }
    ).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Connection(asyncio.Protocol):
    """One connection, on which requests follow one another."""

    def __init__(self, latency: float, response: bytes) -> None:
        self._latency, self._response = latency, response
        self._got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._got += data
        end = self._got.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(self._got, 0, end)
        if len(self._got) < end + 4 + (int(length.group(1)) if length else 0):
            return
        self._got = b""
        asyncio.get_running_loop().call_later(self._latency, self._answer)

    def _answer(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(self._response)


async def serve(latency: float, text: str) -> None:
    """Serves until standard input ends."""
    loop = asyncio.get_running_loop()
    response = answer(text)
    server = await loop.create_server(lambda: Connection(latency, response), "127.0.0.1", 0, backlog=4096)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--text", default="Output (a)")
    options = parser.parse_args()
    asyncio.run(serve(options.latency, options.text))


if __name__ == "__main__":
    main()
