"""Takes the batches of files along: their lines are checked, submitted as jobs, and what came of them is written down.

The leader's duty. It may die between any two statements, and two may be at it at once: what one has done, the other
finds done. No file is ever whole in memory.
"""

from __future__ import annotations

import asyncio
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import file_batches, files, intervene, reads
from worker.batchlines import parse
from worker.config import Config
from worker.database import INTAKE_LOCKS
from worker.errors import NotFound, UsageError
from worker.events import origin
from worker.export import ExportRow, file_line
from worker.file_batches import FileBatch
from worker.submit import Batch, Row, add_rows, close_batch
from worker.tickets import json_object

MOST_LINES = 50_000  # https://platform.openai.com/docs/guides/batch, as is the size of a file
LONGEST_LINE = 1 << 20  # bytes
MOST_ERRORS = 100
PAGE = 200  # answers in memory at once

_FIELD = re.compile(r"([\w.\[\]]{1,200}): ")

log = structlog.get_logger(__name__)


async def tend(db: AsyncEngine, config: Config) -> None:
    """One round: every batch is as far as it can get by now, and files past their time are gone.

    Several may run side by side: then a large file holds up nobody. Raises DBAPIError without Postgres.
    """
    for batch_id in await file_batches.unfinished(db):
        async with _alone(db, batch_id) as alone:
            if not alone:
                continue
            try:
                await _advance(db, config, batch_id)
                _troubles.pop(batch_id, None)
            except Exception as error:  # the trouble of one batch is not that of the others
                _warn(batch_id, type(error).__name__, origin(error))
    await files.purge(db)


_troubles: dict[UUID, tuple[str, int]] = {}  # what a batch has met in this process, and how often in a row


def _warn(batch_id: UUID, error: str, where: str) -> None:
    """The same trouble is logged the first, second, fourth time and so on."""
    before, times = _troubles.get(batch_id, ("", 0))
    times = times + 1 if before == error + where else 1
    _troubles[batch_id] = error + where, times
    if times & (times - 1) == 0:
        log.warning("intake_failed", batch_id=str(batch_id), error=error, origin=where, times=times)


# Only saves work: should it be lost along with its connection, each step is guarded by itself.
_LOCK = text(f"SELECT pg_try_advisory_xact_lock(hashtextextended(CAST(:id AS text), {INTAKE_LOCKS}))")


@asynccontextmanager
async def _alone(db: AsyncEngine, batch_id: UUID) -> AsyncIterator[bool]:
    """Whether nobody else is at this batch, nor will be until the end of the block."""
    async with db.connect() as connection:
        await connection.execution_options(isolation_level="READ COMMITTED")
        async with connection.begin():
            yield (await connection.execute(_LOCK, {"id": str(batch_id)})).scalar_one()


async def _advance(db: AsyncEngine, config: Config, batch_id: UUID) -> None:
    """Step by step, until it stays where it is."""
    before = None
    while (batch := await file_batches.one(db, batch_id)) and (batch.state, batch.loaded) != before:
        before = batch.state, batch.loaded
        match before:
            case ("validating", "loading"):
                await _validate(db, config, batch)
            case ("validating", _):  # an operator cancelled it
                await file_batches.cancel(db, batch_id)
            case ("in_progress", "loading"):
                await _load(db, config, batch)
            case ("in_progress", "finished"):
                await file_batches.finalizing(db, batch_id)
            case ("cancelling", "loading" | "open"):
                await intervene.cancel(db, batch_id=batch_id)
            case ("cancelling" | "finalizing", "finished"):
                await _finish(db, batch)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the file as the row it becomes. `code` says what is wrong with it, None that it can be sent."""

    row: Row
    code: str | None = None

    def error(self) -> dict[str, Any]:
        """As the batch's `errors` have it."""
        message = self.row.problem or ""
        field = _FIELD.match(message)
        return {"code": self.code, "line": self.row.ordinal, "message": message, "param": field and field[1]}


