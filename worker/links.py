"""The connections of a producer: which servers, for whom, and that one event loop of one process owns them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypedDict, Unpack

from redis.asyncio import Redis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.database import engine, unreachable
from worker.dispatch import Publish
from worker.embedded.attach import attached
from worker.errors import UsageError
from worker.keys import check_name
from worker.settings import Settings, read_settings
from worker.transport import Bell
from worker.waiting import Endings

if TYPE_CHECKING:
    from worker.wiring import WorkerProcess


@dataclass(frozen=True, slots=True)
class Links:
    """What one event loop of one process has open."""

    pid: int
    loop: asyncio.AbstractEventLoop
    open: AsyncExitStack
    db: AsyncEngine
    publish: Publish
    endings: Endings


class Where(TypedDict, total=False):
    """What is left out, or None, is as the environment says; without URLs there, the embedded servers that run under `data`."""

    database_url: str | None
    redis_url: str | None
    config: str | Path | None
    data: str | Path | None
    tenant: str | None  # `default` unless given


class Linked:
    """Connects when first used; `async with` closes it, and what is used after that connects again.

    After a fork the child connects anew. Raises UsageError for a setting that is none.
    """

    def __init__(self, **where: Unpack[Where]) -> None:
        if unknown := where.keys() - Where.__annotations__.keys():
            raise UsageError(f"{min(unknown)}: no such setting, there are {', '.join(Where.__annotations__)}")
        self._given = {name: value for name, value in where.items() if name != "tenant" and value is not None}
        tenant = where.get("tenant")
        self._tenant = "default" if tenant is None else check_name("tenant", tenant)
        self._settings: Settings | None = None
        self._links: Links | None = None
        self._opening = asyncio.Lock()
        self._process: tuple[Links, WorkerProcess] | None = None  # which ends with its links
        self._inherited: list[Links] = []  # another process's: closing them would end its connections

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Nothing is open. Closing once more does nothing."""
        links, self._links = self._links, None
        if links is not None and links.pid == os.getpid():
            await links.open.aclose()

    async def _opened(self) -> Links:
        loop = asyncio.get_running_loop()
        if self._links is not None and self._links.pid != os.getpid():
            self._inherited.append(self._links)
            self._links, self._opening = None, asyncio.Lock()
        async with self._opening:
            if self._links is None:
                self._links = await _connect(attached(self._settings_now()), loop)
        if self._links.loop is not loop:
            raise UsageError("this AsyncBackstop belongs to another event loop: make one for each, or close it there first")
        return self._links

    async def _at_work(self, links: Links) -> WorkerProcess:
        """What a worker is made of, without lanes and never the leader."""
        from worker.wiring import WorkerProcess  # half of Celery comes with it

        async with self._opening:
            if self._process is None or self._process[0] is not links:
                made = await WorkerProcess.open(attached(self._settings_now()), (), leads=False)
                links.open.push_async_callback(made.drain)
                self._process = links, made
            return self._process[1]

    def _settings_now(self) -> Settings:
        if self._settings is None:
            given = {name: Path(str(value)) if name in ("config", "data") else value for name, value in self._given.items()}
            self._settings = read_settings().model_copy(update=given)
        return self._settings


async def _connect(settings: Settings, loop: asyncio.AbstractEventLoop) -> Links:
    async with AsyncExitStack() as stack:
        db = engine(str(settings.database_url))
        stack.push_async_callback(db.dispose)
        try:
            bell = Bell(str(settings.redis_url))
            ears = Redis.from_url(str(settings.redis_url), socket_timeout=2, socket_connect_timeout=1, retry=AsyncRetry(NoBackoff(), 0))
        except ValueError:
            raise UsageError("redis_url (or REDIS_URL): no URL of a Redis: expected redis://:password@host:6379/0") from None
        stack.callback(bell.close)
        stack.push_async_callback(ears.aclose)
        endings = await stack.enter_async_context(Endings(db, ears))
        return Links(os.getpid(), loop, stack.pop_all(), db, bell.publish, endings)


@contextmanager
def as_unreachable() -> Iterator[None]:
    """What SQLAlchemy raises in it is raised as Unreachable, in one line."""
    try:
        yield
    except DBAPIError as error:
        raise unreachable(error) from None
