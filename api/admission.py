"""Who is let in: a queue that grows without bound keeps nobody's promise."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fastapi import HTTPException
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import reads
from worker.dispatch import Publish
from worker.job import Lane
from worker.submit import NewJob, Submitted, replayed, submit

LOOK_S = 1.0
AGAIN_S = 5


@dataclass(slots=True)
class _Look:
    at: float
    queued: int = 0


class Admission:
    """Bounds the interactive jobs that each tenant has queued. One per process.

    Postgres is asked once a second and tenant; what is let in between is counted here. So each further process may let
    in what a second brings it, no more.
    """

    def __init__(self, db: AsyncEngine, max_queued: int) -> None:
        self._db = db
        self._max_queued = max_queued
        self._looks: dict[str, _Look] = {}

    async def submit(self, publish: Publish, new: NewJob) -> Submitted:
        """The job is queued; one that its idempotency key stands for already is given back, however many are queued.

        Raises HTTPException, a 429, when as many as may be are; KeyReused as `submit` does.
        """
        if new.lane is Lane.INTERACTIVE:
            try:
                await self.admit(new.tenant)
            except HTTPException:
                if earlier := await replayed(self._db, new):
                    return earlier
                raise
        return await submit(self._db, publish, new)

    async def admit(self, tenant: str) -> None:
        """One more job of the tenant's is counted. Raises HTTPException, a 429, when as many as may be are queued."""
        look = self._looks.get(tenant)
        now = time.monotonic()
        if look is None or now - look.at >= LOOK_S:
            look = self._looks[tenant] = _Look(now, look.queued if look else 0)  # at once: meanwhile nobody else looks
            look.queued = await reads.queued(self._db, tenant, self._max_queued)
        if look.queued >= self._max_queued:
            detail = f"{self._max_queued} of your jobs are queued already: wait, or send what can wait with `lane` bulk"
            raise HTTPException(429, detail, {"Retry-After": str(AGAIN_S)})
        look.queued += 1
