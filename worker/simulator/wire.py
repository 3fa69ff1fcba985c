"""How an answer and each fault look on the wire."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import struct
from dataclasses import dataclass, field
from http import HTTPStatus

from aiohttp import web

from worker.simulator.dialects import Dialect, Spoken
from worker.simulator.script import Fault

_EVENTS = "text/event-stream"
_FIRST_WORD = 2  # so many events hold it
_HALVED = frozenset({"stall", "truncate"})
_BODILESS = frozenset({"hang", "reset", "refuse"})
_CHARGED = frozenset({"answered", "slow", "malformed", "empty", "stall", "truncate"})


@dataclass(frozen=True, slots=True)
class Reply:
    """A response made ready. `status` None: not even headers are sent. `tokens`: (input, output) as charged."""

    outcome: str
    status: int | None
    pieces: tuple[bytes, ...] = ()  # one, or the events of a stream
    tokens: tuple[int, int] = (0, 0)
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    content_type: str = "application/json"


def reply(fault: Fault | None, spoken: Spoken, dialect: Dialect, *, streamed: bool) -> Reply:
    """What goes back to one good request. What the model wrote is charged, read or not; errors and hangs are free."""
    outcome = fault.kind if fault else "answered"
    tokens = (spoken.saying.input_tokens, spoken.saying.output_tokens) if outcome in _CHARGED else (0, 0)
    if fault and fault.kind in _BODILESS:
        return Reply(outcome, None, delay_s=fault.seconds if fault.kind == "hang" else 0)
    if fault and fault.kind == "status":
        return refusal(dialect, fault.status or 500, code=fault.code, kind=fault.type, retry_after_s=fault.retry_after_s)
    if fault and fault.kind == "html":
        status = fault.status or 502
        page = f"<html><head><title>{status} {_phrase(status)}</title></head><body><hr>gateway</body></html>"
        return Reply(outcome, status, (page.encode(),), content_type="text/html")
    delay_s = fault.seconds if fault and fault.kind in ("slow", "stall") else 0
    if streamed:
        pieces = tuple(_events(fault, spoken, dialect))
        return Reply(outcome, 200, pieces, tokens, delay_s=delay_s, content_type=_EVENTS)
    return Reply(outcome, 200, (_body(fault, spoken, dialect),), tokens, delay_s=delay_s)


def refusal(
    dialect: Dialect,
    status: int,
    *,
    code: str | None = None,
    kind: str | None = None,
    retry_after_s: float | None = None,
    message: str | None = None,
    outcome: str = "status",
) -> Reply:
    """An HTTP error. A wait that is no whole second goes out in `retry-after-ms` too, as OpenAI does it."""
    headers = {}
    if retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(retry_after_s))
        if retry_after_s % 1:
            headers["retry-after-ms"] = str(math.ceil(retry_after_s * 1000))
    body = dialect.error(status, code, kind, message or _told(status))
    return Reply(outcome, status, (json.dumps(body).encode(),), headers=headers)


async def deliver(request: web.BaseRequest, made: Reply) -> tuple[web.StreamResponse, bool]:
    """Sends it, or fails as it says. True: the whole response went to a connection that was still open."""
    if made.status is None:
        await asyncio.sleep(made.delay_s)
        reset(request)
        return web.Response(), False
    if made.outcome in _HALVED:
        return await _cut(request, made), False
    if made.delay_s:
        await asyncio.sleep(made.delay_s)
    response = _response(made, made.status)
    try:
        await response.prepare(request)
        for piece in made.pieces if made.content_type == _EVENTS else ():
            await response.write(piece)
        await response.write_eof()
    except ConnectionError:
        return response, False
    return response, request.transport is not None and not request.transport.is_closing()


def reset(request: web.BaseRequest) -> None:
    """The client sees a TCP reset, whatever was on its way."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()


def _response(made: Reply, status: int) -> web.StreamResponse:
    if made.content_type == _EVENTS:
        return web.StreamResponse(status=status, headers={**made.headers, "Content-Type": _EVENTS})
    (body,) = made.pieces
    return web.Response(body=body, status=status, reason=_phrase(status), headers=made.headers, content_type=made.content_type)


async def _cut(request: web.BaseRequest, made: Reply) -> web.StreamResponse:
    """Headers and what the reply has of a body, silence for as long as it says, and a reset."""
    response = web.StreamResponse(status=200, headers={**made.headers, "Content-Type": made.content_type})
    if made.content_type == _EVENTS:
        shown = made.pieces
    else:
        response.content_length = sum(map(len, made.pieces))
        shown = (made.pieces[0][: len(made.pieces[0]) // 2],)
    await response.prepare(request)
    for piece in shown:
        await response.write(piece)
    await asyncio.sleep(made.delay_s)
    reset(request)
    return response


def _body(fault: Fault | None, spoken: Spoken, dialect: Dialect) -> bytes:
    if fault and fault.kind == "empty":
        return json.dumps(dialect.nothing(spoken)).encode()
    if fault and fault.kind == "error_in_200":
        return json.dumps(dialect.error(500, fault.code, fault.type, _told(500))).encode()
    body = json.dumps(dialect.answer(spoken)).encode()
    return body[: len(body) * 2 // 3] if fault and fault.kind == "malformed" else body


def _events(fault: Fault | None, spoken: Spoken, dialect: Dialect) -> list[bytes]:
    events = dialect.events(spoken)
    match fault.kind if fault else None:
        case "empty":
            return dialect.no_events(spoken)
        case "stall":
            return events[:_FIRST_WORD]
        case "truncate":
            return events[: max(_FIRST_WORD, len(events) // 2)]
        case "malformed":
            return [*events[:_FIRST_WORD], b"data: {\n\n", *events[_FIRST_WORD:]]
        case "error_in_200" if fault:
            error = dialect.error(500, fault.code, fault.type, _told(500))
            return [*events[:_FIRST_WORD], dialect.error_event(error)]
    return events


def _told(status: int) -> str:
    return f"The simulator was told to answer {status}."


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Overloaded"
