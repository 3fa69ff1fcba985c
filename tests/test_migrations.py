"""The migrations make exactly the tables the code works with, once, however many start at once."""

import asyncio
import subprocess
import sys

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from worker import database, schema
from worker.tables import metadata


def _compared(url):
    engine = create_engine(database.driver_url(url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": False})
        differences = compare_metadata(context, metadata)
        lanes = sorted(connection.execute(text("SELECT name FROM lanes")).scalars())
    engine.dispose()
    return differences, lanes


def _emptied(url):
    engine = create_engine(database.driver_url(url))
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()


def test_upgrades_from_nothing_at_once_and_again_make_exactly_the_tables_of_the_code(database_url):
    upgrade = f"import asyncio; from worker import schema; asyncio.run(schema.upgrade({database_url!r}))"
    _emptied(database_url)
    assert asyncio.run(schema.pending(database_url)) is not None
    processes = [subprocess.Popen([sys.executable, "-c", upgrade]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    asyncio.run(schema.upgrade(database_url))
    assert asyncio.run(schema.pending(database_url)) is None
    assert _compared(database_url) == ([], ["bulk", "interactive"])
