"""The results of a batch as its jobs end, each once, and where a reader stands that comes back."""

from __future__ import annotations

import asyncio
from array import array
from bisect import bisect_left
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Self
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from worker import reads
from worker.export import ExportRow
from worker.views import BatchView

_PAGE = 500  # answers in memory at once
_MARKS = 5_000  # rows that are looked at in one statement
_FOLLOW_S = 1.0
_REST, _LONGEST_S = 4, 5.0  # times as long as a look took, if that is more: among many unfinished jobs a look is no small thing
_MOST_MISSING = 1_000_000  # of 8 bytes
_NAMED = 10


@dataclass(slots=True)
class Sent:
    """Which rows of a batch were sent: all up to `front`, but for the `missing`, ascending. `count`: how many."""

    front: int = 0
    missing: array[int] = field(default_factory=lambda: array("q"))
    count: int = 0

    @classmethod
    def until(cls, cursor: str) -> Self:
        front, *missing = map(int, cursor.split("."))
        return cls(front, array("q", sorted({ordinal for ordinal in missing if ordinal <= front})))

    @property
    def cursor(self) -> str:
        """The front, and up to ten rows that are missing; where there are more, the front is the last before the eleventh."""
        more = self.missing[_NAMED : _NAMED + 1]
        front = more[0] - 1 if more else self.front
        return ".".join(map(str, [front, *self.missing[:_NAMED]]))

    def found(self, ordinal: int) -> None:
        del self.missing[bisect_left(self.missing, ordinal)]
        self.count += 1

    def passed(self, ordinal: int, *, ended: bool) -> None:
        """The row behind the front is sent, or missing."""
        self.front = ordinal
        if ended:
            self.count += 1
        else:
            self.missing.append(ordinal)


async def as_they_end(db: AsyncEngine, batch_id: UUID, sent: Sent) -> AsyncIterator[ExportRow | None]:
    """Each job of the batch once, as soon as it has ended, until all have; None in each pause.

    Goes through the file to the last job that has ended, and remembers the ordinals it passed over: dispatch goes by ordinal, so
    these are about the jobs in flight. Behind jobs that are parked it finds those that have ended by the batch's counters, which
    say whether there are any. With `_MOST_MISSING` passed over it goes no further until some of those have ended.
    """
    clock = asyncio.get_running_loop().time
    sent.count = await reads.batch_rows(db, batch_id, sent.front) - len(sent.missing)
    while (batch := await reads.batch(db, batch_id)) is not None:
        began_at = clock()
        async for row in _found(db, batch_id, sent):
            yield row
        marks: list[tuple[int, bool]] | None = None
        while len(sent.missing) < _MOST_MISSING:
            marks = await reads.batch_marks(db, batch_id, sent.front, _MARKS)
            behind = batch.state == "finished" or batch.total - batch.unfinished > sent.count
            reached = _until_the_last_ended(marks) or (marks if behind else [])
            if not reached:
                break
            async for row in _passed(db, batch_id, sent, reached):
                yield row
        if marks == [] and _is_whole(batch, sent):
            return
        if marks or sent.missing:  # else there may be no next line to put a space in front of
            yield None
        await asyncio.sleep(min(max(_FOLLOW_S, _REST * (clock() - began_at)), _LONGEST_S))


def _is_whole(batch: BatchView, sent: Sent) -> bool:
    """Nothing will come any more from a batch whose every row was looked at."""
    # One that is finished has no job that could still end: what is missing then was never in it.
    return batch.state == "finished" or (batch.state == "open" and not sent.missing)


def _until_the_last_ended(marks: list[tuple[int, bool]]) -> list[tuple[int, bool]]:
    last = next((position for position in reversed(range(len(marks))) if marks[position][1]), -1)
    return marks[: last + 1]


async def _found(db: AsyncEngine, batch_id: UUID, sent: Sent) -> AsyncIterator[ExportRow]:
    """Of the missing rows those that have ended."""
    missing = sent.missing[:]
    for start in range(0, len(missing), _MARKS):
        ended = await reads.batch_ended(db, batch_id, missing[start : start + _MARKS])
        for page in range(0, len(ended), _PAGE):
            for row in await reads.batch_endings(db, batch_id, ended[page : page + _PAGE]):
                sent.found(row.ordinal or 0)
                yield row


async def _passed(db: AsyncEngine, batch_id: UUID, sent: Sent, marks: list[tuple[int, bool]]) -> AsyncIterator[ExportRow]:
    """Of the rows behind the front those that have ended."""
    for start in range(0, len(marks), _PAGE):
        page = marks[start : start + _PAGE]
        ended = [ordinal for ordinal, has_ended in page if has_ended]
        rows = {row.ordinal: row for row in (await reads.batch_endings(db, batch_id, ended) if ended else ())}
        for ordinal, _ in page:
            row = rows.get(ordinal)
            sent.passed(ordinal, ended=row is not None)
            if row is not None:
                yield row
