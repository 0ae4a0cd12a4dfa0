"""What is read from a store."""

import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from laif_jax.labeling import budget, schema
from laif_jax.labeling.statements import Row, having


class StoreReader:
    """The reading half of `Store`."""

    engine: Engine

    def answered(self, keys: Sequence[str]) -> dict[str, Row]:
        """Stored responses (columns of `responses`) of those keys that have one."""
        return self._by_key(schema.responses, keys)

    def attempts(self, keys: Sequence[str]) -> dict[str, int]:
        """Attempts made so far for the keys that are known."""
        return {key: row["attempts"] for key, row in self._by_key(schema.requests, keys).items()}

    def _by_key(self, table: sa.Table, keys: Sequence[str]) -> dict[str, Row]:
        found: dict[str, Row] = {}
        with self.engine.connect() as connection:
            for condition in having(connection, table.c.key, keys):
                rows = connection.execute(sa.select(table).where(condition)).mappings()
                found |= {row["key"]: dict(row) for row in rows}
        return found

    def left(self) -> dict[str, int]:
        """How many requests are not answered, by state. Reads an index of those alone."""
        c = schema.requests.c
        query = sa.select(c.state, sa.func.count()).where(c.state != "ok").group_by(c.state)
        if self.engine.dialect.name == "sqlite":  # the index's own condition, word for word
            query = sa.select(c.state, sa.func.count()).where(sa.text("state <> 'ok'")).group_by(c.state)
        with self.engine.connect() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    # ---- jobs --------------------------------------------------------------------------------------------------

    def job(self, job_id: str) -> Row | None:
        """A job's row, its counts decoded."""
        query = sa.select(schema.jobs).where(schema.jobs.c.id == job_id)
        with self.engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else {**row, "counts": json.loads(row["counts"])}

    def job_list(self, limit: int = 100) -> list[Row]:
        """The newest jobs."""
        query = sa.select(schema.jobs).order_by(schema.jobs.c.created.desc()).limit(limit)
        with self.engine.connect() as connection:
            return [{**r, "counts": json.loads(r["counts"])} for r in connection.execute(query).mappings()]

    def open_jobs(self) -> list[Row]:
        """Jobs under way that any worker can take part in: rows of `jobs`."""
        query = (
            sa.select(schema.jobs)
            .join(schema.job_bodies, schema.job_bodies.c.job == schema.jobs.c.id)
            .where(schema.jobs.c.state.in_(("running", "out_of_budget")))
            .order_by(schema.jobs.c.created)
        )
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def job_body(self, job_id: str) -> bytes | None:
        """What a running job was asked for; None once it has ended."""
        query = sa.select(schema.job_bodies.c.body).where(schema.job_bodies.c.job == job_id)
        with self.engine.connect() as connection:
            packed = connection.execute(query).scalar()
        return None if packed is None else zlib.decompress(packed)

    def finished(self, job_id: str, run: int, positions: range) -> set[int]:
        """Which of these positions have their result in this run."""
        items = schema.job_items.c
        query = sa.select(items.position).where(
            items.job == job_id,
            items.run == run,
            items.part == 0,
            items.position >= positions.start,
            items.position < positions.stop,
        )
        with self.engine.connect() as connection:
            return set(connection.execute(query).scalars())

    def job_counts(self, job_id: str, run: int) -> dict[str, int]:
        """Final results of a run by status."""
        items = schema.job_items.c
        query = (
            sa.select(items.status, sa.func.count())
            .where(items.job == job_id, items.run == run, items.part == 0)
            .group_by(items.status)
        )
        with self.engine.connect() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def job_results(
        self, job_id: str, *, parts: bool = False, offset: int = 0, limit: int | None = None
    ) -> Iterator[str]:
        """JSON records of a job in the order of its items: the final results, or the single orders behind them."""
        items, results = schema.job_items.c, schema.results.c
        query = (
            sa.select(results.record)
            .join_from(schema.job_items, schema.results, items.result == results.key)
            .where(items.job == job_id, items.part > 0 if parts else items.part == 0)
            .order_by(items.position, items.part)
            .offset(offset)
        )
        if limit is not None:
            query = query.limit(limit)
        with self.engine.connect() as connection:
            yield from connection.execution_options(yield_per=1000).execute(query).scalars()

    # ---- money and counts --------------------------------------------------------------------------------------

    def account(self, scope: str = budget.SERVICE) -> budget.Account:
        """A scope's money."""
        with self.engine.connect() as connection:
            found = budget.accounts(connection, [scope])
        return found.get(scope, budget.Account(scope, None, 0, 0, 0))

    def room(self, job: str) -> int | None:
        """Nano-dollars that can be reserved for a job; None: without limit."""
        with self.engine.connect() as connection:
            rooms = [a.room for a in budget.accounts(connection, [budget.SERVICE, job]).values()]
        limits = [room for room in rooms if room is not None]
        return min(limits) if limits else None

    def stats(self) -> Row:
        """Counts by state, and the usage of all calls; `cost` in US dollars."""
        c, usage = sa.func.count, schema.usage.c
        with self.engine.connect() as connection:

            def by(table: sa.Table, column: Any) -> dict[str, int]:
                query = sa.select(column, c()).select_from(table).group_by(column)
                return {row[0]: row[1] for row in connection.execute(query)}

            used = connection.execute(
                sa.select(
                    sa.func.coalesce(sa.func.sum(usage.prompt_tokens), 0),
                    sa.func.coalesce(sa.func.sum(usage.completion_tokens), 0),
                    sa.func.coalesce(sa.func.sum(usage.nanos), 0),
                ).where(usage.kind == "answered")
            ).one()
            answers = connection.execute(sa.select(c()).select_from(schema.responses)).scalar_one()
            accounts = budget.accounts(connection, [budget.SERVICE])
            return {
                "requests": by(schema.requests, schema.requests.c.state),
                "failures": by(schema.failures, schema.failures.c.kind),
                "results": by(schema.results, schema.results.c.status),
                "jobs": by(schema.jobs, schema.jobs.c.state),
                "answers": answers,
                "prompt_tokens": int(used[0]),
                "completion_tokens": int(used[1]),
                "cost": int(used[2]) / budget.NANOS,
                "budget": _shown(accounts.get(budget.SERVICE)),
            }


def _shown(account: budget.Account | None) -> dict[str, int | None] | None:
    if account is None:
        return None
    return {
        "cap_nanos": account.cap,
        "spent_nanos": account.spent,
        "presumed_nanos": account.presumed,
        "reserved_nanos": account.reserved,
    }
