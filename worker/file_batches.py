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
from worker.database import jsonb, run
from worker.tally import TOLD


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
    where = "WHERE f.tenant = :tenant" + (" AND f.batch_id < :after" if after else "")
    page: dict[str, Any] = {"tenant": tenant, "limit": limit} | ({"after": after} if after else {})
    return [_view(row) for row in await run(db, text(f"{_BATCH} {where} ORDER BY f.batch_id DESC LIMIT :limit"), **page)]


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
