"""Tables of the store, the same in SQLite and PostgreSQL.

The request, the raw response, what it cost, its failures, and what was read from it are kept apart: a better parser
reads old responses again, and nothing that was paid for is ever written over by something that was only derived.
Columns that change with every call (`requests`) are narrow; long texts stand in tables that are only appended to, so
that a store of a million rows is written as fast as an empty one.
"""

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    text,
)

SCHEMA_VERSION = 2

metadata = MetaData()


def _row_id() -> Column[int]:
    """A running number: rows are appended in SQLite, whatever their key is."""
    return Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True)


meta = Table(
    "meta", metadata, Column("name", String, primary_key=True), Column("value", String, nullable=False)
)

requests = Table(
    "requests",
    metadata,
    _row_id(),
    Column("key", String(64), nullable=False, unique=True),  # SHA-256 of the canonical request
    Column("endpoint_key", String(16), nullable=False),
    Column("model", String, nullable=False),
    Column("state", String(16), nullable=False),  # pending / in_flight / ok / failed
    Column("attempts", Integer, nullable=False),  # over all jobs
    Column("reason", Text, nullable=False),
    Column("owner", String(32), nullable=False, server_default=""),  # the worker that has it in flight
    Column("job", String(16), nullable=False, server_default=""),  # for which it is in flight
    # Nano-dollars put aside for the call under way.
    Column("reserved", BigInteger, nullable=False, server_default="0"),
    Column("created", String, nullable=False),
    Column("updated", String, nullable=False),
)
# Only what is not answered: finding what is left to do never looks at the rest.
Index(
    "requests_open",
    requests.c.state,
    requests.c.owner,
    sqlite_where=text("state <> 'ok'"),
    postgresql_where=text("state <> 'ok'"),
)

request_texts = Table(
    "request_texts",
    metadata,
    _row_id(),
    Column("key", String(64), nullable=False, unique=True),
    Column("request", Text, nullable=False),  # canonical JSON; holds no secret
)

responses = Table(
    "responses",
    metadata,
    _row_id(),
    Column("key", String(64), nullable=False, unique=True),  # of the request
    Column("body", Text, nullable=False),  # the endpoint's JSON, as it came
    Column("model", String, nullable=False),  # as the endpoint echoed it
    Column("system_fingerprint", String, nullable=False),
    Column("latency", Float, nullable=False),  # seconds
    Column("attempt", Integer, nullable=False),
    Column("date", String, nullable=False),
)

usage = Table(  # one row per call that was, or may have been, paid for
    "usage",
    metadata,
    _row_id(),
    Column("key", String(64), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("job", String(16), nullable=False),
    # answered; presumed: no usable answer came, but the provider may charge for it; imported: paid by another store
    Column("kind", String(16), nullable=False),
    Column("prompt_tokens", Integer),
    Column("cached_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("nanos", BigInteger),  # nano-dollars; NULL where the price is not known
    Column("date", String, nullable=False),
)

failures = Table(  # one row per attempt that gave no usable answer
    "failures",
    metadata,
    _row_id(),
    Column("key", String(64), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("reason", Text, nullable=False),
    Column("body", Text, nullable=False),  # the start of what came instead of an answer
    Column("latency", Float, nullable=False),
    Column("date", String, nullable=False),
    Index("failures_attempt", "key", "attempt", unique=True),
)

results = Table(  # judgements and completions: what was read from the responses
    "results",
    metadata,
    _row_id(),
    Column("key", String(16), nullable=False, unique=True),
    Column("kind", String(16), nullable=False),  # judgement / completion / rating
    Column("item", String, nullable=False),  # id of the comparison or prompt
    Column("status", String(16), nullable=False),
    Column("endpoint_key", String(16), nullable=False),
    Column("critic_hash", String(64), nullable=False),
    Column("record", Text, nullable=False),  # JSON
    Column("updated", String, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("kind", String(16), nullable=False),  # complete / judge / rate
    Column("endpoint", Text, nullable=False),  # name, for people
    Column("endpoint_key", String(16), nullable=False),
    Column("critic", String, nullable=False),
    Column("state", String(16), nullable=False),  # running / out_of_budget / done / failed / interrupted
    Column("reason", Text, nullable=False),
    Column("total", Integer, nullable=False),
    Column("counts", Text, nullable=False),  # JSON
    Column("created", String, nullable=False),
    Column("updated", String, nullable=False),
    Column("run", Integer, nullable=False, server_default="0"),  # raised each time the job is run again
)

job_bodies = Table(  # what a running job was asked for, so that other workers can take part in it
    "job_bodies",
    metadata,
    Column("job", String(16), primary_key=True),
    Column("body", LargeBinary, nullable=False),  # zlib of the JSON
)

job_items = Table(
    "job_items",
    metadata,
    Column("job", String(16), nullable=False),
    Column("position", Integer, nullable=False),
    Column("part", Integer, nullable=False),  # 0: the final result; 1, 2: the single orders behind it
    Column("result", String(16), nullable=False),
    Column("status", String(16), nullable=False, server_default=""),
    Column("run", Integer, nullable=False, server_default="0"),
    PrimaryKeyConstraint("job", "position", "part"),
    sqlite_with_rowid=False,
)

budgets = Table(
    "budgets",
    metadata,
    Column("scope", String(32), primary_key=True),  # "service", or the id of a job
    Column("cap", BigInteger),  # nano-dollars; NULL: no cap
    Column("spent", BigInteger, nullable=False, server_default="0"),  # answered calls
    # Calls that gave no answer we have, but that the provider may charge for: they count against the cap.
    Column("presumed", BigInteger, nullable=False, server_default="0"),
    Column("reserved", BigInteger, nullable=False, server_default="0"),  # put aside for calls under way
)

workers = Table(  # processes that have calls in flight; a lease is good until `expires`
    "workers",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("host", String, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started", String, nullable=False),
    Column("expires", Float, nullable=False),  # seconds since 1970, by the store's clock
)
