"""Endings that Postgres could not take before a worker had to stop: kept on disk, settled at the next start."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import structlog
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.ledger import Settlement, document, settle_documents

log = structlog.get_logger(__name__)


def place(data: Path) -> Path:
    """Where they are, under `BACKSTOP_DATA`."""
    return data / "spool"


def write(directory: Path, settlements: Sequence[Settlement]) -> Path:
    """The file they are in, on the disk when this returns, for this user's eyes only. Raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / f"{uuid4()}.jsonl"
    draft = path.with_suffix(".draft")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.writelines(json.dumps(document(settlement)) + "\n" for settlement in settlements)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    _sync(directory)
    return path


def found(directory: Path) -> list[Path]:
    """The files that wait to be settled."""
    return sorted(directory.glob("*.jsonl"))


async def replay(db: AsyncEngine, directory: Path) -> int:
    """What waited is settled and its files are gone; how many endings still held. Raises DBAPIError while Postgres is away.

    Others may do the same at the same time: an ending is settled once. One that came too late leaves its calls in the books and
    its answer to the job's next attempt. What can never be settled is set aside in a file `.refused`.
    """
    settled = 0
    for path in found(directory):
        try:
            lines = path.read_text("ascii").splitlines(keepends=True)
        except FileNotFoundError:
            continue  # another worker was faster
        outcomes = [await _settled(db, line) for line in lines]
        refused = [line for line, held in zip(lines, outcomes, strict=True) if held is None]
        if refused:
            path.with_suffix(".refused").write_text("".join(refused), "ascii")
            log.error("spool_refused", file=path.with_suffix(".refused").name, endings=len(refused))
        path.unlink(missing_ok=True)
        settled += sum(held for held in outcomes if held)
        log.info("spool_settled", file=path.name, endings=len(lines) - len(refused))
    return settled


async def _settled(db: AsyncEngine, line: str) -> bool | None:
    """Whether its fence still held; None when it can never be settled."""
    try:
        return (await settle_documents(db, [json.loads(line)], again=True))[0]
    except (ValueError, LookupError, TypeError, DataError, IntegrityError):
        return None


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
