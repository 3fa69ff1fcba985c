"""A worker for commands that wait: theirs alone, when nobody else runs one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta

from worker import reads
from worker.cli.children import Children
from worker.cli.screen import say
from worker.config import load
from worker.settings import Settings
from worker.wiring import Connections


@asynccontextmanager
async def somebody_works(open_: Connections, settings: Settings) -> AsyncIterator[Children]:
    """A live worker is there while the context lasts: one that runs already, or one started for it.

    Raises UsageError for a configuration that a worker could not start with.
    """
    with ExitStack() as stack:
        children = Children(settings.data.absolute() / "logs")
        stack.enter_context(children)
        if not await _somebody_lives(open_, settings):
            for provider in load(settings.config).providers.values():
                provider.key()
            say("no worker is running: starting one for this command")
            children.start("worker", ["worker"])
        try:
            yield children
        finally:
            await asyncio.to_thread(stack.close)


async def _somebody_lives(open_: Connections, settings: Settings) -> bool:
    """A killed worker stands as live until another one buries it: only its heartbeat tells."""
    since = datetime.now(UTC) - timedelta(seconds=settings.heartbeat_ttl_s)
    return any(worker.state == "live" and worker.seen_at > since for worker in await reads.workers(open_.db))
