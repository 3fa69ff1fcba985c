"""Sends what webhooks are to be told, the leader's duty. https://www.standardwebhooks.com says how it is signed.

An event may arrive twice, under the same `webhook-id`, and events may pass each other. What is sent is thin: what has ended, and how;
no prompt, no answer.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import aiohttp
import structlog
from aiohttp import AddrInfoType
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from standardwebhooks import Webhook as Signer

import worker
from worker.database import run
from worker.errors import UsageError
from worker.events import origin
from worker.file_batches import wire_id
from worker.loop import cancel_surely
from worker.webhooks import check_url, is_public

AT_ONCE = 20
EACH = 4  # of them to one webhook, so that a slow endpoint leaves room for the others
LIMIT_S = 10.0  # for an endpoint to answer
LEASE_S = 60.0  # whoever sends may have died when it is over
BACKOFF_S = (5.0, 30.0, 120.0, 600.0, 3_600.0, 21_600.0, 86_400.0)
JITTER = 0.2
POLL_S = 1.0
TIDY_S = 60.0
GONE = 410  # the endpoint wants nothing any more

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Due:
    """A delivery that is ours until its lease ends. `attempts` counts this one."""

    id: UUID
    webhook_id: UUID
    attempts: int
    url: str
    secret: str
    body: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """`error_code` is None when it has arrived. `http_status` is None when nothing was answered."""

    http_status: int | None
    error_code: str | None


async def deliver(db: AsyncEngine, *, private: bool) -> None:
    """For ever: sends what is due. `private` allows http:// and addresses that are not on the Internet. Raises DBAPIError."""
    flying: dict[asyncio.Task[None], UUID] = {}
    tidied_s = -TIDY_S
    async with _client(private) as http:
        try:
            while True:
                if time.monotonic() - tidied_s >= TIDY_S:
                    await _tidy(db)
                    tidied_s = time.monotonic()
                for due in await _claim(db, Counter(flying.values())):
                    flying[asyncio.create_task(_attempt(db, http, due, private))] = due.webhook_id
                await _one_ended(flying)
        finally:
            await cancel_surely(list(flying))


async def _one_ended(flying: dict[asyncio.Task[None], UUID]) -> None:
    """One of them at least, or POLL_S are over."""
    if not flying:
        await asyncio.sleep(POLL_S)
        return
    ended, _ = await asyncio.wait(flying, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
    for task in ended:
        del flying[task]


# The batch of a file is told once the files of its answers are there.
_CLAIM = text("""
WITH due AS (
    SELECT d.id FROM webhooks w LEFT JOIN unnest(CAST(:busy AS uuid[]), CAST(:counts AS int[])) AS b(id, n) ON b.id = w.id
    CROSS JOIN LATERAL (
        SELECT d.id, d.run_at FROM deliveries d
        WHERE d.webhook_id = w.id AND d.state = 'pending' AND d.run_at <= now() AND NOT EXISTS (
            SELECT FROM file_batches f WHERE f.batch_id = d.subject_id
            AND f.state IN ('validating', 'in_progress', 'finalizing', 'cancelling'))
        ORDER BY d.run_at LIMIT greatest(0, :each - coalesce(b.n, 0))
    ) d WHERE w.disabled_at IS NULL ORDER BY d.run_at LIMIT :room
), mine AS (
    SELECT id FROM deliveries WHERE id = ANY(ARRAY(SELECT id FROM due)) AND state = 'pending' AND run_at <= now()
    ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE deliveries d SET attempts = d.attempts + 1, run_at = now() + make_interval(secs => :lease_s)
FROM mine m, webhooks w WHERE d.id = m.id AND w.id = d.webhook_id
RETURNING d.id, d.webhook_id, d.attempts, w.url, w.secret, d.event, d.created_at, d.subject_id,
    (SELECT jsonb_build_object('batch_id', j.batch_id, 'custom_id', j.custom_id, 'chain', j.chain, 'lane', j.lane, 'metadata', j.metadata)
     FROM jobs j WHERE j.id = d.subject_id AND d.event LIKE 'job.%') AS job,
    (SELECT jsonb_build_object('name', b.name, 'total', b.total, 'succeeded', b.succeeded, 'degraded', b.degraded, 'failed', b.failed,
        'cancelled', b.cancelled, 'expired', b.expired, 'status', f.state, 'metadata', f.metadata)
     FROM batches b LEFT JOIN file_batches f ON f.batch_id = b.id WHERE b.id = d.subject_id AND d.event LIKE 'batch.%') AS batch
""")


async def _claim(db: AsyncEngine, busy: Counter[UUID]) -> list[Due]:
    room = AT_ONCE - busy.total()
    if not room:
        return []
    rows = await run(db, _CLAIM, busy=list(busy), counts=list(busy.values()), each=EACH, room=room, lease_s=LEASE_S)
    return [Due(row.id, row.webhook_id, row.attempts, row.url, row.secret, _body(row)) for row in rows]


def _body(row: Any) -> str:
    """The same at every attempt: the state is the one that was to be told, whatever became of the job since.

    The batch of a file has the id and the `status` that OpenAI's clients know; of others that is null.
    """
    of_file = row.batch is not None and row.batch["status"] is not None
    subject = wire_id(row.subject_id) if of_file else str(row.subject_id)
    data = {"id": subject, "state": row.event.partition(".")[2], **(row.job or row.batch or {})}
    body = {"type": row.event, "timestamp": row.created_at.astimezone(UTC).isoformat().replace("+00:00", "Z"), "data": data}
    return json.dumps(body, separators=(",", ":"))


async def _attempt(db: AsyncEngine, http: aiohttp.ClientSession, due: Due, private: bool) -> None:
    """Sent, and noted what came of it. What cannot be noted is sent again when its lease is over."""
    try:
        await _note(db, due, await send(http, due, private=private))
    except DBAPIError as error:
        log.warning("delivery_not_noted", error=type(error.orig).__name__)
    except Exception as error:  # the trouble of one is not that of the others
        log.warning("delivery_failed", delivery_id=str(due.id), error=type(error).__name__, origin=origin(error))


class NotPublic(OSError):
    """The address that a name led to is none to be told anything."""


def _public_socket(address: AddrInfoType) -> socket.socket:
    """Made for the very address that is connected to next: no name can lead elsewhere in between."""
    family, kind, protocol, _, place = address
    if not is_public(str(place[0])):
        raise NotPublic
    return socket.socket(family, kind, protocol)


def _client(private: bool) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=AT_ONCE, socket_factory=None if private else _public_socket),
        timeout=aiohttp.ClientTimeout(total=LIMIT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": f"backstop/{worker.__version__}"},
        auto_decompress=False,
    )


