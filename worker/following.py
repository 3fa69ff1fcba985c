"""Jobs and batches followed from outside a worker, on connections that one event loop of one process owns."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self
from uuid import UUID

import redis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import intervene, reads
from worker.database import engine, unreachable
from worker.dispatch import queue_name
from worker.embedded.attach import attached
from worker.errors import NotFound, UsageError, WaitTimedOut
from worker.export import ExportRow
from worker.intervene import Cancelled
from worker.job import TERMINAL, Lane
from worker.loop import cancel_surely
from worker.settings import Settings, read_settings
from worker.submit import BULK_DEADLINE_S, Batch, Submitted
from worker.transport import TASK, message_of
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
    bell: redis.Redis
    endings: Endings

    def publish(self, lane: Lane, delivery_id: UUID, job_ids: Sequence[UUID]) -> None:
        queue = queue_name(lane)
        self.bell.lpush(queue, message_of(queue, TASK, str(delivery_id), {"job_ids": [str(job_id) for job_id in job_ids]}))


class Following:
    """Connects when first used; `async with` closes it, and what is used after that connects again.

    Settings are those of the environment unless given: `database_url`, `redis_url`, else the embedded servers that run under
    `data`. After a fork the child connects anew.
    """

    def __init__(
        self,
        *,
        database_url: str | None = None,
        redis_url: str | None = None,
        config: str | Path | None = None,
        data: str | Path | None = None,
        tenant: str = "default",
    ) -> None:
        self._given = {"database_url": database_url, "redis_url": redis_url, "config": config, "data": data}
        self._tenant = tenant
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
        with reached():
            for view in await self._views(links, pending):
                if view.ended:
                    pending.discard(view.id)
                    yield view
        ended: asyncio.Queue[UUID] = asyncio.Queue()
        tasks = [asyncio.create_task(_tell(links.endings, job_id, timeout_s, ended)) for job_id in pending]
        try:
            while pending:
                try:
                    async with asyncio.timeout_at(until):
                        some = {await ended.get()}
                except TimeoutError:
                    raise WaitTimedOut(f"{len(pending)} jobs have not ended after {timeout_s:g} s; they go on") from None
                while not ended.empty():
                    some.add(ended.get_nowait())
                pending -= some
                with reached():
                    views = await self._views(links, some)
                for view in views:
                    yield view
        finally:
            await cancel_surely(tasks)

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
        """The job, or all jobs of the batch, end cancelled unless they have ended; running ones within a heartbeat. Raises NotFound."""
        links = await self._opened()
        if isinstance(what, Batch):
            with reached():
                return await intervene.cancel(links.db, batch_id=what.id, tenant=self._tenant)
        view = await self.result(what)
        with reached():
            return await intervene.cancel(links.db, job_ids=[view.id], tenant=self._tenant)

    async def _views(self, links: Links, job_ids: Collection[UUID]) -> list[JobView]:
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
            given = {name: value for name, value in self._given.items() if value is not None}
            for name in given.keys() & {"config", "data"}:
                given[name] = Path(str(given[name]))
            self._settings = read_settings().model_copy(update=given)
        return self._settings


async def _connect(settings: Settings, loop: asyncio.AbstractEventLoop) -> Links:
    async with AsyncExitStack() as stack:
        db = engine(str(settings.database_url))
        stack.push_async_callback(db.dispose)
        try:
            bell = redis.Redis.from_url(str(settings.redis_url), socket_timeout=2, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0))
            ears = Redis.from_url(str(settings.redis_url), socket_timeout=2, socket_connect_timeout=1, retry=AsyncRetry(NoBackoff(), 0))
        except ValueError:
            raise UsageError("REDIS_URL is no URL of a Redis: expected redis://:password@host:6379/0") from None
        stack.callback(bell.close)
        stack.push_async_callback(ears.aclose)
        endings = await stack.enter_async_context(Endings(db, ears))
        return Links(os.getpid(), loop, stack.pop_all(), db, bell, endings)


async def _tell(endings: Endings, job_id: UUID, timeout_s: float, ended: asyncio.Queue[UUID]) -> None:
    with suppress(DBAPIError):  # said by the look at the ledger that follows, or as a time-out
        if not await endings.wait([job_id], timeout_s):
            ended.put_nowait(job_id)


def _id(job: Job) -> UUID:
    try:
        return job.job_id if isinstance(job, Submitted) else UUID(str(job))
    except ValueError:
        raise UsageError("job: expected what enqueue gave back, or the id of a job") from None


@contextmanager
def reached() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        raise unreachable(error) from None
