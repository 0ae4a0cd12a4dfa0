"""A worker without an HTTP face: takes part in the jobs of a service on the same store."""

import asyncio
import logging
import signal
from pathlib import Path

from laif_jax.labeling.leases import LEASE
from laif_jax.labeling.runner import Runner
from laif_jax.labeling.store import Store

log = logging.getLogger(__name__)


def work_off(store: str | Path, lease: float = LEASE) -> None:
    """Works until SIGTERM or SIGINT; then stops calling, stores the answers that are under way, and ends.

    It reads keys from its own environment; a job whose endpoint cannot be used here is left to the others.

    Args:
      lease: seconds that it may be silent before others take over its calls.

    Raises:
      StoreError: the store cannot be opened.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)
    opened = Store(store, shared=True, lease=lease)
    try:
        asyncio.run(_work(opened))
    finally:
        opened.close()


async def _work(store: Store) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = Runner(store, join=True)
    log.info("worker %s takes part in the jobs of %s", store.worker, store.where)
    await stop.wait()
    await runner.close()
