"""Batches as OpenAI's clients know them: what they have besides a batch of ours, and the way they go.

validating → in_progress → finalizing → completed | expired; validating → failed; validating | in_progress → cancelling → cancelled.
`intake` takes them along. Each step is one guarded statement, so that it happens once whoever is at it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import intervene
from worker.database import STATEMENT_S, jsonb, promptly, run
from worker.errors import BackstopError
from worker.job import new_id
from worker.tally import TOLD

MOST_UNFINISHED = 1_000  # of one tenant
RETRY_S = 600.0  # so long after it was made, a batch is what a retry of its POST means


@dataclass(frozen=True, slots=True, kw_only=True)
class FileBatch:
    """One row of `file_batches` with the counters of its batch. `loaded`: that one's state, loading, open or finished.

    `remaining_s`: to its `expires_at`, by the database's clock. `usage`: tokens of what was answered, once it is over.
    """

    batch_id: UUID
    tenant: str
    state: str
    loaded: str
    input_file_id: UUID
    output_file_id: UUID | None
    error_file_id: UUID | None
    completion_window: str
    output_expires_s: float | None
    skips_bad_lines: bool
    metadata: dict[str, str] | None
    errors: list[dict[str, Any]] | None
    usage: dict[str, int] | None
    total: int
    succeeded: int
    failed: int
    cancelled: int
    expired: int
    remaining_s: float
    created_at: datetime
    expires_at: datetime
    in_progress_at: datetime | None
    finalizing_at: datetime | None
    completed_at: datetime | None
    failed_at: datetime | None
    expired_at: datetime | None
    cancelling_at: datetime | None
    cancelled_at: datetime | None

    @property
    def wire_id(self) -> str:
        return wire_id(self.batch_id)


def wire_id(batch_id: UUID) -> str:
    """The id as OpenAI's clients see it; the batch's name as well."""
    return f"batch_{batch_id.hex}"


def from_wire(spelled: str) -> UUID | None:
    """The id that was spelled so, or None."""
    return UUID(spelled[6:]) if re.fullmatch(r"batch_[0-9a-f]{32}", spelled) else None


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


class KeyReused(BackstopError):
    """The idempotency key belongs to another request."""


class TooMany(BackstopError):
    """MOST_UNFINISHED batches of the tenant have not ended."""


# The POSTs of a tenant go one after the other, so that each sees what those before it have made.
_SERIALIZE = text("SELECT pg_advisory_xact_lock(hashtextextended(CAST(:tenant AS text), 0))")

_EARLIER = text("""
SELECT batch_id, fingerprint FROM file_batches WHERE tenant = :tenant AND CASE
    WHEN CAST(:key AS text) IS NOT NULL THEN idempotency_key = :key
    ELSE fingerprint = :fingerprint AND idempotency_key IS NULL AND created_at > now() - make_interval(secs => :retry_s) END
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
            key = new.idempotency_key
            await connection.execute(_SERIALIZE, {"tenant": new.tenant})
            if key is not None or new.is_retry:
                asked = {"tenant": new.tenant, "key": key, "fingerprint": new.fingerprint, "retry_s": RETRY_S}
                for row in await connection.execute(_EARLIER, asked):
                    if row.fingerprint != new.fingerprint:
                        raise KeyReused(f"the idempotency key was used for another request: {wire_id(row.batch_id)}; take a new key")
                    return row.batch_id  # type: ignore[no-any-return]
            batch_id = new_id()
            if not list(await connection.execute(_CREATE, _values(batch_id, new))):
                raise TooMany(f"{MOST_UNFINISHED} of your batches have not ended: wait for some, or cancel them")
            return batch_id


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


_BATCH = """
SELECT f.batch_id, f.tenant, f.state, b.state AS loaded, f.input_file_id, f.output_file_id, f.error_file_id, f.completion_window,
    f.output_expires_s, f.skips_bad_lines, f.metadata, f.errors, f.usage, b.total, b.succeeded, b.failed, b.cancelled, b.expired,
    extract(epoch FROM f.expires_at - now())::float8 AS remaining_s, f.created_at, f.expires_at, f.in_progress_at, f.finalizing_at,
    f.completed_at, f.failed_at, f.expired_at, f.cancelling_at, f.cancelled_at
FROM file_batches f JOIN batches b ON b.id = f.batch_id
"""

_ONE = text(f"{_BATCH} WHERE f.batch_id = :id AND (CAST(:tenant AS text) IS NULL OR f.tenant = :tenant)")


async def one(db: AsyncEngine, batch_id: UUID, tenant: str | None = None) -> FileBatch | None:
    """The batch of that id, of the tenant if it is given, or None."""
    rows = await run(db, _ONE, id=batch_id, tenant=tenant)
    return _view(rows[0]) if rows else None


async def listed(db: AsyncEngine, tenant: str, *, limit: int, after: UUID | None = None) -> list[FileBatch]:
    """Up to `limit` batches, newest first. The next page is `after` the last id of this one."""
    where = "WHERE f.tenant = :tenant AND (CAST(:after AS uuid) IS NULL OR f.batch_id < :after)"
    found = await run(db, text(f"{_BATCH} {where} ORDER BY f.batch_id DESC LIMIT :limit"), tenant=tenant, after=after, limit=limit)
    return [_view(row) for row in found]


