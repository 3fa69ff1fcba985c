"""API keys: shown once when created, kept as a SHA-256 hash. 256 random bits need no salt and no slow hash.

Every request asks the database, one lookup by unique index, so a revoked key is refused from the next request on. How long the
lookup takes may tell how a stranger's hash compares with those that are kept; nobody can choose a key by its hash, so it helps nobody.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.database import run
from worker.errors import NotFound, UsageError
from worker.job import new_id

MARK = "backstop_sk_"
MOST_RPM = 1_000_000
_SHOWN = len(MARK) + 6


class Scope(StrEnum):
    """What a key may do."""

    SUBMIT = "submit"  # jobs, batches and files in, and take them back: cancel, delete
    READ = "read"  # whatever is its tenant's
    OPERATE = "operate"  # where answers are sent, and whom all tenants ask: webhooks, breakers


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request comes from. What it may see is its tenant's. `rpm`: requests it may make a minute; None: as many as it likes."""

    key_id: UUID
    tenant: str
    name: str
    scopes: frozenset[Scope] = frozenset(Scope)
    rpm: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key as it may be shown. `scopes` are as they stand there, also those that this version does not know."""

    id: UUID
    tenant: str
    name: str
    prefix: str
    scopes: Sequence[str]
    rpm: int | None
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class NewKey:
    """`secret` is the key itself and exists nowhere else."""

    secret: str = field(repr=False)
    key: Key


_COLUMNS = "id, tenant, name, prefix, scopes, rpm, created_at, last_used_at, revoked_at"
_CREATE = text(f"""
INSERT INTO api_keys (id, tenant, name, prefix, hash, scopes, rpm) VALUES (:id, :tenant, :name, :prefix, :hash, :scopes, :rpm)
RETURNING {_COLUMNS}
""")


async def create(
    db: AsyncEngine, *, name: str, tenant: str = "default", scopes: Collection[Scope] = tuple(Scope), rpm: int | None = None
) -> NewKey:
    """A new key that works from now on. Raises UsageError when it cannot be made like this."""
    check_name("name of a key", name)
    check_name("tenant of a key", tenant)
    if not scopes:
        raise UsageError(f"scopes of a key: give it one at least of {', '.join(Scope)}")
    if rpm is not None and not 1 <= rpm <= MOST_RPM:
        raise UsageError(f"rpm of a key: expected 1 to {MOST_RPM} requests a minute, or none for no limit")
    secret = MARK + secrets.token_urlsafe(32)
    values: dict[str, Any] = {
        "id": new_id(),
        "tenant": tenant,
        "name": name,
        "prefix": secret[:_SHOWN],
        "hash": _hash(secret),
        "scopes": [scope.value for scope in Scope if scope in scopes],
        "rpm": rpm,
    }
    (row,) = await run(db, _CREATE, **values)
    return NewKey(secret, Key(**row._mapping))


def check_name(what: str, given: str) -> str:
    """The name, of a key or a tenant. Raises UsageError when it can be none."""
    if not isinstance(given, str) or not given.strip() or len(given) > 100 or not given.isprintable():
        raise UsageError(f"{what}: give it 1 to 100 printable characters")
    return given


async def list(db: AsyncEngine) -> Sequence[Key]:
    """All keys, the newest first, revoked ones included."""
    rows = await run(db, text(f"SELECT {_COLUMNS} FROM api_keys ORDER BY created_at DESC, id DESC"))
    return [Key(**row._mapping) for row in rows]


async def revoke(db: AsyncEngine, which: str) -> Key:
    """The key of that id, prefix or name is refused from now on.

    Raises NotFound when no key that still works is called so, UsageError when several are.
    """
    found = [key for key in await list(db) if key.revoked_at is None and which in (str(key.id), key.prefix, key.name)]
    if not found:
        raise NotFound(f"no working key {which[:100]!r}: see `backstop keys list`")
    if len(found) > 1:
        raise UsageError(f"{len(found)} keys are called {which[:100]!r}: revoke by id, see `backstop keys list`")
    sql = f"UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = :id RETURNING {_COLUMNS}"
    (row,) = await run(db, text(sql), id=found[0].id)
    return Key(**row._mapping)


# Most requests write nothing: the time of last use is kept to the minute.
_VERIFY = text("""
WITH stale AS (  -- who finds a row locked leaves it to the other
    SELECT id FROM api_keys
    WHERE hash = ANY(CAST(:hashes AS bytea[])) AND revoked_at IS NULL
      AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute')
    ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
), used AS (
    UPDATE api_keys k SET last_used_at = now() FROM stale s WHERE k.id = s.id
)
SELECT id, tenant, name, hash, scopes, rpm FROM api_keys WHERE hash = ANY(CAST(:hashes AS bytea[])) AND revoked_at IS NULL
""")


async def verify(db: AsyncEngine, secret: str) -> Caller | None:
    """Who holds this key, or None when it is unknown or revoked."""
    return (await verify_all(db, [secret]))[0]


async def verify_all(db: AsyncEngine, asked: Sequence[str]) -> Sequence[Caller | None]:
    """Who holds each of these keys, None for those that are unknown or revoked; one round trip, or none."""
    digests = [_hash(secret) if secret.startswith(MARK) else None for secret in asked]
    hashes = {digest for digest in digests if digest}
    if not hashes:
        return [None] * len(asked)
    rows = await run(db, _VERIFY, hashes=[*hashes])
    return [next((_caller(row) for row in rows if digest and hmac.compare_digest(row.hash, digest)), None) for digest in digests]


def _caller(row: Row[Any]) -> Caller:
    # A scope that a newer version has written allows nothing here.
    return Caller(row.id, row.tenant, row.name, frozenset(scope for scope in Scope if scope in row.scopes), row.rpm)


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
