"""Publishes ready jobs: a bounded window for each lane, fair between batches, the ledger first and Redis second.

A message is a hint. One too many costs an UPDATE that matches nothing, one too few is found by `Dispatcher.look_for_losses`.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from uuid import UUID

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.database import run
from worker.job import Lane, new_id

log = structlog.get_logger(__name__)

# Puts one message on a lane's queue. Raises when it is not known to have arrived.
Publish = Callable[[Lane, UUID, Sequence[UUID]], None]

EPOCH_KEY = "backstop:epoch"
INTERACTIVE_WINDOW = 1_000  # interactive jobs published and not yet claimed; most never pass through here
LOST_AFTER_S = 3.0  # published for so long while the queue is empty and no worker holds the message
LOOKS = 2  # empty so often in a row
SUSPECTS = 10  # jobs over which two workers died that are in flight at once, in all; over which more died: one


def queue_name(lane: Lane) -> str:
    """The Celery queue of a lane. Names sort by rank: workers take from the first that is not empty."""
    return {Lane.INTERACTIVE: "backstop.1.interactive", Lane.BULK: "backstop.2.bulk"}[lane]


def shares(
    free: int, ready: Mapping[UUID | None, int], weights: Mapping[UUID | None, int], paid: dict[UUID | None, float]
) -> dict[UUID | None, int]:
    """How many of `free` places each batch gets, never more than it has jobs ready.

    Fair queueing: a place costs a batch 1 / weight, and who has `paid` least is next. What was paid is kept from round to round;
    a batch that comes (back) starts level with the one that is next, so nobody starves and nobody catches up.
    """
    level = min((paid[batch] for batch in ready if batch in paid), default=0.0)
    line = [(paid.get(batch, level), place, batch) for place, batch in enumerate(ready)]
    heapq.heapify(line)
    given: dict[UUID | None, int] = dict.fromkeys(ready, 0)
    paid.clear()
    for _ in range(min(free, sum(ready.values()))):
        cost, place, batch = heapq.heappop(line)
        given[batch] += 1
        paid[batch] = cost + 1 / weights[batch]
        if given[batch] < ready[batch]:
            heapq.heappush(line, (paid[batch], place, batch))
    paid.update((batch, cost) for cost, _, batch in line)
    return given


class Dispatcher:
    """Works on the leader's own connection: when that breaks, its leadership is gone, and so is this."""

    def __init__(self, db: AsyncConnection, redis: Redis, publish: Publish, *, pack_size: int, dispatch_ttl_s: float) -> None:
        self._db = db
        self._redis = redis
        self._publish = publish
        self._pack_size = {Lane.INTERACTIVE: 1, Lane.BULK: pack_size}
        self._dispatch_ttl_s = dispatch_ttl_s
        self._epoch: str | None = None
        self._paid: dict[Lane, dict[UUID | None, float]] = {lane: {} for lane in Lane}
        self._empty_looks: dict[Lane, int] = dict.fromkeys(Lane, 0)
        self._looked_s = time.monotonic()

    async def tick(self) -> int:
        """Fills the windows; how many jobs were published. Raises RedisError or DBAPIError, to be called again later."""
        await self._check_epoch()
        published = 0
        for lane, free in (await self._free()).items():
            if free > 0:
                suspects = [row.id for row in await self._db.execute(_SUSPECTS, {"suspects": SUSPECTS})]
                published += await self._fill(lane, free, suspects)
        if time.monotonic() - self._looked_s >= 1:
            await self.look_for_losses()
            self._looked_s = time.monotonic()
        return published

    async def _check_epoch(self) -> None:
        """A Redis without our epoch has lost its memory; a new leader trusts nothing that it did not publish itself."""
        epoch = await self._redis.get(EPOCH_KEY)
        if epoch is None:
            epoch = str(new_id())
            await self._redis.set(EPOCH_KEY, epoch)
        epoch = epoch.decode() if isinstance(epoch, bytes) else epoch
        if epoch != self._epoch:
            withdrawn = (await self._db.execute(_WITHDRAW_ALL)).rowcount
            log.info("published_again", why="new epoch" if self._epoch else "new leader", jobs=withdrawn)
            self._epoch = epoch

    async def _free(self) -> dict[Lane, int]:
        rows = await self._db.execute(_WINDOWS, {"lanes": list(Lane)})
        free: dict[Lane, int] = {}
        for row in rows:
            lane = Lane(row.lane)
            window = INTERACTIVE_WINDOW if lane is Lane.INTERACTIVE else max(row.slots, self._pack_size[lane])
            room = 0 if row.paused else max(window - row.published, 0)
            free[lane] = room - room % self._pack_size[lane]  # full packs, while there is enough to fill them
        return free

    async def _fill(self, lane: Lane, free: int, suspects: Sequence[UUID]) -> int:
        waiting = list(await self._db.execute(_READY, {"lane": lane.value, "most": free, "suspects": suspects}))
        if not waiting:
            return 0
        ready, weights = {row.id: row.ready for row in waiting}, {row.id: row.weight for row in waiting}
        given = shares(free, ready, weights, self._paid[lane])
        rows = await self._db.execute(
            _PICK,
            {
                "lane": lane.value,
                "suspects": suspects,
                "batches": [batch for batch in given if batch],
                "quotas": [count for batch, count in given.items() if batch],
                "loose": given.get(None, 0),
                "pack": self._pack_size[lane],
                # In order, so that what was first in line is published first.
                "deliveries": sorted(new_id() for _ in range(math.ceil(sum(given.values()) / self._pack_size[lane]))),
            },
        )
        packs = [
            (delivery, [row.id for row in pack])
            for delivery, pack in groupby(sorted(rows, key=lambda row: row.delivery_id), lambda row: row.delivery_id)
        ]
        await self._send(lane, packs)
        return sum(len(ids) for _, ids in packs)

    async def _send(self, lane: Lane, packs: Sequence[tuple[UUID, list[UUID]]]) -> None:
        """Committed first, published second: a crash in between is the same as a lost message."""
        for position, (delivery, ids) in enumerate(packs):
            try:
                await asyncio.to_thread(self._publish, lane, delivery, ids)
            except Exception as error:
                # Sent or not is not known; publishing it again is harmless.
                await self._db.execute(_WITHDRAW, {"deliveries": [unsent for unsent, _ in packs[position:]]})
                raise RedisError(f"publishing failed: {type(error).__name__}") from error

    async def look_for_losses(self) -> None:
        """Messages that are neither in Redis nor with a worker are published again, as is what nobody claimed for the dispatch TTL."""
        for lane in Lane:
            empty = await self._redis.llen(queue_name(lane)) == 0
            self._empty_looks[lane] = self._empty_looks[lane] + 1 if empty else 0
            lost = self._empty_looks[lane] >= LOOKS
            after_s = min(LOST_AFTER_S, self._dispatch_ttl_s) if lost else self._dispatch_ttl_s
            withdrawn = (await self._db.execute(_WITHDRAW_LOST, {"lane": lane.value, "after_s": after_s})).rowcount
            if withdrawn:
                log.warning("published_again", why="message lost" if lost else "dispatch TTL", jobs=withdrawn, lane=lane.value)