# An open batch in progress waits for its jobs, not for us. The smallest first: it is not to wait for a large one.
_UNFINISHED = text("""
SELECT f.batch_id FROM file_batches f JOIN batches b ON b.id = f.batch_id LEFT JOIN files i ON i.id = f.input_file_id
WHERE f.state IN ('validating', 'finalizing', 'cancelling') OR f.state = 'in_progress' AND b.state IN ('loading', 'finished')
ORDER BY i.bytes NULLS FIRST, f.batch_id
""")


async def unfinished(db: AsyncEngine) -> list[UUID]:
    """The batches that can be taken a step further, or whose jobs are to be cancelled."""
    return [row.batch_id for row in await run(db, _UNFINISHED)]


def _view(row: Any) -> FileBatch:
    return FileBatch(**row._mapping)


_CANCEL = text("""
UPDATE file_batches SET state = 'cancelling', cancelling_at = now(), errors = coalesce(CAST(:errors AS jsonb), errors)
WHERE batch_id = :id AND state IN ('validating', 'in_progress') RETURNING batch_id
""")


async def cancel(db: AsyncEngine, batch_id: UUID, errors: Sequence[Mapping[str, Any]] | None = None) -> bool:
    """The batch is `cancelling`, and `cancelled` once its last job has ended; what was answered is kept. False when it was over.

    `errors` says why, when nobody asked for it.
    """
    cancelled = await run(db, _CANCEL, id=batch_id, errors=jsonb(errors))
    if cancelled:
        await intervene.cancel(db, batch_id=batch_id)
    return bool(cancelled)


_ENDED = "EXISTS (SELECT FROM batches b WHERE b.id = :id AND b.state = 'finished')"  # and none of its jobs was requeued since

_VALIDATED = text("""
UPDATE file_batches SET state = 'in_progress', in_progress_at = now() WHERE batch_id = :id AND state = 'validating' RETURNING batch_id
""")
_FINALIZING = text(f"""
UPDATE file_batches SET state = 'finalizing', finalizing_at = now() WHERE batch_id = :id AND state = 'in_progress' AND {_ENDED}
RETURNING batch_id
""")

_FAILED = text(f"""
WITH failed AS (
    UPDATE file_batches SET state = 'failed', failed_at = now(), errors = CAST(:errors AS jsonb)
    WHERE batch_id = :id AND state = 'validating' RETURNING batch_id
), closed AS (
    UPDATE batches b SET state = 'finished', finished_at = now() FROM failed f WHERE b.id = f.batch_id AND b.state = 'loading'
    RETURNING b.id, b.tenant
), news AS (
    SELECT tenant, 'batch.finished' AS event, id AS subject_id FROM closed
), {TOLD}
SELECT id FROM closed
""")


async def validated(db: AsyncEngine, batch_id: UUID) -> None:
    """Its lines may be submitted."""
    await run(db, _VALIDATED, id=batch_id)


async def failed(db: AsyncEngine, batch_id: UUID, errors: Sequence[Mapping[str, Any]]) -> None:
    """It is over and nothing of it was run, because of `errors`: [{"code", "line", "message", "param"}]."""
    await run(db, _FAILED, id=batch_id, errors=jsonb(errors))


async def finalizing(db: AsyncEngine, batch_id: UUID) -> None:
    """All of its jobs have ended; what they said is to be written down."""
    await run(db, _FINALIZING, id=batch_id)


# The files and the state together, or nothing: a file that was purged meanwhile is written anew.
_END = f"""
WITH written AS (
    SELECT count(*) AS files FROM files WHERE id IN (:output, :errors) AND state = 'uploading'
), ended AS (
    UPDATE file_batches SET state = '{{state}}', {{state}}_at = now(), output_file_id = :output, error_file_id = :errors,
        usage = CAST(:usage AS jsonb)
    FROM written WHERE batch_id = :id AND state IN ('finalizing', 'cancelling') AND written.files = :files AND {_ENDED}
    RETURNING output_expires_s
)
UPDATE files f SET state = 'ready', expires_at = now() + make_interval(secs => e.output_expires_s)
FROM ended e WHERE f.id IN (:output, :errors)
"""
_ENDS = {state: text(_END.format(state=state)) for state in ("completed", "expired", "cancelled")}


async def ended(db: AsyncEngine, batch: FileBatch, output: UUID | None, errors: UUID | None, usage: Mapping[str, int]) -> None:
    """The batch is over, and its files, which were still being uploaded, are there; unless somebody else did that first."""
    reached = "expired" if batch.expired else "completed"  # the jobs' deadline is the end of its window
    state = "cancelled" if batch.state == "cancelling" else reached
    files = len([file for file in (output, errors) if file])
    await run(db, _ENDS[state], id=batch.batch_id, output=output, errors=errors, files=files, usage=jsonb(usage))
