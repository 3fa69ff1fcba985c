"""The way to Postgres: an engine, and statements that are committed or fail in time."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from psycopg.errors import DeadlockDetected
from sqlalchemy import NullPool, TextClause, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from worker.errors import Unreachable, UsageError

STATEMENT_S = 15.0  # a server that is silent for so long is taken for gone; whatever is sent may be sent again

# Second halves of advisory locks, so that those of one text are not one lock.
FILE_BATCH_LOCKS, INTAKE_LOCKS, WEBHOOK_LOCKS = range(3)

Value = TypeVar("Value")


# A host that vanished without a word is noticed by the kernel, in 10 s.
_CONNECTION: Mapping[str, Any] = {
    "connect_timeout": 5,
    "application_name": "backstop",
    "keepalives_idle": 4,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


def driver_url(url: str) -> str:
    """`url` with the psycopg 3 driver named, whether it came as postgres://, postgresql:// or with a driver.

    Raises UsageError when it is no Postgres URL.
    """
    try:
        parsed = make_url(url)
    except Exception:
        raise UsageError("DATABASE_URL is not a URL: expected postgresql://user:password@host:5432/name") from None
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise UsageError(f"DATABASE_URL must be a postgresql:// URL, not {parsed.get_backend_name()}://")
    return parsed.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def engine(url: str, *, most: int = 10, pooled: bool = True) -> AsyncEngine:
    """An engine for one event loop, of at most `most` connections; not `pooled`, each ends where it is given back.

    Statements commit by themselves: what must hang together is one statement, or stands in an explicit transaction.
    """
    pool: dict[str, Any] = {"pool_size": most, "max_overflow": 0} if pooled else {"poolclass": NullPool}
    return create_async_engine(
        driver_url(url),
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,  # nothing stands open when a connection is given back
        hide_parameters=True,  # prompts stay out of errors
        connect_args=_CONNECTION,
        **pool,
    )


async def run(db: AsyncEngine, statement: TextClause, *, tries: int = 3, limit_s: float | None = None, **values: Any) -> list[Any]:
    """All rows of the statement, which Postgres has committed. Undone to end a deadlock, it is tried again.

    Raises DBAPIError, also when Postgres is silent for `limit_s` (STATEMENT_S): then it may have been committed all the same.
    """
    try:
        return await promptly(_rows(db, statement, values), limit_s or STATEMENT_S)
    except OperationalError as error:
        if tries == 1 or not isinstance(error.orig, DeadlockDetected):
            raise
    return await run(db, statement, tries=tries - 1, limit_s=limit_s, **values)


async def _rows(db: AsyncEngine, statement: TextClause, values: Mapping[str, Any]) -> list[Any]:
    async with db.connect() as connection:
        result = await connection.execute(statement, values)
        return list(result) if result.returns_rows else []


async def promptly(work: Coroutine[Any, Any, Value], limit_s: float) -> Value:
    """What `work` returns, or OperationalError when it takes longer.

    Its end is not waited for then: the driver spends up to 10 s more on asking a silent server to stop.
    """
    task = asyncio.create_task(work)
    task.add_done_callback(_heed)
    try:
        await asyncio.wait({task}, timeout=limit_s)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})  # its connection is given back before the loop may end
        raise
    if task.done():
        return task.result()
    task.cancel()
    raise OperationalError(None, None, TimeoutError(f"no reply within {limit_s:.0f} s"))


def _heed(task: asyncio.Task[Any]) -> None:
    """Nobody else looks at what is left behind."""
    if not task.cancelled():
        task.exception()


_SURROGATE = re.compile("[\ud800-\udfff]")
_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")


def jsonb(value: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> str | None:
    """JSON that Postgres can store: NUL and lone surrogates, which it cannot, become U+FFFD."""
    if value is None:
        return None
    encoded = _SURROGATE.sub("\ufffd", json.dumps(value, ensure_ascii=False))
    return _NUL.sub(r"\1\\ufffd", encoded) if "\\u0000" in encoded else encoded


def unreachable(error: DBAPIError) -> Unreachable:
    """The driver's complaint as one line, without the statement and its values."""
    reason = str(error.orig).strip().splitlines()[0] if error.orig else type(error).__name__
    if not isinstance(error, OperationalError | InterfaceError):
        return Unreachable(f"Postgres refused a statement: {reason}. Run `backstop db check`, then `backstop doctor`")
    return Unreachable(f"Postgres does not answer: {reason}. Check DATABASE_URL, or run `backstop doctor`")
