"""API keys: shown once when created, kept as a SHA-256 hash. 256 random bits need no salt and no slow hash.

Every request asks the database, one lookup by unique index, so a revoked key is refused from the next request on.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.errors import NotFound, UsageError
from worker.job import new_id

MARK = "backstop_sk_"
_SHOWN = len(MARK) + 6


class Scope(StrEnum):
    """What a key may do."""

    SUBMIT = "submit"  # jobs, batches and files in, and take them back: cancel, delete
    READ = "read"  # whatever is its tenant's
    OPERATE = "operate"  # what concerns others as well: breakers, webhooks, requeues


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request comes from. What it may see is its tenant's."""

    key_id: UUID
    tenant: str
    name: str
    scopes: frozenset[Scope] = frozenset(Scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key as it may be shown."""

    id: UUID
    tenant: str
    name: str
    prefix: str
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class NewKey:
    """`secret` is the key itself and exists nowhere else."""

    secret: str = field(repr=False)
    key: Key


_COLUMNS = "id, tenant, name, prefix, created_at, last_used_at, revoked_at"


async def create(db: AsyncEngine, *, name: str, tenant: str = "default") -> NewKey:
    """A new key that works from now on. Raises UsageError when the name or the tenant cannot be used."""
    for what, value in (("name", name), ("tenant", tenant)):
        if not value.strip() or len(value) > 100 or not value.isprintable():
            raise UsageError(f"{what} of a key: give it 1 to 100 printable characters")
    secret = MARK + secrets.token_urlsafe(32)
    sql = f"""
    INSERT INTO api_keys (id, tenant, name, prefix, hash) VALUES (:id, :tenant, :name, :prefix, :hash)
    RETURNING {_COLUMNS}
    """
    values = {"id": new_id(), "tenant": tenant, "name": name, "prefix": secret[:_SHOWN], "hash": _hash(secret)}
    async with db.connect() as connection:
        row = (await connection.execute(text(sql), values)).mappings().one()
    return NewKey(secret, Key(**row))


async def list(db: AsyncEngine) -> Sequence[Key]:
    """All keys, the newest first, revoked ones included."""
    async with db.connect() as connection:
        rows = await connection.execute(text(f"SELECT {_COLUMNS} FROM api_keys ORDER BY created_at DESC, id DESC"))
        return [Key(**row) for row in rows.mappings()]


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
    async with db.connect() as connection:
        return Key(**(await connection.execute(text(sql), {"id": found[0].id})).mappings().one())


# Most requests write nothing: the time of last use is kept to the minute.
_VERIFY = text("""
WITH found AS (
    SELECT id, tenant, name, hash, scopes, last_used_at FROM api_keys WHERE hash = :hash AND revoked_at IS NULL
), used AS (
    UPDATE api_keys k SET last_used_at = now() FROM found f
    WHERE k.id = f.id AND (f.last_used_at IS NULL OR f.last_used_at < now() - interval '1 minute')
)
SELECT id, tenant, name, hash, scopes FROM found
""")


async def verify(db: AsyncEngine, secret: str) -> Caller | None:
    """Who holds this key, or None when it is unknown or revoked."""
    if not secret.startswith(MARK):
        return None
    digest = _hash(secret)
    async with db.connect() as connection:
        row = (await connection.execute(_VERIFY, {"hash": digest})).one_or_none()
    if row is None or not hmac.compare_digest(row.hash, digest):
        return None
    return Caller(row.id, row.tenant, row.name, frozenset(map(Scope, row.scopes)))


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
