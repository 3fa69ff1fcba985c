"""Who is told when jobs and batches end: webhooks, and the log of what was sent to them. `tally` adds to it, `deliver` sends."""

from __future__ import annotations

import base64
import ipaddress
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, get_args
from urllib.parse import urlsplit
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.database import STATEMENT_S, WEBHOOK_LOCKS, promptly, run
from worker.errors import NotFound, TooMany, UsageError
from worker.job import new_id

Event = Literal["job.succeeded", "job.failed", "job.expired", "job.cancelled", "batch.finished"]
EVENTS: tuple[Event, ...] = get_args(Event)
MOST = 20  # of one tenant: the end of a job writes a row for each
LONGEST_URL = 2_000  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """`failing_since`: nothing has arrived there since then. `disabled_at`: nothing is sent there any more."""

    id: UUID
    tenant: str
    url: str
    events: Sequence[str]
    created_at: datetime
    failing_since: datetime | None
    disabled_at: datetime | None


@dataclass(frozen=True, slots=True)
class NewWebhook:
    """`secret` signs what is sent, and is shown only now."""

    secret: str = field(repr=False)
    webhook: Webhook


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One event on its way to one webhook. `subject_id`: of the job or the batch. `http_status`, `error_code`: of the last attempt."""

    id: UUID
    event: str
    subject_id: UUID
    state: Literal["pending", "delivered", "failed"]
    attempts: int
    created_at: datetime
    run_at: datetime
    ended_at: datetime | None
    http_status: int | None
    error_code: str | None


_COLUMNS = "id, tenant, url, events, created_at, failing_since, disabled_at"
_OWN = "(CAST(:tenant AS text) IS NULL OR tenant = :tenant)"

# Two who create go one after the other, so that the second counts what the first has made.
_SERIALIZE = text(f"SELECT pg_advisory_xact_lock(hashtextextended(CAST(:tenant AS text), {WEBHOOK_LOCKS}))")

_CREATE = text(f"""
INSERT INTO webhooks (id, tenant, url, events, secret)
SELECT :id, :tenant, :url, :events, :secret WHERE (SELECT count(*) FROM webhooks WHERE tenant = :tenant) < {MOST}
RETURNING {_COLUMNS}
""")


async def create(db: AsyncEngine, *, tenant: str, url: str, events: Collection[Event] = EVENTS, private: bool = False) -> NewWebhook:
    """What ends from now on is told to this URL, in events of these kinds.

    `private` allows http:// and addresses that are not on the Internet. Raises UsageError.
    """
    check_url(url, private=private)
    if not events:
        raise UsageError(f"events: name one at least of {', '.join(EVENTS)}")
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
    chosen = [event for event in EVENTS if event in events]
    values = {"id": new_id(), "tenant": tenant, "url": url, "events": chosen, "secret": secret}
    created = await promptly(_created(db, values), STATEMENT_S)
    if not created:
        raise TooMany(f"there are {MOST} webhooks already, more cannot be had: delete one first")
    return NewWebhook(secret, Webhook(**created[0]._mapping))


async def _created(db: AsyncEngine, values: Mapping[str, Any]) -> list[Any]:
    async with db.connect() as connection:
        await connection.execution_options(isolation_level="READ COMMITTED")  # each statement sees what was committed before it
        async with connection.begin():
            await connection.execute(_SERIALIZE, {"tenant": values["tenant"]})
            return list(await connection.execute(_CREATE, dict(values)))


_LIST = text(f"SELECT {_COLUMNS} FROM webhooks WHERE {_OWN} ORDER BY id DESC")


async def listed(db: AsyncEngine, tenant: str | None = None) -> list[Webhook]:
    """The tenant's, or everybody's, the newest first."""
    return [Webhook(**row._mapping) for row in await run(db, _LIST, tenant=tenant)]


_ONE = text(f"SELECT {_COLUMNS} FROM webhooks WHERE id = :id AND {_OWN}")


async def one(db: AsyncEngine, webhook_id: UUID, tenant: str | None = None) -> Webhook:
    """Raises NotFound."""
    for row in await run(db, _ONE, id=webhook_id, tenant=tenant):
        return Webhook(**row._mapping)
    raise NotFound("there is no webhook of that id")


_DELETE = text(f"""
WITH deleted AS (
    DELETE FROM webhooks WHERE id = :id AND {_OWN} RETURNING id
), log AS (
    DELETE FROM deliveries d USING deleted w WHERE d.webhook_id = w.id
)
SELECT id FROM deleted
""")


async def delete(db: AsyncEngine, webhook_id: UUID, tenant: str | None = None) -> None:
    """Nothing is sent there any more, and its log is gone. Raises NotFound."""
    if not await run(db, _DELETE, id=webhook_id, tenant=tenant):
        raise NotFound("there is no webhook of that id")


_DELIVERIES = text("""
SELECT id, event, subject_id, state, attempts, created_at, run_at, ended_at, http_status, error_code FROM deliveries
WHERE webhook_id = :webhook AND (CAST(:before AS uuid) IS NULL OR (created_at, id) < (
    SELECT created_at, id FROM deliveries WHERE id = :before AND webhook_id = :webhook))
