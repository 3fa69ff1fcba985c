"""Jobs from Python: `Backstop` for ordinary code, `AsyncBackstop` for code on an event loop. The first runs the second.

Both speak to Postgres and Redis themselves and need no API, no key and no Celery application, so that a process with a
Celery of its own keeps it as it is. Importing this starts nothing; the first method called connects.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Self, TypeVar, Unpack
from uuid import UUID
from weakref import WeakSet

from worker.async_producer import AsyncBackstop, Messages
from worker.errors import UsageError
from worker.export import ExportRow
from worker.following import Chatting, Enqueuing, EnqueuingMany, Job
from worker.intervene import Cancelled
from worker.links import Where
from worker.loop import LoopThread
from worker.submit import BULK_DEADLINE_S, Batch, Submitted
from worker.views import JobView

__all__ = ["AsyncBackstop", "Backstop"]

Value = TypeVar("Value")


class Backstop:
    """A producer for threads: every method of AsyncBackstop, without `await`. Safe to share between threads and across a fork.

    `with` closes it, and so does the end of the interpreter; what is used after that connects again. Its connections live on
    a thread of its own, so it also works where an event loop runs, which it holds up meanwhile: use AsyncBackstop there.
    """

    def __init__(self, **where: Unpack[Where]) -> None:
        self._where = where
        self._lock = threading.Lock()
        self._home: tuple[LoopThread, AsyncBackstop] | None = None
        self._inherited: list[object] = []
        AsyncBackstop(**where)  # a wrong name is told here
        _CLIENTS.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is open and no thread of it runs. Closing once more does nothing."""
        with self._lock:
            home, self._home = self._home, None
            _OPEN.discard(self)
        if home is not None:
            thread, producer = home
            with suppress(TimeoutError):
                thread.submit(producer.aclose()).result(timeout=5)
            thread.stop()

    def enqueue(self, messages: Messages, **how: Unpack[Enqueuing]) -> Submitted:
        """See AsyncBackstop.enqueue."""
        return self._run(lambda producer: producer.enqueue(messages, **how))

    def enqueue_many(self, rows: Iterable[Messages | Mapping[str, Any]], **how: Unpack[EnqueuingMany]) -> Batch:
        """See AsyncBackstop.enqueue_many."""
        return self._run(lambda producer: producer.enqueue_many(rows, **how))

    def chat(self, messages: Messages, **how: Unpack[Chatting]) -> JobView:
        """See AsyncBackstop.chat."""
        return self._run(lambda producer: producer.chat(messages, **how))

    def result(self, job: Job) -> JobView:
        """See AsyncBackstop.result."""
        return self._run(lambda producer: producer.result(job))

    def wait(self, job: Job, timeout_s: float = 120) -> JobView:
        """See AsyncBackstop.wait."""
        return self._run(lambda producer: producer.wait(job, timeout_s))

    def cancel(self, what: Job | Batch) -> Cancelled:
        """See AsyncBackstop.cancel."""
        return self._run(lambda producer: producer.cancel(what))

    def as_completed(self, jobs: Iterable[Job], timeout_s: float = 120) -> Iterator[JobView]:
        """See AsyncBackstop.as_completed."""
        return self._each(lambda producer: producer.as_completed(jobs, timeout_s))

    def results(self, batch: Batch | UUID | str, timeout_s: float = BULK_DEADLINE_S) -> Iterator[ExportRow]:
        """See AsyncBackstop.results."""
        return self._each(lambda producer: producer.results(batch, timeout_s))

    def _run(self, what: Callable[[AsyncBackstop], Coroutine[Any, Any, Value]]) -> Value:
        with self._lock:  # whoever closes it waits, so that nothing is handed to a loop that has ended
            thread, producer = self._at_home()
            future = thread.submit(what(producer))
        return _outcome(future)

    def _each(self, what: Callable[[AsyncBackstop], AsyncGenerator[Value, None]]) -> Iterator[Value]:
        with self._lock:
            home = self._at_home()
        source = what(home[1])
        try:
            while (items := self._on(home, _next(source))) is not None:
                yield items[0]
        finally:
            with suppress(UsageError):  # closed, and so is the source
                self._on(home, source.aclose())

    def _on(self, home: tuple[LoopThread, AsyncBackstop], coroutine: Coroutine[Any, Any, Value]) -> Value:
        with self._lock:
            if home is not self._home:
                coroutine.close()
                raise UsageError("this Backstop was closed while its results were being read: ask for them again")
            future = home[0].submit(coroutine)
        return _outcome(future)

    def _at_home(self) -> tuple[LoopThread, AsyncBackstop]:
        if self._home is None:
            self._home = LoopThread(), AsyncBackstop(**self._where)
            _OPEN.add(self)
        return self._home

    def _forked(self) -> None:
        self._inherited.append(self._home)  # the parent's: kept, never closed
        self._lock, self._home = threading.Lock(), None


def _outcome(future: Future[Value]) -> Value:
    try:
        return future.result()
    except BaseException:  # Ctrl-C, too
        future.cancel()
        raise


async def _next(source: AsyncGenerator[Value, None]) -> tuple[Value] | None:
    try:
        return (await anext(source),)
    except StopAsyncIteration:
        return None


_CLIENTS: WeakSet[Backstop] = WeakSet()
_OPEN: set[Backstop] = set()  # held, so that the end also closes what nobody refers to any more


def _after_fork() -> None:
    for client in list(_CLIENTS):
        client._forked()


@atexit.register
def _close_all() -> None:
    for client in list(_OPEN):
        client.close()


os.register_at_fork(after_in_child=_after_fork)
