"""`laif label stats|export|import|gc|budget`: what a labelling store holds, and looking after it."""

import argparse
import json
from collections.abc import Callable

Verb = Callable[..., argparse.ArgumentParser]


def open_store(options: argparse.Namespace):
    """The store that `--store` names, beside whoever else uses it.

    Raises:
      StoreError: there is none, and the verb makes none.
    """
    from laif_jax.labeling.database import is_address
    from laif_jax.labeling.errors import StoreError
    from laif_jax.labeling.store import Store

    if not is_address(options.store):
        from pathlib import Path

        if not options.new and not (Path(options.store) / "labels.sqlite").is_file():
            raise StoreError(f"no store at {options.store}: it would be {options.store}/labels.sqlite")
    return Store(options.store, shared=True)


def _transfer(options: argparse.Namespace) -> int:
    """`export` and `import`: the same tables one way or the other."""
    from laif_jax.labeling.open_batches import open_batches
    from laif_jax.labeling.transfer import export_store, import_store

    out = options.verb == "export"
    store = open_store(options)
    try:
        counts = (export_store if out else import_store)(store, options.file)
        with store.engine.connect() as connection:
            batches = open_batches(connection)
    finally:
        store.close()
    width = "" if out else "new "
    print("\n".join(f"{count:>9,} {width}{table}" for table, count in counts.items()))
    if batches and counts.get("batches"):
        rows = sum(batch.rows for batch in batches)
        print(
            f"{len(batches):,} open batches go along, with {rows:,} calls. The store whose jobs ask for them reads "
            "their answers and books what they cost: go on in one store only, or both book it (none is sent twice)"
        )
    return 0


def _stats(options: argparse.Namespace) -> int:
    import dataclasses

    from laif_jax.labeling.open_batches import open_batches

    store = open_store(options)
    try:
        stats, account, jobs = store.stats(), store.account(), store.job_list(10)
        with store.engine.connect() as connection:
            batches = open_batches(connection)
    finally:
        store.close()
    if options.json:
        print(json.dumps({**stats, "batches": [dataclasses.asdict(batch) for batch in batches]}))
    else:
        _show_stats(stats, account, jobs, batches)
    return 0


def _show_stats(stats, account, jobs, batches) -> None:
    from laif_jax.labeling.budget import show_money

    for name in ("requests", "failures", "results", "jobs"):
        counts = ", ".join(f"{count:,} {state}" for state, count in sorted(stats[name].items()))
        print(f"{name:10} {counts or 'none'}")
    print(f"{'tokens':10} {stats['prompt_tokens']:,} prompt, {stats['completion_tokens']:,} completion")
    cap = "no cap" if account.cap is None else f"cap {show_money(account.cap)}"
    print(
        f"{'money':10} {show_money(account.spent)} spent, {show_money(account.presumed)} presumed, "
        f"{show_money(account.reserved)} reserved, {cap}"
    )
    if batches:
        print(f"{'batches':10} {len(batches):,} open, {sum(batch.rows for batch in batches):,} calls wait")
    for batch in batches:
        name = batch.remote_id or "perhaps not sent"
        print(f"batch {batch.tag} ({name}) of {batch.created[:19]}: {batch.rows:,} calls, {batch.endpoint}")
    for job in jobs:
        print(
            f"job {job['id']} {job['state']:13} {job['kind']:8} {job['total']:>7,} items, {job['endpoint']}"
        )


def _gc(options: argparse.Namespace) -> int:
    from laif_jax.labeling.collect import collect
    from laif_jax.labeling.open_batches import open_batches

    store = open_store(options)
    try:
        found = collect(
            store,
            jobs=options.job,
            batches=options.batch,
            answers=options.answers,
            dry_run=not options.yes,
        )
        with store.engine.connect() as connection:
            batches = [batch for batch in open_batches(connection) if batch.tag not in options.batch]
    finally:
        store.close()
    print(
        f"{found.results:,} results that no job lists, {found.failures:,} failed attempts, {found.requests:,} requests "
        f"without an answer, {found.answers:,} paid answers ({found.bytes / 1e6:.1f} MB of text), {found.batches:,} "
        "settled batches"
    )
    if batches:
        rows = sum(batch.rows for batch in batches)
        print(f"kept: {len(batches):,} open batches and the {rows:,} requests that they may still answer")
    print("removed" if options.yes else "nothing was removed; add --yes to remove it")
    return 0


def _budget(options: argparse.Namespace) -> int:
    from laif_jax.labeling.budget import SERVICE, parse_money, show_money

    store = open_store(options)
    try:
        if options.amount is not None:
            cap = None if options.amount == "none" else parse_money(options.amount)
            store.set_cap(cap, options.job or SERVICE)
        account = store.account(options.job or SERVICE)
    finally:
        store.close()
    cap = "none" if account.cap is None else show_money(account.cap)
    print(f"budget {cap}; spent {show_money(account.spent)}, presumed {show_money(account.presumed)}")
    return 0


def add_store_verbs(verb: Verb, to: argparse._SubParsersAction) -> None:
    """Adds the verbs that take a store."""

    def with_store(name: str, call: Callable[[argparse.Namespace], int], text: str, *, new: bool = False):
        added = verb(name, call, text, to)
        added.add_argument(
            "--store", default="labels", help="its folder, or postgresql://user@host:port/database"
        )
        added.set_defaults(new=new)
        return added

    text = "write a store's content to .jsonl, .jsonl.gz or .parquet"
    export = with_store("export", _transfer, text)
    export.set_defaults(verb="export")
    export.add_argument("file")
    text = "add an export's content to a store; what it cost counts against no budget"
    bring = with_store("import", _transfer, text, new=True)
    bring.set_defaults(verb="import")
    bring.add_argument("file")
    with_store("stats", _stats, "counts, tokens and money of a store").add_argument(
        "--json", action="store_true"
    )
    gc = with_store("gc", _gc, "show, and with --yes remove, what no job lists any more")
    gc.add_argument("--job", action="append", default=[], help="give this job up first (may be repeated)")
    gc.add_argument(
        "--batch",
        action="append",
        default=[],
        metavar="TAG",
        help="give this open batch up first: its answers, which are on the bill, will not be read",
    )
    gc.add_argument(
        "--answers", action="store_true", help="paid answers too, from which no kept result was read"
    )
    gc.add_argument("--yes", action="store_true", help="remove it")
    budget = with_store("budget", _budget, "show or set the hard budget of a store, or of one job")
    budget.add_argument("amount", nargs="?", help="for example 25USD; none lifts it")
    budget.add_argument("--job", help="of this job")