async def send(http: aiohttp.ClientSession, due: Due, *, private: bool) -> Outcome:
    """What the endpoint said by its status; no more of its answer is read than came along with that."""
    now = datetime.now(UTC)
    headers = {
        "Content-Type": "application/json",
        "webhook-id": str(due.id),
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Signer(due.secret).sign(str(due.id), now, due.body),
    }
    try:
        check_url(due.url, private=private)  # the setting may have changed since
        async with http.post(due.url, data=due.body.encode(), headers=headers, allow_redirects=False) as response:
            status = response.status
            return Outcome(status, None if 200 <= status < 300 else f"http_{status}")
    except (UsageError, aiohttp.InvalidURL):
        return Outcome(None, "url_not_allowed")
    except TimeoutError:
        return Outcome(None, "timeout")
    except aiohttp.ClientConnectorCertificateError:
        return Outcome(None, "certificate")
    except aiohttp.ClientConnectorError as error:
        return Outcome(None, "address_not_allowed" if isinstance(error.os_error, NotPublic) else "unreachable")
    except (aiohttp.ClientError, OSError):
        return Outcome(None, "broken_off")


# Disabled once a delivery that used up all of its attempts, over a day, ends five days of nothing but failures: one attempt that
# fails after days without an event is none of that.
_NOTE = text("""
WITH noted AS (
    UPDATE deliveries SET state = :state, ended_at = CASE WHEN :state <> 'pending' THEN now() END,
        run_at = now() + make_interval(secs => :again_s), http_status = :http_status, error_code = :error_code
    WHERE id = :id AND state = 'pending' AND attempts = :attempts RETURNING webhook_id
)
UPDATE webhooks w SET
    failing_since = CASE WHEN :state = 'delivered' THEN NULL ELSE coalesce(w.failing_since, now()) END,
    disabled_at = CASE WHEN :gone OR :state = 'failed' AND w.failing_since < now() - interval '5 days' THEN now() END
FROM noted n WHERE w.id = n.webhook_id AND w.disabled_at IS NULL AND (:state <> 'delivered' OR w.failing_since IS NOT NULL)
RETURNING w.id, w.disabled_at
""")


async def _note(db: AsyncEngine, due: Due, outcome: Outcome) -> None:
    gone, again_s = outcome.http_status == GONE, 0.0
    state = "delivered" if outcome.error_code is None else "failed"
    if outcome.error_code is not None and not gone and due.attempts <= len(BACKOFF_S):
        state, again_s = "pending", BACKOFF_S[due.attempts - 1] * random.uniform(1 - JITTER, 1 + JITTER)
    values: dict[str, Any] = {"id": due.id, "attempts": due.attempts, "state": state, "again_s": again_s, "gone": gone}
    for row in await run(db, _NOTE, http_status=outcome.http_status, error_code=outcome.error_code, **values):
        if row.disabled_at is not None:
            log.warning("webhook_disabled", webhook_id=str(row.id), http_status=outcome.http_status, error_code=outcome.error_code)


# A webhook that is gone is told nothing more, nor one that is disabled.
_TIDY = text("""
WITH dropped AS (
    UPDATE deliveries SET state = 'failed', ended_at = now(), error_code = 'webhook_disabled' WHERE id IN (
        SELECT d.id FROM deliveries d WHERE d.state = 'pending'
            AND NOT EXISTS (SELECT FROM webhooks w WHERE w.id = d.webhook_id AND w.disabled_at IS NULL)
        ORDER BY d.id LIMIT :most FOR NO KEY UPDATE SKIP LOCKED)
    RETURNING id
), purged AS (
    DELETE FROM deliveries WHERE id IN (
        SELECT id FROM deliveries WHERE ended_at < now() - interval '30 days' ORDER BY id LIMIT :most FOR UPDATE SKIP LOCKED)
    RETURNING id
)
SELECT (SELECT count(*) FROM dropped) AS dropped, (SELECT count(*) FROM purged) AS purged
""")


async def _tidy(db: AsyncEngine, most: int = 10_000) -> None:
    """What ended 30 days ago is gone, and what nobody is to be told any more has failed."""
    while True:
        (row,) = await run(db, _TIDY, most=most)
        if max(row.dropped, row.purged) < most:
            return
