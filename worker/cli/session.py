"""What every command that touches the ledger does first: servers, schema, connections."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError

from worker import database, events, schema
from worker.config import Config
from worker.embedded.servers import provided
from worker.errors import Unreachable
from worker.settings import Settings, read_settings
from worker.wiring import Connections, connections

Value = TypeVar("Value")


@contextmanager
def servers() -> Iterator[Settings]:
    """Settings with both URLs, their servers there and the schema current; child processes inherit them.

    Embedded servers are brought up to date; a database of the user's own is only checked. Raises Unreachable.
    """
    given = read_settings()
    with provided(given) as settings:
        assert settings.database_url is not None
        assert settings.redis_url is not None
        os.environ.update(DATABASE_URL=settings.database_url, REDIS_URL=settings.redis_url)
        if given.database_url is None:
            asyncio.run(schema.upgrade(settings.database_url))
        elif lacking := asyncio.run(schema.pending(settings.database_url)):
            raise Unreachable(lacking)
        yield settings


def with_ledger(work: Callable[[Connections], Awaitable[Value]], config: Config | None = None) -> Value:
    """What `work` gives back, called with open connections. Raises Unreachable where Postgres or Redis goes away.

    `config` where the limits of providers are to be known.
    """

    async def connected(settings: Settings) -> Value:
        async with connections(settings, config) as open_:
            return await work(open_)

    with servers() as settings:
        # What goes wrong is said in words by the command itself.
        events.configure(settings.model_copy(update={"log_level": "critical"}))
        try:
            return asyncio.run(connected(settings))
        except DBAPIError as error:
            raise database.unreachable(error) from None
        except RedisError as error:
            raise Unreachable(f"Redis does not answer ({type(error).__name__}): check REDIS_URL, or run `backstop doctor`") from None
