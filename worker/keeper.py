"""The tight loops of every worker process: its heartbeat, and on the one that leads, dispatch and rescue."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from uuid import UUID

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.attempt import Attempts
from worker.database import STATEMENT_S, promptly
from worker.deathwatch import DeathWatch
from worker.dispatch import Dispatcher, Publish
from worker.events import origin
from worker.job import Lane, new_id
from worker.ledger import Claim
from worker.loop import cancel_surely
from worker.rescue import expire, release, rescue
from worker.settings import Settings
from worker.settlement import Cancelled

log = structlog.get_logger(__name__)

LEADER_LOCK = 0x6C656164  # "lead"
FENCE_MARGIN_S = 3.0  # this much before others may hold us dead, no new call is made
BUSY_TICK_S = 0.03
IDLE_TICK_S = 0.15
MEND_S = 0.5
FOLLOW_S = 0.5  # between looks at whether somebody leads
DUTY_S = 1.0  # between two rounds of a duty
TICK_LIMIT_S = 30.0  # Redis may take 10 s to say that it does not answer


class Keeper:
    """Says that this process lives, and leads when nobody else does.

    `db` is its own and pools nothing: a full pool must not stop a heartbeat,
    and a lock must end with its connection. `duties`: what the leader sees to besides, a round each second; for a moment two
    processes may be at it, so each must bear that.
    """

    def __init__(
        self,
        db: AsyncEngine,
        redis: Redis,
        publish: Publish,
        settings: Settings,
        lanes: Collection[Lane],
        duties: Sequence[Callable[[], Awaitable[None]]] = (),
    ) -> None:
        self._db = db
        self._redis = redis
        self._publish = publish
        self._settings = settings
        self._lanes = lanes
        self._duties = duties
        self._seen_s = 0.0
        self._strays: Mapping[UUID, int] = {}
        self._fleet = 1
        self.worker_id = new_id()

    def fresh(self) -> bool:
        """False when others may soon hold this worker dead: then it claims nothing."""
        fresh_s = max(self._settings.heartbeat_ttl_s - FENCE_MARGIN_S, self._settings.heartbeat_ttl_s / 2)
        return time.monotonic() - self._seen_s < fresh_s

    def may_call(self, claim: Claim) -> bool:
        """Whether it is fresh, and was not held dead since it claimed the job: else no new request is sent."""
        return claim.worker_id == self.worker_id and self.fresh()

    def fleet(self) -> int:
        """How many workers were alive at its last heartbeat, itself among them."""
        return self._fleet

    async def register(self) -> None:
        """This process stands in `workers` under a fresh id. Raises DBAPIError."""
        self.worker_id = new_id()
        async with self._db.connect() as connection:
            await connection.execute(
                _REGISTER,
                {
                    "id": self.worker_id,
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "lanes": ",".join(self._lanes),
                    "slots": self._settings.bulk_slots if Lane.BULK in self._lanes else 0,
                },
            )
        self._seen_s = time.monotonic()

    async def retire(self) -> None:
        """Everyone may know at once that this process has ended."""
        try:
            async with self._db.connect() as connection:
                await connection.execute(_RETIRE, {"id": self.worker_id})
        except DBAPIError as error:  # then the leader finds out, one TTL later
            log.warning("not_retired", error=type(error.orig).__name__)

    async def beat(self, attempts: Attempts) -> None:
        """Every `heartbeat_s`, for ever: alive; hears what to cancel; gives back what stands under its name by mistake."""
        while True:
            try:
                async with self._db.connect() as connection:
                    while True:
                        await self._beat_once(connection, attempts)
                        await asyncio.sleep(self._settings.heartbeat_s)
            except DBAPIError as error:
                log.warning("heartbeat_failed", error=type(error.orig).__name__)
            except Exception as error:  # a fault of ours must not stop the heart for good
                log.error("heartbeat_failed", error=type(error).__name__, origin=origin(error))
            await asyncio.sleep(self._settings.heartbeat_s)

    async def _beat_once(self, connection: AsyncConnection, attempts: Attempts) -> None:
        state = "draining" if attempts.draining else "live"
        values = {"id": self.worker_id, "waiting": list(attempts.waiting), "state": state}
        rows = list(await promptly(connection.execute(_BEAT, values), self._settings.heartbeat_ttl_s / 3))
        if not rows:
            log.warning("declared_dead", worker_id=str(self.worker_id))
            await self.register()
            return
        self._seen_s = time.monotonic()
        self._fleet = max(1, rows[0].fleet)
        if self._settings.heartbeat_file:
            with suppress(OSError):  # a full disk: then only the health check is wrong
                self._settings.heartbeat_file.touch()
        mine = {row.job_id: row for row in rows if row.job_id}
        for job_id, row in mine.items():
            if row.cancel_requested and job_id in attempts.held:
                attempts.held[job_id].stop(Cancelled())
        strays = {job_id: row.fence for job_id, row in mine.items() if not attempts.holds(job_id)}
        twice = {job_id: fence for job_id, fence in strays.items() if self._strays.get(job_id) == fence}
        if twice:
            released = await release(connection, self.worker_id, twice)
            log.warning("strays_released", jobs=len(released))
        self._strays = strays

    async def lead(self) -> None:
        """For ever: waits to become the leader, then dispatches and rescues until a connection breaks."""
        while True:
            try:
                async with self._db.connect() as connection:
                    while True:
                        if await self._leads(connection):
                            await self._reign(connection)
                        await asyncio.sleep(FOLLOW_S)
            except DBAPIError as error:
                log.warning("leadership_lost", error=type(error.orig).__name__)
            except Exception as error:  # nor leave the fleet without a leader
                log.error("leadership_lost", error=type(error).__name__, origin=origin(error))
            await asyncio.sleep(FOLLOW_S)

    async def _leads(self, connection: AsyncConnection) -> bool:
        """Whether the lock is this connection's. A leader that holds it without a sign of life loses it."""
        values = {"lock": LEADER_LOCK, "ttl_s": self._settings.heartbeat_ttl_s}
        leads: bool = (await promptly(connection.execute(_LEAD, values), STATEMENT_S)).scalar_one()
        return leads

    async def _reign(self, connection: AsyncConnection) -> None:
        """Until a connection breaks. The one that holds the lock mends, twice a second, so everybody sees that the leader lives."""
        log.info("leading", worker_id=str(self.worker_id))
        async with self._db.connect() as other:
            loops = [asyncio.create_task(self._mend(connection)), asyncio.create_task(self._dispatch(other))]
            loops += [asyncio.create_task(_see_to(duty)) for duty in self._duties]
            try:
                await asyncio.gather(*loops)
            finally:
                await cancel_surely(loops)

    async def _dispatch(self, connection: AsyncConnection) -> None:
        settings = self._settings
        dispatcher = Dispatcher(
            connection,
            self._redis,
            self._publish,
            pack_size=min(settings.pack_size, settings.bulk_slots),
            dispatch_ttl_s=settings.dispatch_ttl_s,
        )
        while True:
            try:
                busy = await promptly(dispatcher.tick(), TICK_LIMIT_S) > 0
            except RedisError as error:
                log.warning("dispatch_waits", error=type(error).__name__)
                await asyncio.sleep(1)
                continue
            await asyncio.sleep(BUSY_TICK_S if busy else IDLE_TICK_S)

    async def _mend(self, connection: AsyncConnection) -> None:
        watch = DeathWatch(self._settings.heartbeat_ttl_s)
        while True:
            await promptly(self._mend_once(connection, watch), STATEMENT_S)
            await asyncio.sleep(min(MEND_S, self._settings.heartbeat_ttl_s / 6))

    async def _mend_once(self, connection: AsyncConnection, watch: DeathWatch) -> None:
        expired = await expire(connection)
        if expired:
            log.info("expired", jobs=len(expired))
        heartbeats = {row.id: row.seen_at for row in await connection.execute(_HEARTBEATS)}
        dead = watch.look(heartbeats, time.monotonic())
        if dead:
            await connection.execute(_BURY, {"ids": list(dead), "beats": list(dead.values())})
            log.warning("workers_died", workers=[str(worker) for worker in dead])
        rescued = await rescue(connection)
        if rescued:
            log.warning("rescued", jobs=len(rescued))


