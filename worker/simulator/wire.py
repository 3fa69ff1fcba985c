"""How an answer and each fault look on the wire."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import struct
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from aiohttp import web

from worker.simulator.answers import Saying
from worker.simulator.script import Fault

_ERRORS = {  # status: (error.code, error.type) as OpenAI sends them
    400: ("invalid_value", "invalid_request_error"),
    401: ("invalid_api_key", "invalid_request_error"),
    402: ("insufficient_quota", "insufficient_quota"),
    403: ("permission_denied", "invalid_request_error"),
    404: ("model_not_found", "invalid_request_error"),
    408: ("request_timeout", "timeout"),
    429: ("rate_limit_exceeded", "requests"),
    503: ("overloaded", "server_error"),
    529: ("overloaded", "overloaded_error"),
}
_HALVED = frozenset({"stall", "truncate"})
_BODILESS = frozenset({"hang", "reset", "refuse"})
_CHARGED = frozenset({"answered", "slow", "malformed", "empty", "stall", "truncate"})


@dataclass(frozen=True, slots=True)
class Reply:
    """A response made ready. `status` None: not even headers are sent. `tokens`: (input, output) as charged."""

    outcome: str
    status: int | None
    body: bytes = b""
    tokens: tuple[int, int] = (0, 0)
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    content_type: str = "application/json"


def reply(fault: Fault | None, saying: Saying, *, model: str, identity: str, created: int) -> Reply:
    """What goes back to one good request. What the model wrote is charged, read or not; errors and hangs are free."""
    outcome = fault.kind if fault else "answered"
    tokens = (saying.input_tokens, saying.output_tokens) if outcome in _CHARGED else (0, 0)
    if fault is None:
        return Reply(outcome, 200, _completion(saying, model, identity, created), tokens)
    if fault.kind in _BODILESS:
        return Reply(outcome, None, delay_s=fault.seconds if fault.kind == "hang" else 0)
    if fault.kind == "status":
        return refusal(fault.status or 500, code=fault.code, kind=fault.type, retry_after_s=fault.retry_after_s)
    if fault.kind == "html":
        status = fault.status or 502
        page = f"<html><head><title>{status} {_phrase(status)}</title></head><body><hr>gateway</body></html>"
        return Reply(outcome, status, page.encode(), content_type="text/html")
    body = _completion(saying, model, identity, created)
    if fault.kind == "malformed":
        body = body[: len(body) * 2 // 3]
    elif fault.kind == "empty":
        body = _completion(saying, model, identity, created, choices=False)
    elif fault.kind == "error_in_200":
        body = _error(500, fault.code, fault.type)
    return Reply(outcome, 200, body, tokens, delay_s=fault.seconds if fault.kind in ("slow", "stall") else 0)


def refusal(
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
            headers["retry-after-ms"] = str(round(retry_after_s * 1000))
    return Reply(outcome, status, _error(status, code, kind, message), headers=headers)


async def deliver(request: web.BaseRequest, made: Reply) -> tuple[web.StreamResponse, bool]:
    """Sends it, or fails as it says. True: the whole response went to a connection that was still open."""
    if made.status is None:
        await asyncio.sleep(made.delay_s)
        reset(request)
        return web.Response(), False
    if made.outcome in _HALVED:
        return await _half(request, made), False
    if made.delay_s:
        await asyncio.sleep(made.delay_s)
    response = web.Response(
        body=made.body,
        status=made.status,
        reason=_phrase(made.status),
        headers=made.headers,
        content_type=made.content_type,
    )
    try:
        await response.prepare(request)
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


async def _half(request: web.BaseRequest, made: Reply) -> web.StreamResponse:
    response = web.StreamResponse(status=200, headers={"Content-Type": made.content_type})
    response.content_length = len(made.body)
    await response.prepare(request)
    await response.write(made.body[: len(made.body) // 2])
    await asyncio.sleep(made.delay_s)
    reset(request)
    return response


def _completion(saying: Saying, model: str, identity: str, created: int, *, choices: bool = True) -> bytes:
    message = {"role": "assistant", "content": saying.content, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": saying.finish_reason}
    usage = {
        "prompt_tokens": saying.input_tokens,
        "completion_tokens": saying.output_tokens,
        "total_tokens": saying.input_tokens + saying.output_tokens,
    }
    body = {"id": f"chatcmpl-{identity}", "object": "chat.completion", "created": created, "model": model}
    return json.dumps({**body, "choices": [choice] if choices else [], "usage": usage}).encode()


def _error(status: int, code: str | None, kind: str | None, message: str | None = None) -> bytes:
    usual_code, usual_kind = _ERRORS.get(status, ("server_error", "server_error"))
    error: dict[str, Any] = {
        "message": message or f"The simulator was told to answer {status}.",
        "type": kind or usual_kind,
    }
    return json.dumps({"error": {**error, "param": None, "code": code or usual_code}}).encode()


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Overloaded"