ORDER BY created_at DESC, id DESC LIMIT :most
""")


async def deliveries(db: AsyncEngine, webhook_id: UUID, *, before: UUID | None = None, limit: int) -> list[Delivery]:
    """What was or is to be sent there, the newest first; `before` is the last id of the page before."""
    rows = await run(db, _DELIVERIES, webhook=webhook_id, before=before, most=limit)
    return [Delivery(**row._mapping) for row in rows]


_REDELIVER = text("""
UPDATE deliveries SET state = 'pending', attempts = 0, run_at = now(), ended_at = NULL WHERE id = :id AND webhook_id = :webhook
RETURNING id, event, subject_id, state, attempts, created_at, run_at, ended_at, http_status, error_code
""")


async def redeliver(db: AsyncEngine, webhook: Webhook, delivery_id: UUID) -> Delivery:
    """Sent once more under the same id, with all attempts before it. Raises NotFound, UsageError for a webhook that is disabled."""
    if webhook.disabled_at is not None:
        raise UsageError("this webhook is disabled because its endpoint failed for days or said 410: create it anew")
    for row in await run(db, _REDELIVER, id=delivery_id, webhook=webhook.id):
        return Delivery(**row._mapping)
    raise NotFound("there is no delivery of that id")


def check_url(url: str, *, private: bool) -> None:
    """Raises UsageError unless something may be sent there. Where a name leads is looked at when a connection is made."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    plain = url.isascii() and url.isprintable() and not set(url) & set(' "<>\\^`{|}')
    if not host or not plain or len(url) > LONGEST_URL or parts.username is not None or parts.password is not None or parts.fragment:
        raise UsageError("url: expected https://host/path, percent-encoded, without user, password and fragment")
    if parts.scheme != "https" and not (private and parts.scheme == "http"):
        raise UsageError("url: expected https://; http:// only where BACKSTOP_WEBHOOKS_PRIVATE=true")
    if not private and (host == "localhost" or (_is_address(host) and not is_public(host))):
        raise UsageError("url: this address is not on the Internet; set BACKSTOP_WEBHOOKS_PRIVATE=true if it is meant to be told")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that is assigned so far
_SPECIAL = tuple(  # beside what `is_global` knows, which differs by the version of Python
    map(ipaddress.ip_network, ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20"))
)  # 168.63.129.16 gives hosts at Azure their credentials
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: an IPv4 address in its last 32 bits


def is_public(address: str) -> bool:
    """Whether it is on the Internet: not this host, a private or local network, a group, or where clouds keep credentials."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF) if found in _NAT64 else found.ipv4_mapped
        if inner is None and found not in _UNICAST:
            return False
        found = inner or found
    return found.is_global and not found.is_multicast and not any(found in network for network in _SPECIAL)
