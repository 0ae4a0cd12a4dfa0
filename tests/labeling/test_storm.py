"""SIGKILL again and again: nothing is lost, nothing is billed twice unseen, and the budget holds."""

import contextlib
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa

from laif_jax.labeling import LabelClient, LabelServiceError, schema
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.store import Store
from tests.labeling.conftest import new_database
from tests.labeling.helpers import Reply, at, chat, fake_endpoint, planted

NANOS_PER_CALL = (11 + 2) * 1_000_000  # at 1,000 dollars per million tokens
PRICES = {"prompt_price": 1000.0, "completion_price": 1000.0}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Fleet:
    """A server and its workers, any of which can be killed; a killed one is started again."""

    def __init__(self, place: str, port: int, workers: int, folder: Path) -> None:
        self.folder, self.started = folder, 0
        run = [sys.executable, "-m", "laif_jax.labeling"]
        serve = [*run, "serve", "--store", place, "--port", str(port), "--patience", "30"]
        work = [*run, "work", "--store", place]
        self.commands = [[*command, "--lease", "5"] for command in [serve] + [work] * workers]
        self.processes = [self._start(command) for command in self.commands]

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        self.started += 1
        with (self.folder / f"process-{self.started}.log").open("wb") as log:
            return subprocess.Popen(
                [*command, "--end-with-parent"], stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )

    def kill(self, number: int) -> None:
        process = self.processes[number]
        process.kill()
        process.wait()
        self.processes[number] = self._start(self.commands[number])

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def storm(place: str, folder: Path, *, judgements: int, kills: int, workers: int, latency: float) -> None:
    rng, items = random.Random(7), planted(judgements)
    port, url_thread_errors = free_port(), []
    enough = judgements * NANOS_PER_CALL * 100
    # Half of what the calls cost: the job must run out of it once, and go on when it is raised.
    first_cap = judgements * NANOS_PER_CALL // 2
    with fake_endpoint(lambda number, request: Reply(body=chat("Output (b)"), hang=latency)) as server:
        endpoint: Endpoint = at(server, client="plain", concurrency=8, timeout=30.0, **PRICES)
        books = Store(place, shared=True)
        books.set_cap(first_cap)
        fleet = Fleet(place, port, workers, folder)
        found: list = []

        def ask() -> None:
            client = LabelClient(f"http://127.0.0.1:{port}", poll=0.1, patience=120.0)
            while not found:
                try:
                    found.extend(client.judge(endpoint, "laif_basic", items, order="seeded"))
                except LabelServiceError as error:
                    if "out of budget" not in str(error):
                        url_thread_errors.append(error)
                        return
                    if books.account().cap == first_cap:
                        assert sum(server.answered.values()) * NANOS_PER_CALL <= first_cap
                        books.set_cap(enough)
                    time.sleep(0.2)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            for number in range(1, kills + 1):
                target = judgements * (number - rng.random() / 2) / (kills + 1)
                while sum(server.answered.values()) < target and thread.is_alive():
                    time.sleep(0.005)
                fleet.kill(rng.randrange(workers + 1))
            thread.join(600)
            assert not thread.is_alive()
        finally:
            fleet.close()
            server.release.set()
            thread.join(5)
            books.beat().result(60)
        assert not url_thread_errors
        assert books.account().cap == enough  # it was out of budget, and went on
        check(books, server.calls, items, [judgement.comparison_id for judgement in found], enough)
        books.close()


def check(books: Store, calls: Counter, items: list, found: list[str], cap: int) -> None:
    """`calls`: how often each request reached the endpoint, which may bill it from then on."""
    assert found == [item.id for item in items]
    stats = books.stats()
    assert stats["requests"] == {"ok": len(items)}  # nothing pending, nothing in flight for ever
    assert stats["answers"] == len(items) == len(calls)
    assert stats["results"] == {"ok": len(items)}
    items_table, usage = schema.job_items.c, schema.usage.c
    with books.engine.connect() as connection:
        places = sa.select(items_table.position, sa.func.count()).where(items_table.part == 0)
        states = dict(connection.execute(places.group_by(items_table.position)).all())
        booked = connection.execute(
            sa.select(usage.kind, sa.func.count(), sa.func.sum(usage.nanos)).group_by(usage.kind)
        ).all()
        twice = sa.select(usage.key).group_by(usage.key).having(sa.func.count() > 1)
        seen = len(connection.execute(twice).all())
    assert states == dict.fromkeys(range(len(items)), 1)  # one final state each
    counts = {kind: (count, int(nanos)) for kind, count, nanos in booked}
    # What was in flight at a kill is booked as presumably paid. Nothing else was called a second time.
    presumed = counts.get("presumed", (0, 0))
    extra = sum(number - 1 for number in calls.values())
    assert extra <= presumed[0]
    assert sum(number > 1 for number in calls.values()) <= seen
    account = books.account()
    assert account.reserved == 0
    assert (account.spent, account.presumed) == (counts["answered"][1], presumed[1])
    bill = sum(calls.values()) * NANOS_PER_CALL
    assert bill <= account.spent + account.presumed <= cap


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_small_storm(kind: str, tmp_path, request) -> None:
    place = str(tmp_path / "store") if kind == "sqlite" else new_database(request.getfixturevalue("postgres"))
    with contextlib.chdir(Path(__file__).parents[2]):
        storm(place, tmp_path, judgements=300, kills=3, workers=1, latency=0.02)


def test_twenty_kills_in_twenty_thousand_judgements(tmp_path) -> None:
    with contextlib.chdir(Path(__file__).parents[2]):
        storm(str(tmp_path / "store"), tmp_path, judgements=20_000, kills=20, workers=2, latency=0.01)