class Lines:
    """The lines of a file that comes in pieces, each checked. Blank ones are passed over, but counted in `ordinal`.

    Raises UsageError at the line that is one too many.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._begun = bytearray()  # a line whose end is not there yet, as far as it may be used
        self._ordinal = 0
        self._seen: set[bytes] = set()
        self.count = 0

    def feed(self, piece: bytes) -> list[Line]:
        """Those that end in this piece."""
        *whole, rest = piece.split(b"\n")
        lines = list(self._checked(whole))
        self._extend(rest)
        return lines

    def end(self) -> list[Line]:
        """The last one, if it has no end of its own."""
        return list(self._checked([b""]))

    def _extend(self, part: bytes) -> None:
        self._begun += part[: LONGEST_LINE + 1 - len(self._begun)]

    def _checked(self, ends: Iterable[bytes]) -> Iterator[Line]:
        for end in ends:
            self._extend(end)
            line, self._begun = bytes(self._begun), bytearray()
            self._ordinal += 1
            if self._ordinal == 1:
                line = line.removeprefix(BOM_UTF8)
            if line.strip():
                self.count += 1
                if self.count > MOST_LINES:
                    raise UsageError(f"the file has more than {MOST_LINES} lines: make several batches of it")
                yield self._check(line)

    def _check(self, line: bytes) -> Line:
        if len(line) > LONGEST_LINE:
            return self._bad("line_too_long", f"the line has more than {LONGEST_LINE} bytes")
        try:
            body = json_object(line.decode())
        except UnicodeDecodeError as error:
            return self._bad("invalid_json_line", f"not UTF-8: byte 0x{line[error.start]:02X} at offset {error.start} of the line")
        except ValueError as error:
            return self._bad("invalid_json_line", str(error))
        found = parse(body)
        if found.custom_id is not None and self._twice(found.custom_id):
            return self._bad("duplicate_custom_id", "custom_id: an earlier line has the same")  # whose it stays
        if found.problem is not None:
            return self._bad("invalid_request", found.problem, found.custom_id)
        try:
            self._config.chain(found.model or "default")
        except UsageError as error:
            return self._bad("model_not_found", f"body.model: {error}", found.custom_id)
        return Line(Row(ordinal=self._ordinal, custom_id=found.custom_id, request=found.request, chain=found.model or "default"))

    def _bad(self, code: str, problem: str, custom_id: str | None = None) -> Line:
        return Line(Row(ordinal=self._ordinal, custom_id=custom_id, request=None, chain="default", problem=problem), code)

    def _twice(self, custom_id: str) -> bool:
        """Remembers 16 bytes of it, however long it is."""
        digest = blake2b(custom_id.encode(), digest_size=16).digest()
        known = digest in self._seen
        self._seen.add(digest)
        return known


async def _lines(db: AsyncEngine, config: Config, batch: FileBatch) -> AsyncGenerator[list[Line], None]:
    """The lines of the input file, piece by piece. Raises NotFound when it was deleted, UsageError when it has too many or none."""
    file = await files.one(db, batch.input_file_id, batch.tenant)
    if file is None:
        raise NotFound(f"file {files.wire_id(batch.input_file_id)} was deleted or has expired")
    lines = Lines(config)
    async with aclosing(files.pieces(db, file)) as pieces:
        async for piece in pieces:
            yield await asyncio.to_thread(lines.feed, piece)  # beside the loop, which has heartbeats to send
    yield await asyncio.to_thread(lines.end)
    if lines.count == 0:
        raise UsageError("the file is empty: expected one request a line")


def _error(code: str, message: str) -> dict[str, Any]:
    """Of the file as a whole."""
    return {"code": code, "line": None, "message": message, "param": "input_file_id"}


async def _validate(db: AsyncEngine, config: Config, batch: FileBatch) -> None:
    """The whole file can be submitted, or the batch has failed before any of it was run."""
    errors: list[dict[str, Any]] = []
    more = 0
    try:
        async with aclosing(_lines(db, config, batch)) as pieces:
            async for lines in pieces:
                bad = [] if batch.skips_bad_lines else [line.error() for line in lines if line.code]
                fits = MOST_ERRORS - len(errors)
                errors, more = errors + bad[:fits], more + len(bad[fits:])
    except NotFound as gone:
        errors = [_error("file_deleted", str(gone))]
    except UsageError as unusable:
        errors = [_error("invalid_file", str(unusable))]
    if more:
        errors.append({"code": "more_errors", "line": None, "message": f"{more} more lines cannot be used", "param": None})
    if errors:
        await file_batches.failed(db, batch.batch_id, errors)
    else:
        await file_batches.validated(db, batch.batch_id)


async def _load(db: AsyncEngine, config: Config, batch: FileBatch) -> None:
    """Every line is a job, those that cannot be used (told to skip, or by a configuration that changed since) a failed one.

    Lines that are jobs already are left alone. When the file is deleted halfway, the batch is cancelled.
    """
    open_ = Batch(batch.batch_id, batch.wire_id, resumed=batch.total > 0, complete=False)
    try:
        async with aclosing(_lines(db, config, batch)) as pieces:
            async for lines in pieces:
                rows = [line.row for line in lines]
                async for _ in add_rows(db, open_, rows, deadline_s=max(batch.remaining_s, 0), tenant=batch.tenant):
                    pass
    except NotFound as gone:
        await file_batches.cancel(db, batch.batch_id, [_error("file_deleted", str(gone))])
    except UsageError:  # it was cancelled: the next step sees that
        return
    else:
        await close_batch(db, open_)


async def _finish(db: AsyncEngine, batch: FileBatch) -> None:
    """Its answers and its errors are in a file each, unless there are none, and the batch is over."""
    used: Counter[str] = Counter()
    async with AsyncExitStack() as open_:
        written: dict[str, files.Upload] = {}
        async for page in _pages(db, batch.batch_id):
            for kind, content in (await asyncio.to_thread(_written, page, used)).items():
                if kind not in written:
                    name = f"{batch.wire_id}_{kind}.jsonl"
                    uploading = files.uploading(db, batch.tenant, purpose="batch_output", filename=name)
                    written[kind] = await open_.enter_async_context(uploading)
                await written[kind].write(content)
        for upload in written.values():
            await upload.flush()
        ids = {kind: upload.id for kind, upload in written.items()}
        await file_batches.ended(db, batch, ids.get("output"), ids.get("error"), _usage(used))


async def _pages(db: AsyncEngine, batch_id: UUID) -> AsyncIterator[list[ExportRow]]:
    after = 0
    while page := await reads.batch_results(db, batch_id, after, PAGE):
        yield page
        after = page[-1].ordinal or 0


def _written(page: list[ExportRow], used: Counter[str]) -> dict[str, bytes]:
    """The lines of either file, where it has any. Adds up in `used` what the answers took."""
    lines: dict[str, list[str]] = {}
    for row in page:
        lines.setdefault("error" if row.answer is None else "output", []).append(file_line(row) + "\n")
        if row.answer is not None and row.answer.age_s is None:
            used.update({name: count for name, count in row.answer.usage.to_json().items() if type(count) is int})
    return {kind: "".join(some).encode() for kind, some in lines.items()}


def _usage(used: Mapping[str, int]) -> dict[str, Any]:
    """As OpenAI's batches have it."""
    return {
        "input_tokens": used["input_tokens"],
        "input_tokens_details": {"cached_tokens": used["cached_tokens"]},
        "output_tokens": used["output_tokens"],
        "output_tokens_details": {"reasoning_tokens": used["reasoning_tokens"]},
        "total_tokens": used["input_tokens"] + used["output_tokens"],
    }
