"""Jobs and batches followed from outside a worker: looked at, waited for, read as they end, cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator, Mapping
from contextlib import aclosing
from typing import Any
from uuid import UUID

from worker import intervene, reads
from worker.errors import NotFound, UsageError, WaitTimedOut
from worker.export import ExportRow
from worker.intervene import Cancelled
from worker.job import TERMINAL, Lane
from worker.links import Linked, Links, as_unreachable
from worker.submit import BULK_DEADLINE_S, Batch, Parameters, Submitted
from worker.views import BatchView, JobView

PAGE = 1_000  # rows of a batch in memory at once
LOOK_S = 0.5  # between looks at a batch that is still being submitted

Job = Submitted | UUID | str


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


class Following(Linked):
    """What can be done with jobs and batches that were handed in."""

    async def result(self, job: Job) -> JobView:
        """The job as it is now, ended or not. Raises NotFound."""
        links = await self._opened()
        with as_unreachable():
            found = await reads.job(links.db, _id(job), self._tenant)
        if found is None:
            raise NotFound(f"there is no job {_id(job)}")
        return found

    async def wait(self, job: Job, timeout_s: float = 120) -> JobView:
        """The job, ended. Raises WaitTimedOut, and the job goes on; NotFound."""
        view = await self.result(job)
        if not view.ended:
            await self._ended(view.id, timeout_s, timeout_s)
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
        with as_unreachable():
            async with aclosing(links.endings.each(pending, until - links.loop.time())) as ends:
                async for some in ends:
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
            with as_unreachable():
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
                    await self._ended(row.job_id, max(0.0, until - links.loop.time()), timeout_s)
                    with as_unreachable():
                        row = next(iter(await reads.batch_endings(links.db, found.id, [row.ordinal or 0])), row)
                yield row
            after = page[-1].ordinal or 0

    async def cancel(self, what: Job | Batch) -> Cancelled:
        """The job, or all jobs of the batch, end cancelled unless they have ended; running ones within a heartbeat.

        Raises UsageError for the name of a batch, NotFound.
        """
        links = await self._opened()
        with as_unreachable():
            if isinstance(what, Batch):
                return await intervene.cancel(links.db, batch_id=what.id, tenant=self._tenant)
            return await intervene.cancel(links.db, job_ids=[(await self.result(what)).id], tenant=self._tenant)

    async def _views(self, links: Links, job_ids: Collection[UUID]) -> list[JobView]:
        with as_unreachable():
            views = await reads.job_views(links.db, list(job_ids))
        for job_id, view in zip(job_ids, views, strict=True):
            if view is None or view.tenant != self._tenant:
                raise NotFound(f"there is no job {job_id}")
        return [view for view in views if view is not None]

    async def _batch(self, links: Links, batch: Batch | UUID | str) -> BatchView:
        named = batch.id if isinstance(batch, Batch) else batch
        with as_unreachable():
            found = await reads.batch(links.db, named, self._tenant)
        if found is None:
            raise NotFound(f"there is no batch {named}")
        return found

    async def _ended(self, job_id: UUID, left_s: float, timeout_s: float) -> None:
        """Raises WaitTimedOut when it has not within `left_s`, what is left of `timeout_s`."""
        links = await self._opened()
        with as_unreachable():
            if await links.endings.wait([job_id], left_s):
                raise WaitTimedOut(f"job {job_id} has not ended after {timeout_s:g} s; it goes on")


def _pages(job_ids: Iterable[UUID]) -> Iterator[list[UUID]]:
    ids = list(job_ids)
    return (ids[start : start + PAGE] for start in range(0, len(ids), PAGE))


def _id(job: Job) -> UUID:
    try:
        return job.job_id if isinstance(job, Submitted) else UUID(str(job))
    except ValueError:
        raise UsageError("job: expected what enqueue gave back, or the id of a job, not a name") from None
