"""Runs the labelling service: in this process, or as a child that ends with its parent."""

import contextlib
import ipaddress
import logging
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from laif_jax.labeling.access import Limits, need_token
from laif_jax.labeling.allowed import Allowed, load_allowed
from laif_jax.labeling.api import create_app
from laif_jax.labeling.budget import parse_money
from laif_jax.labeling.client import LabelClient
from laif_jax.labeling.database import is_address
from laif_jax.labeling.errors import LabelServiceError
from laif_jax.labeling.keys import Key
from laif_jax.labeling.leases import LEASE
from laif_jax.labeling.process import Child
from laif_jax.labeling.store import Store

log = logging.getLogger(__name__)


def serve_labels(
    host: str = "127.0.0.1",
    port: int = 8080,
    store: str | Path = "labels",
    ready_file: str | Path | None = None,
    patience: float = 0.0,
    budget: str | None = None,
    lease: float = LEASE,
    *,
    token: Key | None = None,
    limits: Limits | None = None,
    endpoints: str | Path | None = None,
    any_endpoint: bool = False,
    proxy: str | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT; then stops calling, stores the answers that are under way, and ends.

    Args:
      port: 0 takes a free one.
      ready_file: gets the service's address once it answers.
      store: a folder, or postgresql://user@host:port/database.
      patience: seconds to wait for another service that has the store open.
      budget: what all calls together may cost, "25USD"; None: as it was set before ("none" lifts it).
      lease: seconds that it may be silent before workers on other machines take over its calls.
      token: what requests must carry (`access.read_token`); needed if `host` is not this machine alone.
      limits: of bodies and of requests per second.
      endpoints: with a token: a YAML file with all the endpoints that jobs may ask; None: simulated ones only.
      any_endpoint: with a token: jobs may ask any, with any key and file of this machine.
      proxy: with a token: the address of the proxy in front; limits then count for the addresses that it tells.

    Raises:
      BudgetError: `budget` is no amount. StoreError: the store cannot be opened. LabelServiceError: the port is taken,
        others could reach it and there is no token, or `endpoints` cannot be asked. ConfigError: it cannot be read.
    """
    need_token(host, token)
    allowed = _allowed(token, endpoints, any_endpoint)
    if proxy is not None:
        _check_proxy(token, proxy)
    # httpx logs every address at INFO; a run makes thousands.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    cap = None if budget in (None, "none") else parse_money(budget)
    opened = Store(store, patience=patience, shared=is_address(store), lease=lease)
    if budget is not None:
        opened.set_cap(cap)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        opened.close()
        raise LabelServiceError(
            f"cannot listen on {host}:{port} ({error.strerror}). Choose another port, or 0 for a free one"
        ) from error
    listener.listen(128)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

    def announce() -> None:
        log.info("labelling service at %s, store %s", url, opened.path)
        if ready_file is not None:
            path = Path(ready_file)
            partial = path.with_name(path.name + ".part")
            partial.write_text(url)
            partial.replace(path)  # a reader never sees half an address

    names = frozenset({"127.0.0.1", "localhost", "::1", host.strip("[]")}) if token is None else None
    app = create_app(opened, announce, token=token, limits=limits, host_names=names, allowed=allowed)
    # No log set-up of its own: what it says passes our filter of keys.
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=10,
        server_header=False,
        # From anybody else they would let him choose the address that the limits are counted for.
        proxy_headers=proxy is not None,
        forwarded_allow_ips=proxy or "",
        h11_max_incomplete_event_size=64 * 2**10,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        with _ends_well():
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        opened.close()
        listener.close()


def _allowed(token: Key | None, endpoints: str | Path | None, any_endpoint: bool) -> Allowed | None:
    """What jobs may ask; None: anything, as the user of this machine could by himself."""
    if token is None:
        if endpoints is not None or any_endpoint:
            raise LabelServiceError(
                "--endpoints and --any-endpoint have no effect without a token: then only this machine reaches the "
                "service, and its jobs may ask any endpoint. Give a token (--token-file, --token-env), or leave it out"
            )
        return None
    if any_endpoint:
        log.warning(
            "whoever holds the token can have any key and file of this machine sent anywhere (--any-endpoint)"
        )
        return None
    allowed = load_allowed(endpoints)
    log.info("jobs may ask: %s", allowed.describe())
    return allowed


def _check_proxy(token: Key | None, proxy: str) -> None:
    """Raises `LabelServiceError`."""
    if token is None:
        raise LabelServiceError("--proxy has no effect without a token: nobody but this machine is answered")
    try:
        ipaddress.ip_address(proxy)
    except ValueError as error:
        raise LabelServiceError(
            f"--proxy {proxy!r} is no address such as 127.0.0.1: name the one proxy from which requests come"
        ) from error


@contextlib.contextmanager
def _ends_well() -> Generator[None]:
    """uvicorn raises the signal that stopped it once more when it has ended: a death, to who looks at the code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class LabelService:
    """A running service. `client()` makes a client that notices at once if the service dies."""

    url: str
    store: Path
    process: Child

    @property
    def pid(self) -> int:
        return self.process.pid

    def client(
        self,
        poll: float = 0.2,
        job_budget: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> LabelClient:
        return LabelClient(self.url, poll=poll, death=self.process.death, job_budget=job_budget, sleep=sleep)


@contextlib.contextmanager
def start_service(
    store: str | Path,
    *,
    port: int = 0,
    timeout: float = 60.0,
    patience: float = 30.0,
    budget: str | None = None,
) -> Generator[LabelService]:
    """A service over the folder `store`, as a child process that ends with the block, or with this process.

    Its log is `service.log` in the folder. The service of a run that was killed may still be storing the answers
    that were under way: it is waited for, `patience` seconds at most. `budget`: what all calls may cost, "25USD".

    Raises:
      LabelServiceError: it did not come up; the message holds the end of its log.
    """
    folder = Path(store).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabelServiceError(
            f"store {folder}: {error.strerror}. Choose a folder that can be written"
        ) from error
    with tempfile.TemporaryDirectory(prefix="laif-labels-") as scratch:
        ready = Path(scratch) / "url"
        command = [
            sys.executable,
            "-m",
            "laif_jax.labeling",
            "serve",
            "--store",
            str(folder),
            "--port",
            str(port),
            "--token-env",
            "",  # on this machine alone, and for this process alone
        ]
        if budget is not None:
            command += ["--budget", budget]
        command += ["--ready-file", str(ready), "--end-with-parent", "--patience", str(patience)]
        with Child("labelling service", command, log_file=folder / "service.log") as child:
            child.wait_until(ready.exists, timeout)
            yield LabelService(ready.read_text(), folder, child)
