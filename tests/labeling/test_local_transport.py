"""The small HTTP client for servers on this machine: every way in which an answer may come, and may not."""

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.errors import CallError, Unreachable
from laif_jax.labeling.providers import make_transport
from laif_jax.labeling.providers.local import BadAnswer, LocalTransport, _Connection, is_local
from laif_jax.labeling.providers.remote import Exchange

BODY = b'{"choices": []}'
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n" + BODY
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'5;name=x\r\n{"cho\r\n00A\r\nices": []}\r\n0\r\nTrailer: y\r\n\r\n'
)
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\n\r\n" + BODY
OLD = b"HTTP/1.0 200 OK\r\nContent-Length: 15\r\n\r\n" + BODY
NOTHING = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\nContent-Length: 0\r\n\r\n"


class Wire(asyncio.Transport):
    """A connection's other end that only listens."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.closed = b"", False

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def close(self) -> None:
        self.closed = True


def exchange(parts: list[bytes], *, ends: bool = False) -> tuple[Exchange | BaseException, _Connection, Wire]:
    """What comes of an exchange whose answer arrives in these parts."""

    async def run() -> tuple[Exchange | BaseException, _Connection, Wire]:
        connection, wire = _Connection(set()), Wire()
        connection.connection_made(wire)
        task = asyncio.create_task(connection.exchange(b"hello"))
        await asyncio.sleep(0)
        for part in parts:
            connection.data_received(part)
        if ends:
            connection.connection_lost(None)
        done, _ = await asyncio.wait([task], timeout=0)
        if not done:
            task.cancel()
            return BadAnswer("still waiting"), connection, wire
        return task.exception() or task.result(), connection, wire

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("sent", "status", "body", "reusable"),
    [
        (PLAIN, 200, BODY, True),
        (CHUNKED, 200, BODY, True),
        (CONTINUED, 200, BODY, True),
        (UNTIL_CLOSED, 200, BODY, False),
        (OLD, 200, BODY, False),
        (NOTHING, 429, b"", True),
        (PLAIN.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"), 200, BODY, False),
        (OLD.replace(b"OK\r\n", b"OK\r\nConnection: keep-alive\r\n"), 200, BODY, True),
    ],
)
@given(cuts=st.lists(st.integers(0, 200), max_size=8))
def test_an_answer_is_the_same_however_it_is_cut(
    sent: bytes, status: int, body: bytes, reusable: bool, cuts: list[int]
) -> None:
    places = [0, *sorted(min(cut, len(sent)) for cut in cuts), len(sent)]
    parts = [sent[a:b] for a, b in pairwise(places) if a < b]
    found, connection, wire = exchange(parts, ends=sent == UNTIL_CLOSED)
    assert isinstance(found, Exchange)
    assert (found.status, found.content, connection.reusable) == (status, body, reusable)
    assert wire.sent == b"hello"
    if sent == NOTHING:
        assert found.headers["retry-after"] == "3"


@given(st.binary(max_size=300), st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", CHUNKED[:60], PLAIN[:70]]))
def test_noise_is_an_error_or_an_answer_and_never_a_crash(noise: bytes, start: bytes) -> None:
    found, _, _ = exchange([part for part in (start, noise) if part], ends=True)
    assert isinstance(found, Exchange | BadAnswer)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"HTTP/1.1 200",
        PLAIN[:-1],
        CHUNKED[:-3],
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\nab\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 17),
    ],
)
def test_a_part_of_an_answer_is_none(sent: bytes) -> None:
    found, connection, _ = exchange([sent] if sent else [], ends=True)
    assert isinstance(found, BadAnswer)
    assert not connection.reusable


def test_what_nobody_asked_for_closes_the_connection() -> None:
    found, connection, wire = exchange([PLAIN])
    assert isinstance(found, Exchange)
    assert connection.reusable
    connection.data_received(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    assert wire.closed
    assert not connection.reusable
    _, surplus, _ = exchange([PLAIN + b"more"])
    assert not surplus.reusable


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


def against(handler: Handler, ask: Callable[[LocalTransport], Any]) -> Any:
    """What `ask` gives against a real server on a port of its own."""

    async def run() -> Any:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        transport = make_transport(Endpoint(provider="openai", base_url=url, client="plain"))
        assert isinstance(transport, LocalTransport)
        try:
            return await asyncio.wait_for(ask(transport), 20)
        finally:
            await transport.close()
            server.close()

    return asyncio.run(run())


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    return head + await reader.readexactly(length)


def test_connections_are_kept_and_as_many_as_calls_in_flight() -> None:
    requests: list[list[bytes]] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine: list[bytes] = []
        requests.append(mine)
        try:
            while True:
                mine.append(await read_request(reader))
                await asyncio.sleep(0.01)
                writer.write(PLAIN)
        except asyncio.IncompleteReadError:
            writer.close()

    async def ask(transport: LocalTransport) -> list[Exchange]:
        found = []
        for _ in range(4):
            found += await asyncio.gather(*(transport.send({"text": f"é {n}"}) for n in range(3)))
        return found

    found = against(handler, ask)
    assert {(one.status, one.content) for one in found} == {(200, BODY)}
    assert [len(mine) for mine in requests] == [4, 4, 4]
    head, _, body = requests[0][0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:")
    assert body.decode() in {f'{{"text": "é {n}"}}' for n in range(3)}


def test_a_call_that_is_given_up_takes_its_connection_with_it() -> None:
    """The late answer must never be read as that of the next call."""
    served = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        served += 1
        late = served == 1
        await read_request(reader)
        await asyncio.sleep(0.2 if late else 0)
        writer.write(PLAIN.replace(BODY, b'{"late": true }') if late else PLAIN)
        await writer.drain()

    async def ask(transport: LocalTransport) -> Exchange:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(transport.send({}), 0.05)
        await asyncio.sleep(0.3)
        return await transport.send({})

    assert against(handler, ask).content == BODY
    assert served == 2


def test_whether_a_request_can_have_gone_out_is_told() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.close()

    async def ask(transport: LocalTransport) -> CallError:
        with pytest.raises(CallError) as caught:
            await transport.send({})
        return caught.value

    broken = against(handler, ask)
    assert isinstance(broken, Unreachable)
    assert broken.billed == "unknown"

    async def refused() -> CallError:
        return await ask(LocalTransport(Endpoint(provider="openai", base_url="http://127.0.0.1:1/v1"), None))

    nobody = asyncio.run(refused())
    assert isinstance(nobody, Unreachable)
    assert nobody.billed == "no"


def test_it_only_goes_to_this_machine() -> None:
    assert is_local("http://127.0.0.1:8080/v1")
    assert is_local("http://localhost/v1")
    assert is_local("http://[::1]:8080/v1")
    for url in ("https://127.0.0.1/v1", "http://10.0.0.7:8080/v1", "http://example.org/v1"):
        assert not is_local(url)
