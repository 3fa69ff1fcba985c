"""Jobs and batches followed from outside a worker, on connections that one event loop of one process owns."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack
from uuid import UUID

from redis.asyncio import Redis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import intervene, reads
from worker.database import engine, unreachable
from worker.dispatch import Publish
from worker.embedded.attach import attached
from worker.errors import NotFound, UsageError, WaitTimedOut
from worker.export import ExportRow
from worker.intervene import Cancelled
from worker.job import TERMINAL, Lane
from worker.settings import Settings, read_settings
from worker.submit import BULK_DEADLINE_S, Batch, Parameters, Submitted
from worker.transport import bell_of, publish
from worker.views import BatchView, JobView
from worker.waiting import Endings

if TYPE_CHECKING:
    from worker.wiring import WorkerProcess

PAGE = 1_000  # rows of a batch in memory at once
LOOK_S = 0.5  # between looks at a batch that is still being submitted

Job = Submitted | UUID | str


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
    tenant: str  # `default` unless given


class Enqueuing(Parameters, total=False):
    """How one job is handed in: the keywords of AsyncBackstop.enqueue."""

    chain: str
    lane: Lane | str
    deadline_s: float
    idempotency_key: str | None
    metadata: Mapping[str, Any] | None


class EnqueuingMany(Parameters, total=False):
    """How a batch is handed in: the keywords of AsyncBackstop.enqueue_many."""

    batch: str | None
    chain: str
    deadline_s: float


class Chatting(Parameters, total=False):
    """How a chain is run here: the keywords of AsyncBackstop.chat."""

    chain: str
    timeout_s: float


class Following:
    """Connects when first used; `async with` closes it, and what is used after that connects again.

    After a fork the child connects anew. Raises UsageError for a setting that is none.
    """

    def __init__(self, **where: Unpack[Where]) -> None:
        if unknown := where.keys() - Where.__annotations__.keys():
            raise UsageError(f"{min(unknown)}: no such setting, there are {', '.join(Where.__annotations__)}")
        self._given = {name: value for name, value in where.items() if name != "tenant" and value is not None}
        self._tenant = where.get("tenant", "default")
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

    async def result(self, job: Job) -> JobView:
        """The job as it is now, ended or not. Raises NotFound."""
        links = await self._opened()
        with reached():
            found = await reads.job(links.db, _id(job), self._tenant)
        if found is None:
            raise NotFound(f"there is no job {_id(job)}")
        return found

    async def wait(self, job: Job, timeout_s: float = 120) -> JobView:
        """The job, ended. Raises WaitTimedOut, and the job goes on; NotFound."""
        view = await self.result(job)
        if not view.ended:
            await self._all_ended([view.id], timeout_s)
            view = await self.result(view.id)
        return view

    async def as_completed(self, jobs: Iterable[Job], timeout_s: float = 120) -> AsyncGenerator[JobView, None]:
        """Each of the jobs as it ends, the first first. Raises WaitTimedOut when some have not ended by then; NotFound."""
        links = await self._opened()
        pending = {_id(job) for job in jobs}
        until = links.loop.time() + timeout_s
        for page in _pages(pending):
            for view in await self._views(links, page):
                if view.ended:
                    pending.discard(view.id)
                    yield view
        async for some in links.endings.each(pending, until - links.loop.time()):
            for page in _pages(some):
                for view in await self._views(links, page):
                    pending.discard(view.id)
                    yield view
        if pending:
            raise WaitTimedOut(f"{len(pending)} jobs have not ended after {timeout_s:g} s; they go on")

    async def results(self, batch: Batch | UUID | str, timeout_s: float = BULK_DEADLINE_S) -> AsyncGenerator[ExportRow, None]:
        """Each row of the batch in the order of its input, as soon as it and those before it have ended.

        Raises WaitTimedOut when they have not within `timeout_s` in all; NotFound.
        """
        links = await self._opened()
        found, after = await self._batch(links, batch), 0
        until = links.loop.time() + timeout_s
        while True:
            loading = (await self._batch(links, found.id)).state == "loading"
            with reached():
                page = await reads.batch_results(links.db, found.id, after, PAGE)
            if not page and not loading:
                return
            if not page:
                if links.loop.time() > until:
                    raise WaitTimedOut(f"batch {found.name} is still being submitted after {timeout_s:g} s")
                await asyncio.sleep(LOOK_S)
                continue
            for row in page:
                while row.state not in TERMINAL:  # it may be queued again in between
                    await self._all_ended([row.job_id], max(0.0, until - links.loop.time()))
                    with reached():
                        row = next(iter(await reads.batch_endings(links.db, found.id, [row.ordinal or 0])), row)
                yield row
            after = page[-1].ordinal or 0

    async def cancel(self, what: Job | Batch) -> Cancelled:
        """The job, or all jobs of the batch, end cancelled unless they have ended; running ones within a heartbeat.

        Raises UsageError for the name of a batch, NotFound.
        """
        links = await self._opened()
        with reached():
            if isinstance(what, Batch):
                return await intervene.cancel(links.db, batch_id=what.id, tenant=self._tenant)
            return await intervene.cancel(links.db, job_ids=[(await self.result(what)).id], tenant=self._tenant)

    async def _views(self, links: Links, job_ids: Collection[UUID]) -> list[JobView]:
        with reached():
            views = await reads.job_views(links.db, list(job_ids))
        for job_id, view in zip(job_ids, views, strict=True):
            if view is None or view.tenant != self._tenant:
                raise NotFound(f"there is no job {job_id}")
        return [view for view in views if view is not None]

    async def _batch(self, links: Links, batch: Batch | UUID | str) -> BatchView:
        named = batch.id if isinstance(batch, Batch) else batch
        with reached():
            found = await reads.batch(links.db, named, self._tenant)
        if found is None:
            raise NotFound(f"there is no batch {named}")
        return found

    async def _all_ended(self, job_ids: Collection[UUID], timeout_s: float) -> None:
        links = await self._opened()
        with reached():
            if left := await links.endings.wait(job_ids, timeout_s):
                raise WaitTimedOut(f"job {min(left)} has not ended after {timeout_s:g} s; it goes on")

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
            bell = bell_of(str(settings.redis_url))
            ears = Redis.from_url(str(settings.redis_url), socket_timeout=2, socket_connect_timeout=1, retry=AsyncRetry(NoBackoff(), 0))
        except ValueError:
            raise UsageError("redis_url (or REDIS_URL): no URL of a Redis: expected redis://:password@host:6379/0") from None
        stack.callback(bell.close)
        stack.push_async_callback(ears.aclose)
        endings = await stack.enter_async_context(Endings(db, ears))
        return Links(os.getpid(), loop, stack.pop_all(), db, partial(publish, bell), endings)


def _pages(job_ids: Iterable[UUID]) -> Iterator[list[UUID]]:
    ids = list(job_ids)
    return (ids[start : start + PAGE] for start in range(0, len(ids), PAGE))


def _id(job: Job) -> UUID:
    try:
        return job.job_id if isinstance(job, Submitted) else UUID(str(job))
    except ValueError:
        raise UsageError("job: expected what enqueue gave back, or the id of a job, not a name") from None


@contextmanager
def reached() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        raise unreachable(error) from None
