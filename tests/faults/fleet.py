"""The lab's real processes: Celery workers and an API, each with a log of its own, gone when their test is."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from history import History
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from stage import rows

import worker
from worker.embedded.launch import end_with_parent

PATIENCE_S = 60.0
_ROOT = Path(worker.__file__).parents[1]
_HERE = Path(__file__).parent


async def start(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> asyncio.subprocess.Process:
    """Python with these arguments, the code under test first on its path; it dies with us."""
    path = [str(_ROOT), str(_HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    with log.open("ab") as out:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            cwd=_ROOT,
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(path)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            preexec_fn=end_with_parent(signal.SIGKILL) if sys.platform == "linux" else None,
        )


@dataclass
class Worker:
    """A worker process. Whoever kills it, what it held at that moment stands in the history as `killed`."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    db: AsyncEngine
    history: History
    until: Callable[..., Awaitable[list[Any]]]
    _noted: bool = False
    _end: asyncio.Task[int] = field(init=False)

    def __post_init__(self) -> None:
        self._end = asyncio.create_task(self._watch())

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.returncode is None

    async def live(self) -> None:
        """It is registered and takes jobs. Raises AssertionError with its last words when it ended instead."""
        registered = asyncio.ensure_future(self.until("SELECT FROM workers WHERE pid = :pid AND state = 'live'", pid=self.pid))
        await asyncio.wait({registered, self._end}, return_when=asyncio.FIRST_COMPLETED)
        if not registered.done():
            registered.cancel()
            raise AssertionError(f"worker {self.name} ended with {self.process.returncode}: {self.last_words()}")
        await registered

    async def kill(self) -> None:
        """SIGKILL. First it is stopped and what it holds is noted, so that the note is what was true when it died."""
        self.freeze()
        await self._note()
        self._noted = True
        self.process.kill()
        await self.ended()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    async def freeze_until_dead(self) -> None:
        """Frozen for so long that others hold it dead, which counts as a death; `thaw` makes it a ghost."""
        self.freeze()
        await self.outlived()

    async def outlived(self) -> None:
        """Others hold it dead, which counts as a death: it is frozen, or on its way to Postgres nothing arrives any more."""
        await self._note()
        await self.until("SELECT FROM workers WHERE pid = :pid HAVING count(*) FILTER (WHERE state = 'dead') = count(*)", pid=self.pid)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """The polite end: it drains. `await ended()` for its exit code."""
        self.process.send_signal(signal.SIGTERM)

    async def ended(self) -> int:
        """Its exit code, once it has ended; negative is the signal that killed it."""
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.shield(self._end)

    async def ids(self) -> list[UUID]:
        """Its ids in `workers`, the newest last: it takes a new one when it was declared dead."""
        found = await rows(self.db, "SELECT id FROM workers WHERE pid = :pid ORDER BY started_at, id", pid=self.pid)
        return [row.id for row in found]

    async def holds(self) -> list[UUID]:
        """The jobs that it runs, as the ledger has it."""
        sql = "SELECT j.id FROM jobs j JOIN workers w ON w.id = j.worker_id WHERE w.pid = :pid AND j.state = 'running'"
        return [row.id for row in await rows(self.db, sql, pid=self.pid)]

    def rss_bytes(self) -> int:
        """Memory that it holds; 0 when it is gone."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * 4096
        except OSError:
            return 0

    def said(self, words: str) -> bool:
        return words in self.log.read_text("utf-8", "replace")

    def last_words(self, count: int = 8) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-count:])

    async def gone(self) -> None:
        """It has ended, without a note: its test is over."""
        self._noted = True
        if self.alive():
            self.process.kill()
        await self._end

    async def _watch(self) -> int:
        code = await self.process.wait()
        if code == -signal.SIGKILL and not self._noted:  # by a failpoint of its own
            await self._note()
        return code

    async def _note(self) -> None:
        try:
            async with asyncio.timeout(3):
                await rows(self.db, _LANDED)
                found = await rows(self.db, _HELD, pid=self.pid)
        except (SQLAlchemyError, TimeoutError):
            self.history.note("killed", worker=self.name, held=[], open_calls=None)
            return
        calls = {str(row.id): row.open for row in found}
        self.history.note("killed", worker=self.name, held=list(calls), open=calls, open_calls=sum(calls.values()))


# Returns once what was under way when it was asked has ended: a worker that was just stopped may have sent it.
_LANDED = """
DO $$
DECLARE asked timestamptz := clock_timestamp() + interval '10 ms';
BEGIN
    PERFORM pg_sleep(0.02);
    FOR tick IN 1..100 LOOP
        PERFORM pg_stat_clear_snapshot();
        EXIT WHEN NOT EXISTS (
            SELECT FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid() AND state = 'active' AND query_start < asked
        );
        PERFORM pg_sleep(0.01);
    END LOOP;
END $$
"""

_HELD = """
SELECT j.id, count(p.id) AS open FROM jobs j JOIN workers w ON w.id = j.worker_id
LEFT JOIN provider_calls p ON p.job_id = j.id AND p.fence = j.fence AND p.outcome IS NULL
WHERE w.pid = :pid AND j.state = 'running' GROUP BY j.id ORDER BY j.id
"""


@dataclass
class Api:
    """An API process and a key for it."""

    process: asyncio.subprocess.Process
    log: Path
    url: str
    key: str

    def client(self) -> httpx.AsyncClient:
        """Speaks with the key, and with nobody in between."""
        return httpx.AsyncClient(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, trust_env=False, timeout=30)

    async def live(self) -> None:
        """It answers, and its servers answer it. Raises AssertionError with its last words when it ended instead."""
        async with asyncio.timeout(PATIENCE_S), self.client() as http:
            while True:
                assert self.process.returncode is None, self.log.read_text("utf-8", "replace")[-2000:]
                try:
                    if (await http.get("/readyz")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.05)

    async def gone(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