async def _see_to(duty: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await duty()
        except Exception as error:  # what one duty meets must not unseat the leader
            log.warning("duty_failed", error=type(error).__name__, origin=origin(error))
        await asyncio.sleep(DUTY_S)


_REGISTER = text("""
INSERT INTO workers (id, host, pid, lanes, slots, state) VALUES (:id, :host, :pid, :lanes, :slots, 'live')
""")

_RETIRE = text("UPDATE workers SET state = 'gone', waiting = '{}' WHERE id = :id AND state <> 'dead'")

_BEAT = text("""
WITH me AS (
    UPDATE workers SET seen_at = now(), waiting = CAST(:waiting AS uuid[]), state = :state
    WHERE id = :id AND state IN ('live', 'draining') RETURNING id
)
SELECT j.id AS job_id, j.fence, j.cancel_requested, (SELECT count(*) FROM workers WHERE state = 'live') AS fleet
FROM me LEFT JOIN jobs j ON j.worker_id = me.id AND j.state = 'running'
""")

# A process that was frozen, or whose host is cut off, keeps its lock for as long as its connection stands. A leader's never is
# idle for long; the database's clock is good enough to tell, because losing the lock is harmless.
_LEAD = text("""
WITH unseated AS (
    SELECT pg_terminate_backend(l.pid) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.locktype = 'advisory' AND l.objid = :lock AND l.granted AND a.datname = current_database() AND a.pid <> pg_backend_pid()
        AND a.state = 'idle' AND a.state_change < clock_timestamp() - make_interval(secs => :ttl_s)
)
SELECT pg_try_advisory_lock(:lock) FROM (SELECT count(*) FROM unseated) AS first
""")

_HEARTBEATS = text("SELECT id, seen_at FROM workers WHERE state IN ('live', 'draining')")

_BURY = text("""
UPDATE workers w SET state = 'dead', waiting = '{}' FROM unnest(CAST(:ids AS uuid[]), CAST(:beats AS timestamptz[])) AS d(id, beat)
WHERE w.id = d.id AND w.seen_at = d.beat AND w.state IN ('live', 'draining')
""")