_WINDOWS = text("""
SELECT l.name AS lane, l.paused,
    (SELECT count(*) FROM jobs j WHERE j.lane = l.name AND j.state = 'queued' AND j.dispatched_at IS NOT NULL) AS published,
    (SELECT coalesce(sum(w.slots), 0) FROM workers w WHERE w.state = 'live' AND l.name = ANY(string_to_array(w.lanes, ','))) AS slots
FROM lanes l WHERE l.name = ANY(CAST(:lanes AS text[])) ORDER BY l.name DESC
""")

# What has missed its deadline is left to `expire`: in the window it would only keep others out.
_IS_DUE = "j.state = 'queued' AND j.dispatched_at IS NULL AND j.run_at <= now() AND j.deadline_at > now()"
_IS_READY = f"j.lane = :lane AND {_IS_DUE} AND (j.deaths < 2 OR j.id = ANY(CAST(:suspects AS uuid[])))"

# Places are for those in flight, then for those whose turn it is.
_SUSPECTS = text(f"""
WITH place AS (
    SELECT j.id, j.deaths, {_IS_DUE} AS due, row_number() OVER (PARTITION BY j.deaths = 2 ORDER BY {_IS_DUE}, j.run_at, j.id) AS n
    FROM jobs j JOIN lanes l ON l.name = j.lane AND NOT l.paused
    WHERE j.deaths > 1 AND (j.state = 'running' OR j.state = 'queued' AND (j.dispatched_at IS NOT NULL OR {_IS_DUE}))
)
SELECT id FROM place WHERE due AND n <= CASE WHEN deaths = 2 THEN :suspects ELSE 1 END
""")

