"""A batch of a file, handed in: made once, however often it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.database import FILE_BATCH_LOCKS, STATEMENT_S, jsonb, promptly, run
from worker.errors import KeyReused, TooMany
from worker.file_batches import FileBatch, one, wire_id
from worker.job import new_id

RETRY_S = 600.0  # so long after it was made, a batch is what a retry of its POST means
MOST_UNFINISHED = 1_000  # of one tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFileBatch:
    """What is asked for. `fingerprint`: the same for the same request.

    `is_retry`: the client sends this again, so a batch made from the same request in the last RETRY_S is meant.
    """

    tenant: str
    input_file_id: UUID
    completion_window: str
    window_s: float
    fingerprint: str
    output_expires_s: float | None = None
    skips_bad_lines: bool = False
    metadata: Mapping[str, str] | None = None
    idempotency_key: str | None = None
    is_retry: bool = False


# The POSTs of a tenant go one after the other, so that each sees what those before it have made.
_SERIALIZE = text(f"SELECT pg_advisory_xact_lock(hashtextextended(CAST(:tenant AS text), {FILE_BATCH_LOCKS}))")

_EARLIER = "SELECT batch_id, fingerprint FROM file_batches WHERE tenant = :tenant AND"
_OF_KEY = text(f"{_EARLIER} idempotency_key = :key")
_SENT_BEFORE = text(f"""
{_EARLIER} fingerprint = :fingerprint AND idempotency_key IS NULL AND created_at > now() - make_interval(secs => :retry_s)
ORDER BY batch_id DESC LIMIT 1
""")

_CREATE = text(f"""
WITH batch AS (
    INSERT INTO batches (id, tenant, name, state, fingerprint) SELECT :id, :tenant, :name, 'loading', :fingerprint
    WHERE (SELECT count(*) FROM file_batches WHERE tenant = :tenant
        AND state IN ('validating', 'in_progress', 'finalizing', 'cancelling')) < {MOST_UNFINISHED} RETURNING id
)
INSERT INTO file_batches (batch_id, tenant, state, input_file_id, completion_window, output_expires_s, skips_bad_lines, metadata,
    fingerprint, idempotency_key, expires_at)
SELECT id, :tenant, 'validating', :input, :window, :output_expires_s, :skips, CAST(:metadata AS jsonb), :fingerprint, :key,
    now() + make_interval(secs => :window_s)
FROM batch RETURNING batch_id
""")


async def create(db: AsyncEngine, new: NewFileBatch) -> FileBatch:
    """The batch, in `validating`; the one of before when its key was used already, or when it is asked for once more.

    That its input file is there, the caller has seen. Raises KeyReused when its idempotency key was used for another request, TooMany.
    """
    batch_id = await promptly(_created(db, new), STATEMENT_S)
    batch = await one(db, batch_id, new.tenant)
    assert batch is not None
    return batch


async def _created(db: AsyncEngine, new: NewFileBatch) -> UUID:
    async with db.connect() as connection:
        await connection.execution_options(isolation_level="READ COMMITTED")  # each statement sees what was committed before it
        async with connection.begin():
            await connection.execute(_SERIALIZE, {"tenant": new.tenant})
            statement, asked = _meant(new)
            if known := _same((await connection.execute(statement, asked)).all(), new):
                return known
            batch_id = new_id()
            if not list(await connection.execute(_CREATE, _values(batch_id, new))):
                raise TooMany(f"{MOST_UNFINISHED} of your batches have not ended: wait for some, or cancel them")
            return batch_id


async def earlier(db: AsyncEngine, new: NewFileBatch) -> FileBatch | None:
    """The batch that was made of this request before, when its key or its being a retry says that it is meant. Raises KeyReused."""
    statement, asked = _meant(new)
    batch_id = _same(await run(db, statement, **asked), new)
    return await one(db, batch_id, new.tenant) if batch_id else None


def _meant(new: NewFileBatch) -> tuple[TextClause, dict[str, Any]]:
    """What finds the batch that was made of this request before, or nothing where none can be meant."""
    if new.idempotency_key is not None:
        return _OF_KEY, {"tenant": new.tenant, "key": new.idempotency_key}
    return _SENT_BEFORE, {"tenant": new.tenant, "fingerprint": new.fingerprint, "retry_s": RETRY_S if new.is_retry else 0}


def _same(found: Sequence[Any], new: NewFileBatch) -> UUID | None:
    if not found:
        return None
    (row,) = found
    if row.fingerprint != new.fingerprint:
        raise KeyReused(f"the idempotency key was used for another request: {wire_id(row.batch_id)}; take a new key")
    return row.batch_id  # type: ignore[no-any-return]


def _values(batch_id: UUID, new: NewFileBatch) -> dict[str, Any]:
    return {
        "id": batch_id,
        "tenant": new.tenant,
        "name": wire_id(batch_id),
        "fingerprint": new.fingerprint,
        "input": new.input_file_id,
        "window": new.completion_window,
        "window_s": new.window_s,
        "output_expires_s": new.output_expires_s,
        "skips": new.skips_bad_lines,
        "metadata": jsonb(new.metadata),
        "key": new.idempotency_key,
    }
