"""Tables of the store. The request, the raw response, its failures, and what was read from it are kept apart."""

from sqlalchemy import (
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
)

SCHEMA_VERSION = 1

metadata = MetaData()

meta = Table(
    "meta", metadata, Column("name", String, primary_key=True), Column("value", String, nullable=False)
)

requests = Table(
    "requests",
    metadata,
    Column("key", String(64), primary_key=True),  # SHA-256 of `request`
    Column("endpoint_key", String(16), nullable=False),
    Column("model", String, nullable=False),
    Column("request", Text, nullable=False),  # canonical JSON; holds no secret
    Column("state", String(16), nullable=False),  # pending / in_flight / ok / failed
    Column("attempts", Integer, nullable=False),  # over all jobs
    Column("reason", Text, nullable=False),
    Column("created", String, nullable=False),
    Column("updated", String, nullable=False),
    Index("requests_state", "state"),
    sqlite_with_rowid=False,
)

responses = Table(
    "responses",
    metadata,
    Column("key", String(64), primary_key=True),  # of the request
    Column("body", Text, nullable=False),  # the endpoint's JSON, as it came
    Column("model", String, nullable=False),  # as the endpoint echoed it
    Column("system_fingerprint", String, nullable=False),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("cost", Float),  # US dollars, where known
    Column("latency", Float, nullable=False),  # seconds
    Column("attempt", Integer, nullable=False),
    Column("date", String, nullable=False),
    sqlite_with_rowid=False,
)

failures = Table(  # one row per attempt that gave no usable answer
    "failures",
    metadata,
    Column("key", String(64), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("reason", Text, nullable=False),
    Column("body", Text, nullable=False),  # the start of what came instead of an answer
    Column("latency", Float, nullable=False),
    Column("date", String, nullable=False),
    PrimaryKeyConstraint("key", "attempt"),
    sqlite_with_rowid=False,
)

results = Table(  # judgements, ratings and completions: what was read from the responses
    "results",
    metadata,
    Column("key", String(16), primary_key=True),
    Column("kind", String(16), nullable=False),  # judgement / rating / completion
    Column("item", String, nullable=False),  # id of the comparison, completion or prompt
    Column("status", String(16), nullable=False),
    Column("endpoint_key", String(16), nullable=False),
    Column("critic_hash", String(64), nullable=False),
    Column("record", Text, nullable=False),  # JSON
    Column("updated", String, nullable=False),
    Index("results_item", "item"),
    sqlite_with_rowid=False,
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("kind", String(16), nullable=False),  # complete / judge / rate
    Column("endpoint", Text, nullable=False),  # name, for people
    Column("endpoint_key", String(16), nullable=False),
    Column("critic", String, nullable=False),
    Column("state", String(16), nullable=False),  # running / done / failed / interrupted
    Column("reason", Text, nullable=False),
    Column("total", Integer, nullable=False),
    Column("counts", Text, nullable=False),  # JSON
    Column("created", String, nullable=False),
    Column("updated", String, nullable=False),
)

job_items = Table(
    "job_items",
    metadata,
    Column("job", String(16), nullable=False),
    Column("position", Integer, nullable=False),
    Column("part", Integer, nullable=False),  # 0: the final result; 1, 2: the single orders behind it
    Column("result", String(16), nullable=False),
    PrimaryKeyConstraint("job", "position", "part"),
    sqlite_with_rowid=False,
)
