"""The story of an attempt: claim, route, answer, decide, settle. One `Attempts` serves a whole worker process."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from uuid import UUID

import structlog
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.calls import Call
from worker.chain import Chain
from worker.config import Config
from worker.cost import Usage
from worker.dispatch import withdraw
from worker.events import origin
from worker.grouping import Group
from worker.job import JobState, Lane
from worker.ledger import Claim, Settlement, claim, settle
from worker.route import first_calls, route, warmed
from worker.settlement import Cancelled, Released, decide
from worker.signals import Billing
from worker.slots import Slots
from worker.walk import Exhausted, Outcome, Walk

log = structlog.get_logger(__name__)

LAST_SETTLE_S = 10.0  # at a shutdown Postgres gets so long to take what was paid for
SETTLE_AGAIN_S = 0.5  # between tries while Postgres is away
CUT_OFF_S = 0.1  # between looks whether it is back


@dataclass(slots=True)
class Held:
    """A claim in the hands of this process, and how to stop it. Once its chain has ended, it is stopped no more."""

    claim: Claim
    task: asyncio.Task[JobState] | None = None
    stopped: Cancelled | Released | None = None
    walking: bool = False

    def stop(self, why: Cancelled | Released) -> None:
        if self.stopped:
            return
        self.stopped = why
        if self.walking and self.task:
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
        fresh: Callable[[], bool],
        seems_closed: Callable[[str], bool],
        announce: Callable[[Sequence[UUID]], Awaitable[None]],
        slots: Mapping[Lane, Slots],
    ) -> None:
        self._db = db
        self._config = config
        self._chain = chain
        self._worker_id = worker_id
        self._fresh = fresh
        self._seems_closed = seems_closed
        self._announce = announce
        self._slots = slots
        self._settle = Group(self._settle_surely, most=200)
        self.held: dict[UUID, Held] = {}
        self.waiting: set[UUID] = set()  # deliveries that wait for slots
        self.draining = False
        self._claiming: set[UUID] = set()
        self._unsettled: dict[UUID, Settlement] = {}
        self._packs: set[asyncio.Task[Mapping[str, int]]] = set()

    def holds(self, job_id: UUID) -> bool:
        """Whether this process runs the job, or has asked for it and waits for the reply."""
        return job_id in self.held or job_id in self._claiming

    async def run_pack(self, delivery_id: UUID, job_ids: Sequence[UUID], lane: Lane) -> Mapping[str, int]:
        """All jobs of one Celery message that were still to be had have been attempted once; how many ended in which state."""
        pack = asyncio.create_task(self._run_pack(delivery_id, job_ids, self._slots[lane]))
        self._packs.add(pack)
        pack.add_done_callback(self._packs.discard)
        return await pack

    async def drain(self, grace_s: float) -> list[Settlement]:
        """Nothing is claimed any more, and nothing runs: what did had `grace_s` seconds to end, then it was released.

        What comes back is what Postgres would not take, LAST_SETTLE_S later.
        """
        self.draining = True
        if self._packs:
            await asyncio.wait(self._packs, timeout=grace_s)
        for held in self.held.values():
            held.stop(Released())
        if self._packs:
            await asyncio.wait(self._packs, timeout=LAST_SETTLE_S)
        return list(self._unsettled.values())

    async def _run_pack(self, delivery_id: UUID, job_ids: Sequence[UUID], slots: Slots) -> Mapping[str, int]:
        self.waiting.add(delivery_id)
        try:
            await self._until_fresh()
            await slots.take(len(job_ids))
        finally:
            self.waiting.discard(delivery_id)
        claims: list[Claim] = []
        try:
            if self.draining:
                with suppress(SQLAlchemyError):  # the leader misses them
                    await withdraw(self._db, [delivery_id])
                return {}
            claims = await self._claim(job_ids)
        finally:
            slots.give_back(len(job_ids) - len(claims))
        helds = [self._start(claimed, slots) for claimed in claims]
        if self.draining:  # since it was claimed
            for held in helds:
                held.stop(Released())
        states = await asyncio.gather(*(held.task for held in helds if held.task))
        return Counter(str(state) for state in states)

    async def _until_fresh(self) -> None:
        """A worker that is cut off from Postgres keeps what it fetched, rather than fetch and fail faster than others can work."""
        while not (self._fresh() or self.draining):  # noqa: ASYNC110 - time alone makes it stale
            await asyncio.sleep(CUT_OFF_S)

    async def _claim(self, job_ids: Sequence[UUID]) -> list[Claim]:
        self._claiming.update(job_ids)
        try:
            return await claim(self._db, job_ids, self._worker_id(), first_calls(self._config, self._seems_closed))
        except SQLAlchemyError as error:
            log.warning("claim_failed", jobs=len(job_ids), error=_kind(error))
            return []  # the leader publishes them again
        finally:
            self._claiming.difference_update(job_ids)

    def _start(self, claimed: Claim, slots: Slots) -> Held:
        held = self.held[claimed.job_id] = Held(claimed)
        held.task = asyncio.create_task(self._run(held))
        held.task.add_done_callback(lambda _: slots.give_back())
        return held

    async def _run(self, held: Held) -> JobState:
        walk = Walk(held.claim)
        try:
            outcome = await self._answer(held, walk)
            return await self._settled(decide(outcome, walk))
        finally:
            if self.held.get(held.claim.job_id) is held:
                del self.held[held.claim.job_id]

    async def _answer(self, held: Held, walk: Walk) -> Outcome | Cancelled | Released:
        if held.stopped:
            return held.stopped
        held.walking = True
        try:
            chain = warmed(route(self._config, held.claim.chain), held.claim.job_id)
            return await self._chain.answer(walk, chain)
        except asyncio.CancelledError:
            if held.stopped is None:
                raise
            return walk.paid() or held.stopped
        except Exception as error:
            # A fault of ours must not take the job along: it is attempted again, and the log says where to look.
            log.error("attempt_broke", job_id=str(held.claim.job_id), error=type(error).__name__, origin=origin(error))
            return walk.paid() or Exhausted()
        finally:
            held.walking = False

    async def _settled(self, settlement: Settlement) -> JobState:
        self._unsettled[settlement.job_id] = settlement
        held = await self._settle.ask(settlement)
        if self._unsettled.get(settlement.job_id) is settlement:
            del self._unsettled[settlement.job_id]
        if not held:
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
            except Exception as error:
                if _will_pass(error):
                    again = True
                    log.warning("settle_waits", jobs=len(settlements), error=_kind(error))
                elif len(settlements) > 1:
                    return [held for one in settlements for held in await self._settle_surely([one])]
                else:
                    log.error("settle_impossible", job_id=str(settlements[0].job_id), error=_kind(error), origin=origin(error))
                    settlements = [_lesser(settlements[0])]
            await asyncio.sleep(SETTLE_AGAIN_S)


def _will_pass(error: Exception) -> bool:
    """Whether Postgres is away or out of sorts; otherwise it will never take what it was given."""
    if isinstance(error, DataError | IntegrityError):
        return False
    too_complex = str(getattr(getattr(error, "orig", None), "sqlstate", None)).startswith("54")
    return isinstance(error, SQLAlchemyError) and not too_complex


def _kind(error: Exception) -> str:
    return type(getattr(error, "orig", error)).__name__


def _unknown(call: Call) -> Call:
    return replace(call, usage=Usage(), billing=Billing.UNKNOWN, cost_usd=None, error_code=None, answer=None)


def _lesser(settlement: Settlement) -> Settlement:
    """The same without the answer, so that the job ends and its calls are booked; failing that, without their figures."""
    if settlement.answer is None:
        return replace(settlement, calls=tuple(_unknown(call) for call in settlement.calls))
    return replace(
        settlement,
        state=JobState.FAILED,
        answer=None,
        error={"code": "unstorable", "message": "the answer could not be stored", "providers": []},
        calls=tuple(replace(call, answer=None) for call in settlement.calls),
    )
