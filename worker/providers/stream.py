"""A streamed answer: server-sent events put together to the body it would have had unstreamed, under limits of silence.

The answer is delivered whole all the same. What streaming gains is time: a provider that does not begin, or stops in the
middle, is left long before its `timeout_s`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any, Protocol

from worker.config import ProviderConfig
from worker.providers.provider import Read, Reply
from worker.signals import POLICIES, Billing, Signal

MOST_STREAM_BYTES = 64 * 2**20  # each token comes in some 300 bytes of wrapping
MOST_ANSWER_BYTES = 8 * 2**20  # once it is put together
_LINGER_S = 0.25  # from the last event on; a connection read to its end can be used again
_DONE = b"[DONE]"

_decode = json.JSONDecoder(strict=False).decode


class Heard(Enum):
    """What an event of a stream says about its progress."""

    NOTHING = "nothing"  # the line is open: a ping
    PROGRESS = "progress"
    TOKEN = "token"  # noqa: S105 - of text, of thinking or of a tool call
    END = "end"
    FAULT = "fault"  # an error in place of the rest


class Assembly(Protocol):
    """Puts the events of one dialect together. `finished`: the model said that, and why, it stopped."""

    finished: bool

    def take(self, event: dict[str, Any]) -> Heard: ...

    def whole(self) -> dict[str, Any]:
        """The body the same answer has unstreamed, as far as it has come."""
        ...


class Events:
    """Cuts bytes into the data of server-sent events, wherever they were split (WHATWG HTML 9.2.6, without names and ids)."""

    def __init__(self) -> None:
        self._line: list[bytes] = []
        self._data: list[bytes] = []
        self._after_return = False
        self._at_start = True

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The data of each event that this piece completes."""
        if not piece:
            return
        if self._after_return and piece.startswith(b"\n"):
            piece = piece[1:]
            self._after_return = False
        self._after_return = piece.endswith(b"\r") if piece else False
        first, *others = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._line.append(first)
        for other in others:
            yield from self._ended(b"".join(self._line))
            self._line = [other]

    def rest(self) -> Iterator[bytes]:
        """At the end of the body: an event whose blank line never came."""
        yield from self._ended(b"".join(self._line))
        yield from self._ended(b"")

    def _ended(self, line: bytes) -> Iterator[bytes]:
        if self._at_start:
            line, self._at_start = line.removeprefix(b"\xef\xbb\xbf"), False
        if not line:
            if self._data:
                yield b"\n".join(self._data)
            self._data = []
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))


class Stream:
    """One answer as it comes in. `first_token_s`: from the request on until the first of its tokens was here, or None."""

    def __init__(self, assembly: Assembly, config: ProviderConfig) -> None:
        self._assembly = assembly
        self._first_token_timeout_s = config.first_token_timeout_s
        self._stall_timeout_s = config.stall_timeout_s
        self.first_token_s: float | None = None
        self._began_at = self._ends_at = 0.0
        self._status = 200
        self._headers: Mapping[str, str] = {}
        self._fault: dict[str, Any] | None = None
        self._spoilt: str | None = None  # an error code
        self._over = False

    def opens(self, began_at: float, ends_at: float) -> float:
        """Both on the loop's clock: the request leaves, the call ends at the latest. When to give up unless a token comes."""
        self._began_at, self._ends_at = began_at, ends_at
        return min(ends_at, began_at + self._first_token_timeout_s)

    async def listen(self, status: int, headers: Mapping[str, str], pieces: AsyncIterator[bytes], limit: asyncio.Timeout) -> None:
        """Reads to the end, the fault or what cannot be read; each progress moves the limit."""
        self._status, self._headers = status, headers
        events = Events()
        size = 0
        async for piece in pieces:
            size += len(piece)
            if size > MOST_STREAM_BYTES:
                self._spoilt = "body_too_large"
            self._move({self._take(data) for data in events.feed(piece)}, limit)
            if self._fault is not None or self._spoilt:
                return
        self._move({self._take(data) for data in events.rest() if data == _DONE or _event(data) is not None}, limit)  # else cut

    def silence(self) -> str:
        """The error code of a stream that was given up because of its silence."""
        return "no_first_token" if self.first_token_s is None else "stalled"

    def lost(self, read: Read, fault: Reply) -> Reply:
        """What became of it when it broke off: the answer if nothing but its ending is missing, else the fault."""
        return self.reply(read) if self._assembly.finished else replace(fault, first_token_s=self.first_token_s)

    def reply(self, read: Read) -> Reply:
        """What became of it: what `read` makes of the whole, of an error in it, or DROPPED without an end.

        An error after the first token may have cost money, whatever it means: it is DROPPED under its own code.
        """
        reply = self._reply(read)
        begun = self.first_token_s is not None
        if reply.answer is None and begun and POLICIES[reply.signal].billing is Billing.FREE:
            reply = replace(reply, signal=Signal.DROPPED, usage=None)
        return replace(reply, first_token_s=self.first_token_s)

    def _reply(self, read: Read) -> Reply:
        if self._spoilt:
            return Reply(signal=Signal.MALFORMED, http_status=self._status, error_code=self._spoilt)
        empty = self._over and self.first_token_s is None
        if self._fault is None and not self._assembly.finished and not empty:
            return Reply(signal=Signal.DROPPED, http_status=self._status, error_code="truncated")
        try:
            body = json.dumps(self._fault or self._assembly.whole()).encode()
        except RecursionError:
            return Reply(signal=Signal.MALFORMED, http_status=self._status, error_code="not_json")
        if len(body) > MOST_ANSWER_BYTES:
            return Reply(signal=Signal.MALFORMED, http_status=self._status, error_code="body_too_large")
        return read(self._status, self._headers, body)

    def _take(self, data: bytes) -> Heard:
        if self._over or self._spoilt or not data.strip():
            return Heard.NOTHING
        if data.strip() == _DONE:
            self._over = True
            return Heard.END
        event = _event(data)
        if event is None:
            self._spoilt = None if self._assembly.finished else "not_json"
            return Heard.NOTHING
        heard = self._assembly.take(event)
        if heard is Heard.FAULT and not self._assembly.finished:
            self._fault = event
        self._over = heard in (Heard.END, Heard.FAULT)
        return heard

    def _move(self, heard: set[Heard], limit: asyncio.Timeout) -> None:
        now = asyncio.get_running_loop().time()
        if Heard.TOKEN in heard and self.first_token_s is None:
            self.first_token_s = now - self._began_at
        if Heard.END in heard:
            limit.reschedule(min(self._ends_at, now + _LINGER_S))
        elif self.first_token_s is not None and not self._over and heard & {Heard.TOKEN, Heard.PROGRESS}:
            limit.reschedule(min(self._ends_at, now + self._stall_timeout_s))


def _event(data: bytes) -> dict[str, Any] | None:
    try:
        event = _decode(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None
