"""Jobs from Python: `Backstop` for ordinary code, `AsyncBackstop` for code on an event loop. The first runs the second.

Both speak to Postgres and Redis themselves and need no API, no key and no Celery application, so that a process with a
Celery of its own keeps it as it is. Importing this starts nothing; the first method called connects.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self, TypeVar, Unpack
from uuid import UUID
from weakref import WeakSet

from worker.batchlines import chat_request
from worker.config import load
from worker.errors import UsageError, WaitTimedOut
from worker.export import ExportRow
from worker.following import Chatting, Enqueuing, EnqueuingMany, Following, Job, Where, reached
from worker.intervene import Cancelled
from worker.job import MAX_DEADLINE_S, ChatRequest, JobState, Lane, new_id
from worker.loop import LoopThread
from worker.rescue import expire
from worker.submit import BULK_DEADLINE_S, Batch, NewJob, Parameters, Row, Submitted, add_rows, close_batch, open_batch, submit
from worker.textfile import UNSTORABLE
from worker.views import JobView

AGAIN_S = 0.2  # between looks whether a job may be attempted again
LATE_S = 5.0  # from a deadline until a job has surely ended

Messages = str | Sequence[Mapping[str, Any]]  # a text is one user message
Value = TypeVar("Value")


class AsyncBackstop(Following):
    """A producer on one event loop. Where the file of `config` is there, chains are checked against it."""

    async def enqueue(
        self,
        messages: Messages,
        *,
        chain: str = "default",
        lane: Lane | str = Lane.INTERACTIVE,
        deadline_s: float = 120,
        idempotency_key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        **parameters: Unpack[Parameters],
    ) -> Submitted:
        """The job is in the ledger and will reach an end. `parameters` go to the provider: `temperature`, `max_tokens`, ...

        Raises UsageError naming the argument, KeyReused for an idempotency key of another request, Unreachable.
        """
        self._check(chain, idempotency_key, deadline_s=deadline_s)
        job = NewJob(
            request=_request(messages, parameters),
            chain=chain,
            lane=_lane(lane),
            deadline_s=deadline_s,
            tenant=self._tenant,
            idempotency_key=idempotency_key,
            metadata=_metadata(metadata),
        )
        links = await self._opened()
        with reached():
            return await submit(links.db, links.publish, job)

    async def enqueue_many(
        self,
        rows: Iterable[Messages | Mapping[str, Any]],
        *,
        batch: str | None = None,
        chain: str = "default",
        deadline_s: float = BULK_DEADLINE_S,
        **parameters: Unpack[Parameters],
    ) -> Batch:
        """All rows are in the batch of that name, whatever their number; they are read in another thread and never held at once.

        A row is a text, a list of messages, or {"messages", "custom_id", and parameters of its own}. What broke off is
        resumed by the same call with the same rows: those that are in are not taken again. Without a name a batch cannot
        be resumed. Raises UsageError naming the row, or when the batch was made with another chain or parameters.
        """
        self._check(chain, deadline_s=deadline_s)
        if isinstance(rows, str | Mapping):
            raise UsageError("rows: expected an iterable of requests, not one request")
        _request("-", parameters)
        links = await self._opened()
        name = f"python-{new_id()}" if batch is None else batch
        with reached():
            made = await open_batch(
                links.db, name, fingerprint=["producer", chain, deadline_s, parameters], columns=None, tenant=self._tenant
            )
            if not made.complete:
                async for _ in add_rows(links.db, made, _rows(rows, chain, parameters), deadline_s=deadline_s, tenant=self._tenant):
                    pass
                await close_batch(links.db, made)
        return replace(made, complete=True)

    async def chat(self, messages: Messages, *, chain: str = "default", timeout_s: float = 60, **parameters: Unpack[Parameters]) -> JobView:
        """The job, ended: its chain was run by this process, no queue and no other worker had a part in it.

        It is a job like all others, its calls on the books before they leave, mended by the workers should this process die. It spares the
        way through Redis, and takes the connections and the provider keys of a worker, from the first call on. For many at once, and for
        whatever may wait, take `enqueue`. Raises UsageError as `enqueue` does; WaitTimedOut, and a worker may still end the job.
        """
        self._check(chain, timeout_s=timeout_s)
        job = NewJob(request=_request(messages, parameters), chain=chain, deadline_s=timeout_s, tenant=self._tenant)
        links = await self._opened()
        attempts = (await self._at_work(links)).attempts
        with reached():
            submitted = await submit(links.db, _nobody, job)
            ends_s = links.loop.time() + timeout_s
            while not (view := await self.result(submitted)).ended:
                if links.loop.time() > ends_s + LATE_S:
                    raise WaitTimedOut(f"job {view.id} is {view.state} after {timeout_s:g} s; a worker may still end it")
                if links.loop.time() > ends_s:
                    async with links.db.connect() as connection:
                        await expire(connection)  # no leader need be there
                states = await attempts.run_pack(view.id, [view.id], Lane.INTERACTIVE)
                await asyncio.sleep(0 if states and JobState.QUEUED not in states else AGAIN_S)
        return view

    def _check(self, chain: str, idempotency_key: str | None = None, **spans_s: float) -> None:
        for name, span_s in spans_s.items():
            if isinstance(span_s, bool) or not isinstance(span_s, int | float) or not 0 < span_s <= MAX_DEADLINE_S:
                raise UsageError(f"{name}: expected seconds, more than 0 and at most {MAX_DEADLINE_S:.0f}")
        if idempotency_key is not None and not (isinstance(idempotency_key, str) and 1 <= len(idempotency_key) <= 255):
            raise UsageError("idempotency_key: expected a text of 1 to 255 characters")
        if not isinstance(chain, str) or not chain:
            raise UsageError("chain: expected the name of a chain, a provider or a model")
        file = self._settings_now().config
        if file.exists():
            load(file).chain(chain)


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
        thread, producer = self._opened()
        future = thread.submit(what(producer))
        try:
            return future.result()
        except BaseException:  # Ctrl-C, too
            future.cancel()
            raise

    def _each(self, what: Callable[[AsyncBackstop], AsyncGenerator[Value, None]]) -> Iterator[Value]:
        source = what(self._opened()[1])
        try:
            while (items := self._run(lambda _: _next(source))) is not None:
                yield items[0]
        finally:
            self._run(lambda _: source.aclose())

    def _opened(self) -> tuple[LoopThread, AsyncBackstop]:
        with self._lock:
            if self._home is None:
                self._home = LoopThread(), AsyncBackstop(**self._where)
                _OPEN.add(self)
            return self._home

    def _forked(self) -> None:
        self._inherited.append(self._home)  # the parent's: kept, never closed
        self._lock, self._home = threading.Lock(), None


async def _next(source: AsyncGenerator[Value, None]) -> tuple[Value] | None:
    try:
        return (await anext(source),)
    except StopAsyncIteration:
        return None


def _rows(rows: Iterable[Messages | Mapping[str, Any]], chain: str, shared: Mapping[str, Any]) -> Iterator[Row]:
    for ordinal, given in enumerate(rows, 1):
        own = dict(given) if isinstance(given, Mapping) else {"messages": given}
        messages, custom_id = own.pop("messages", None), own.pop("custom_id", None)
        try:
            request = _request(messages, {**shared, **own})
            if custom_id is not None and not isinstance(custom_id, str):
                raise UsageError("custom_id: expected a text")
        except UsageError as error:
            raise UsageError(f"row {ordinal}: {error}; mend it and call again: what is in a named batch is not taken twice") from None
        yield Row(ordinal=ordinal, custom_id=custom_id and UNSTORABLE.sub("\ufffd", custom_id), request=request, chain=chain)


def _request(messages: Any, parameters: Mapping[str, Any]) -> ChatRequest:
    body = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if isinstance(body, tuple):
        body = list(body)
    try:
        return chat_request({**parameters, "messages": body})
    except ValueError as error:
        raise UsageError(str(error)) from None


def _nobody(*_: object) -> None:
    """Is told of a job that its submitter runs itself."""


def _lane(lane: Lane | str) -> Lane:
    try:
        return Lane(lane)
    except ValueError:
        raise UsageError("lane: expected interactive or bulk") from None


def _metadata(given: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    try:
        if given is None or (isinstance(given, Mapping) and json.dumps(given, allow_nan=False)):
            return given
    except (TypeError, ValueError, RecursionError):
        pass
    raise UsageError("metadata: expected an object that JSON can hold")


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