_READY = text(f"""
SELECT b.id, b.weight, few.ready FROM batches b CROSS JOIN LATERAL (
    SELECT count(*) AS ready FROM (SELECT FROM jobs j WHERE {_IS_READY} AND j.batch_id = b.id LIMIT :most) counted) few
WHERE b.state IN ('loading', 'open') AND few.ready > 0
UNION ALL
SELECT NULL, 1, count(*) FROM (SELECT FROM jobs j WHERE {_IS_READY} AND j.batch_id IS NULL LIMIT :most) counted HAVING count(*) > 0
ORDER BY 1
""")

_PICK = text(f"""
WITH shares AS (
    SELECT * FROM unnest(CAST(:batches AS uuid[]), CAST(:quotas AS int[])) AS t(batch_id, quota)
), first AS (
    SELECT picked.id FROM shares s CROSS JOIN LATERAL (
        SELECT j.id FROM jobs j WHERE {_IS_READY} AND j.batch_id = s.batch_id ORDER BY j.run_at, j.id LIMIT s.quota) picked
    UNION ALL
    (SELECT j.id FROM jobs j WHERE {_IS_READY} AND j.batch_id IS NULL ORDER BY j.run_at, j.id LIMIT :loose)
), locked AS (
    SELECT j.id, j.run_at FROM jobs j WHERE {_IS_READY} AND j.id = ANY(ARRAY(SELECT id FROM first))
    ORDER BY j.id FOR NO KEY UPDATE SKIP LOCKED
), pick AS (
    SELECT id, (CAST(:deliveries AS uuid[]))[CAST((row_number() OVER (ORDER BY run_at, id) - 1) / :pack + 1 AS int)] AS delivery_id
    FROM locked
)
UPDATE jobs SET dispatched_at = now(), delivery_id = pick.delivery_id FROM pick WHERE jobs.id = pick.id
RETURNING jobs.id, jobs.delivery_id
""")


def _withdraw(which: str) -> TextClause:
    """Published jobs that nobody claimed are ready again; those that are locked are just being claimed, or ended."""
    return text(f"""
WITH target AS (
    SELECT id FROM jobs WHERE state = 'queued' AND dispatched_at IS NOT NULL AND {which} ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE jobs SET dispatched_at = NULL FROM target WHERE jobs.id = target.id
""")


_WITHDRAW = _withdraw("delivery_id = ANY(CAST(:deliveries AS uuid[]))")

_WITHDRAW_ALL = _withdraw("true")

_WITHDRAW_LOST = _withdraw("""lane = :lane AND dispatched_at < now() - make_interval(secs => :after_s)
      AND delivery_id NOT IN (SELECT unnest(waiting) FROM workers WHERE state IN ('live', 'draining'))""")


async def withdraw(db: AsyncEngine, delivery_ids: Sequence[UUID]) -> None:
    """Jobs of these messages that nobody claimed are ready to be published again."""
    await run(db, _WITHDRAW, deliveries=list(delivery_ids))
