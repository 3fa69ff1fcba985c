"""Files that clients uploaded and that batches wrote, kept in Postgres in pieces: none is ever whole in memory.

Where `tenant` is given, files of others do not exist, nor do those that are still uploaded or have passed their time.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.database import run
from worker.errors import NotFound, UsageError
from worker.job import new_id

PIECE_BYTES = 1 << 20
UPLOAD_S = 21_600  # an upload that takes longer was abandoned
_PURGED = 100  # files in one round

Purpose = Literal["batch", "batch_output"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileView:
    """A whole file. `expires_at` None: kept until it is deleted."""

    id: UUID
    purpose: Purpose
    filename: str
    bytes: int
    created_at: datetime
    expires_at: datetime | None

    @property
    def wire_id(self) -> str:
        return wire_id(self.id)


def wire_id(file_id: UUID) -> str:
    """The id as OpenAI's clients see it."""
    return f"file-{file_id.hex}"


def from_wire(spelled: str) -> UUID | None:
    """The id that was spelled so, or None."""
    return UUID(spelled[5:]) if re.fullmatch(r"file-[0-9a-f]{32}", spelled) else None


_BEGIN = text("INSERT INTO files (id, tenant, purpose, filename, state) VALUES (:id, :tenant, :purpose, :filename, 'uploading')")

_ADD = text("""
WITH file AS (
    UPDATE files SET bytes = bytes + :size WHERE id = :id AND state = 'uploading' RETURNING id
)
INSERT INTO file_chunks (file_id, seq, data) SELECT id, :seq, :data FROM file RETURNING seq
""")

_FINISH = text("""
UPDATE files SET state = 'ready', purpose = :purpose, filename = :filename, expires_at = now() + make_interval(secs => :expires_s)
WHERE id = :id AND state = 'uploading' RETURNING id, purpose, filename, bytes, created_at, expires_at
""")

_DISCARD = text("DELETE FROM files WHERE id = :id AND state = 'uploading'")


class Upload:
    """A file that is being written: nobody sees it before it is `finish`ed, or made ready along with what it belongs to."""

    def __init__(self, db: AsyncEngine, file_id: UUID) -> None:
        self._db = db
        self._buffer = bytearray()
        self._pieces = 0
        self.id = file_id
        self.bytes = 0

    async def write(self, data: bytes) -> None:
        """Takes the bytes; they are stored a piece at a time. Raises UsageError when the upload took longer than UPLOAD_S."""
        self._buffer += data
        self.bytes += len(data)
        while len(self._buffer) >= PIECE_BYTES:
            await self._store(PIECE_BYTES)

    async def flush(self) -> None:
        """All that was written is stored."""
        if self._buffer:
            await self._store(len(self._buffer))

    async def finish(self, *, purpose: Purpose, filename: str, expires_s: float | None) -> FileView:
        """The file is there for its tenant, for `expires_s` from now or, with None, until it is deleted. Raises UsageError as `write`."""
        await self.flush()
        rows = await run(self._db, _FINISH, id=self.id, purpose=purpose, filename=filename, expires_s=expires_s)
        if not rows:
            raise _took_too_long()
        return _view(rows[0])

    async def _store(self, size: int) -> None:
        piece = bytes(self._buffer[:size])
        if not await run(self._db, _ADD, id=self.id, seq=self._pieces, size=size, data=piece):
            raise _took_too_long()
        del self._buffer[:size]
        self._pieces += 1


def _took_too_long() -> UsageError:
    return UsageError(f"the upload took longer than {UPLOAD_S // 3600} hours: send the file again")


@asynccontextmanager
async def uploading(db: AsyncEngine, tenant: str, *, purpose: Purpose = "batch", filename: str = "") -> AsyncIterator[Upload]:
    """A new file to be written. What was not made ready by the end of the block leaves nothing behind."""
    upload = Upload(db, new_id())
    await run(db, _BEGIN, id=upload.id, tenant=tenant, purpose=purpose, filename=filename)
    try:
        yield upload
    finally:
        await run(db, _DISCARD, id=upload.id)


_THERE = "tenant = :tenant AND state = 'ready' AND (expires_at IS NULL OR expires_at > now())"

_FILE = f"SELECT id, purpose, filename, bytes, created_at, expires_at FROM files WHERE {_THERE}"

_ONE = text(f"{_FILE} AND id = :id")


async def one(db: AsyncEngine, file_id: UUID, tenant: str) -> FileView | None:
    """The tenant's file of that id, or None."""
    rows = await run(db, _ONE, id=file_id, tenant=tenant)
    return _view(rows[0]) if rows else None


async def listed(
    db: AsyncEngine,
    tenant: str,
    *,
    limit: int,
    purpose: str | None = None,
    after: UUID | None = None,
    oldest_first: bool = False,
) -> list[FileView]:
    """Up to `limit` files, newest first. The next page is `after` the last id of this one."""
    where = (" AND purpose = :purpose" if purpose is not None else "") + (f" AND id {'>' if oldest_first else '<'} :after" if after else "")
    values: dict[str, Any] = {name: value for name, value in (("purpose", purpose), ("after", after)) if value is not None}
    sql = f"{_FILE}{where} ORDER BY id {'ASC' if oldest_first else 'DESC'} LIMIT :limit"
    return [_view(row) for row in await run(db, text(sql), tenant=tenant, limit=limit, **values)]


def _view(row: Any) -> FileView:
    return FileView(**row._mapping)


_STORED = text("SELECT coalesce(sum(bytes), 0)::bigint AS bytes FROM files WHERE tenant = :tenant")


async def stored(db: AsyncEngine, tenant: str) -> int:
    """Bytes of all the tenant's files, what is still uploaded and what has yet to be purged included."""
    (row,) = await run(db, _STORED, tenant=tenant)
    return int(row.bytes)


_PIECE = text("SELECT data FROM file_chunks WHERE file_id = :id AND seq = :seq")


async def pieces(db: AsyncEngine, file: FileView) -> AsyncGenerator[bytes, None]:
    """The content, up to PIECE_BYTES at a time. Raises NotFound when it is deleted meanwhile."""
    seq, left = 0, file.bytes
    while left > 0:
        rows = await run(db, _PIECE, id=file.id, seq=seq)
        if not rows:
            raise NotFound(f"file {file.wire_id} was deleted while it was read")
        yield rows[0].data
        seq, left = seq + 1, left - len(rows[0].data)


_DELETE = text(f"DELETE FROM files WHERE {_THERE} AND id = :id RETURNING id")


async def delete(db: AsyncEngine, file_id: UUID, tenant: str) -> bool:
    """The file is gone; False when there was none of that id in the tenant."""
    return bool(await run(db, _DELETE, id=file_id, tenant=tenant))


_PURGE = text("""
DELETE FROM files WHERE id IN (
    SELECT id FROM files WHERE expires_at <= now()
    UNION ALL SELECT id FROM files WHERE state = 'uploading' AND created_at < now() - make_interval(secs => :upload_s)
    LIMIT :most
) RETURNING id
""")


async def purge(db: AsyncEngine) -> int:
    """Files past their time, and uploads that broke off without a word, are gone: so many, 100 at most."""
    return len(await run(db, _PURGE, upload_s=UPLOAD_S, most=_PURGED))
