"""The producer for code on an event loop, which is also what the one for threads runs: `worker.producer` has both."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, Unpack

from worker.batchlines import LARGEST_METADATA, chat_request
from worker.config import load
from worker.errors import UsageError, WaitTimedOut
from worker.following import Following
from worker.job import MAX_DEADLINE_S, ChatRequest, JobState, Lane, new_id
from worker.links import as_unreachable
from worker.rescue import expire
from worker.submit import (
    BULK_DEADLINE_S,
    IDEMPOTENCY_KEY,
    IDEMPOTENCY_KEY_IS,
    Batch,
    NewJob,
    Parameters,
    Row,
    Submitted,
    add_rows,
    close_batch,
    open_batch,
    submit,
)
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
        with as_unreachable():
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
        if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
            raise UsageError("rows: expected an iterable of requests, not one request")
        _request("-", parameters)
        links = await self._opened()
        name = f"python-{new_id()}" if batch is None else batch
        fingerprint = ["producer", chain, deadline_s, parameters]
        try:
            with as_unreachable():
                made = await open_batch(links.db, name, fingerprint=fingerprint, columns=None, tenant=self._tenant)
                if not made.complete:
                    taken = _rows(_theirs(rows), chain, parameters)
                    async for _ in add_rows(links.db, made, taken, deadline_s=deadline_s, tenant=self._tenant):
                        pass
                    await close_batch(links.db, made)
        except _Theirs as carrier:
            raise carrier.error from None
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
        with as_unreachable():
            attempts = (await self._at_work(links)).attempts
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
        if idempotency_key is not None and not (isinstance(idempotency_key, str) and IDEMPOTENCY_KEY.fullmatch(idempotency_key)):
            raise UsageError(f"idempotency_key: expected {IDEMPOTENCY_KEY_IS}")
        if not isinstance(chain, str) or not chain:
            raise UsageError("chain: expected the name of a chain, a provider or a model")
        file = self._settings_now().config
        if file.exists():
            load(file).chain(chain)


class _Theirs(Exception):
    """Carries what the caller's own rows raised past the words for our Postgres: theirs may well come from one, too."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _theirs(rows: Iterable[Value]) -> Iterator[Value]:
    try:
        yield from rows
    except Exception as error:
        raise _Theirs(error) from None


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
        if given is None or (isinstance(given, Mapping) and len(json.dumps(given, allow_nan=False)) <= LARGEST_METADATA):
            return given
    except (TypeError, ValueError, RecursionError):
        pass
    raise UsageError(f"metadata: expected an object of at most {LARGEST_METADATA} characters of JSON")
