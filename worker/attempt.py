"""The story of an attempt: claim, route, answer, decide, settle. One `Attempts` serves a whole worker process."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

import structlog
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.chain import Chain, Exhausted, Outcome, Walk
from worker.config import Config
from worker.dispatch import withdraw
from worker.grouping import Group
from worker.job import JobState, Lane
from worker.ledger import Claim, Settlement, claim, settle
from worker.route import first_calls, route
from worker.settlement import Cancelled, Released, decide
from worker.slots import Slots

log = structlog.get_logger(__name__)

SETTLE_AGAIN_S = 0.5  # between tries while Postgres is away


@dataclass(slots=True)
class Held:
    """A claim in the hands of this process, and how to stop it. Once it settles, it is stopped no more."""

    claim: Claim
    task: asyncio.Task[JobState] | None = None
    stopped: Cancelled | Released | None = None
    settling: bool = False

    def stop(self, why: Cancelled | Released) -> None:
        if self.settling or self.stopped or self.task is None:
            return
        self.stopped = why
        self.task.cancel()


class Attempts:
    """Runs packs of jobs. `announce` tells those who wait that jobs of the interactive lane have ended."""

    def __init__(
        self,
        db: AsyncEngine,
        config: Config,
        chain: Chain,
        *,
        worker_id: Callable[[], UUID],
        seems_closed: Callable[[str], bool],
        announce: Callable[[Sequence[UUID]], Awaitable[None]],
        slots: Mapping[Lane, Slots],
    ) -> None:
        self._db = db
        self._config = config
        self._chain = chain
        self._worker_id = worker_id
        self._seems_closed = seems_closed
        self._announce = announce
        self._slots = slots
        self._settle = Group(self._settle_surely, most=200)
        self.held: dict[UUID, Held] = {}
        self.waiting: set[UUID] = set()  # deliveries that wait for slots
        self.draining = False
        self._claiming: set[UUID] = set()

    def holds(self, job_id: UUID) -> bool:
        """Whether this process runs the job, or has asked for it and waits for the reply."""
        return job_id in self.held or job_id in self._claiming

    async def run_pack(self, delivery_id: UUID, job_ids: Sequence[UUID], lane: Lane) -> Mapping[str, int]:
        """All jobs of one Celery message that were still to be had have been attempted once; how many ended in which state."""
        slots = self._slots[lane]
        self.waiting.add(delivery_id)
        try:
            await slots.take(len(job_ids))
        finally:
            self.waiting.discard(delivery_id)
        if self.draining:
            slots.give_back(len(job_ids))
            await withdraw(self._db, [delivery_id])
            return {}
        claims = await self._claim(job_ids)
        slots.give_back(len(job_ids) - len(claims))
        states = await asyncio.gather(*(self._start(claimed, slots) for claimed in claims))
        return Counter(str(state) for state in states)

    async def _claim(self, job_ids: Sequence[UUID]) -> list[Claim]:
        self._claiming.update(job_ids)
        try:
            return await claim(self._db, job_ids, self._worker_id(), first_calls(self._config, self._seems_closed))
        except DBAPIError as error:
            log.warning("claim_failed", jobs=len(job_ids), error=type(error.orig).__name__)
            return []  # the leader publishes them again
        finally:
            self._claiming.difference_update(job_ids)

    def _start(self, claimed: Claim, slots: Slots) -> asyncio.Task[JobState]:
        held = self.held[claimed.job_id] = Held(claimed)
        held.task = asyncio.create_task(self._run(held))
        held.task.add_done_callback(lambda _: slots.give_back())
        return held.task

    async def _run(self, held: Held) -> JobState:
        walk = Walk(held.claim)
        try:
            outcome = await self._answer(held, walk)
            settlement = decide(outcome, walk)
            held.settling = True
            return await self._settled(settlement)
        finally:
            if self.held.get(held.claim.job_id) is held:
                del self.held[held.claim.job_id]

    async def _answer(self, held: Held, walk: Walk) -> Outcome | Cancelled | Released:
        try:
            return await self._chain.answer(walk, route(self._config, held.claim.chain))
        except asyncio.CancelledError:
            if held.stopped is None:
                raise
            return held.stopped
        except Exception as error:
            # A fault of ours must not take the job along: it is attempted again, and the log says where to look.
            log.exception("attempt_broke", job_id=str(held.claim.job_id), error=type(error).__name__)
            return Exhausted()

    async def _settled(self, settlement: Settlement) -> JobState:
        if not await self._settle.ask(settlement):
            log.info("settle_refused", job_id=str(settlement.job_id), fence=settlement.fence)
            return JobState.QUEUED
        if settlement.lane is Lane.INTERACTIVE and settlement.state is not JobState.QUEUED:
            await self._announce([settlement.job_id])
        return settlement.state

    async def _settle_surely(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        """Settled, however long Postgres is away: what was paid for stays in memory until then."""
        again = False
        while True:
            try:
                return await settle(self._db, settlements, again=again)
            except (DataError, IntegrityError, ProgrammingError) as error:
                if len(settlements) > 1:
                    return [held for one in settlements for held in await self._settle_surely([one])]
                log.error("settle_impossible", job_id=str(settlements[0].job_id), error=type(error.orig).__name__)
                settlements = [_unstorable(settlements[0])]
            except DBAPIError as error:
                again = True
                log.warning("settle_waits", jobs=len(settlements), error=type(error.orig).__name__)
            await asyncio.sleep(SETTLE_AGAIN_S)


def _unstorable(settlement: Settlement) -> Settlement:
    """The same without the answer that Postgres would not take, so that the job ends and its calls are booked."""
    return replace(
        settlement,
        state=JobState.FAILED,
        answer=None,
        error={"code": "unstorable", "message": "the answer could not be stored", "providers": []},
        calls=tuple(replace(call, answer=None) for call in settlement.calls),
    )
