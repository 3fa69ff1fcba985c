"""The schema in Postgres, at the version this code needs."""

from __future__ import annotations

import asyncio
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine
from sqlalchemy.exc import DBAPIError

from worker.database import driver_url, unreachable

MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"


async def upgrade(url: str) -> None:
    """The schema is at the newest version; safe to run from many processes at once. Raises Unreachable."""
    await asyncio.to_thread(_upgrade, url)


def _upgrade(url: str) -> None:
    try:
        command.upgrade(_alembic(url), "head")
    except DBAPIError as error:
        raise unreachable(error) from None


async def pending(url: str) -> str | None:
    """What keeps the schema from being the one this code needs, as a sentence, or None. Raises Unreachable."""
    return await asyncio.to_thread(_pending, url)


def _pending(url: str) -> str | None:
    head = ScriptDirectory.from_config(_alembic(url)).get_current_head()
    sync = create_engine(driver_url(url), connect_args={"connect_timeout": 5})
    try:
        with sync.connect() as connection:
            current = _current(connection)
    except DBAPIError as error:
        raise unreachable(error) from None
    finally:
        sync.dispose()
    if current == head:
        return None
    return f"the database is at version {current or 'none'}, this code needs {head}: run `backstop db upgrade`"


def _current(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _alembic(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = driver_url(url)
    return config
