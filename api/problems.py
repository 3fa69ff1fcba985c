"""Errors as RFC 9457 problems; around every request an id, a bounded body, and nothing internal on the way out."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker.errors import BackstopError, NotFound, Unreachable, Unreadable
from worker.job import new_id

MEDIA_TYPE = "application/problem+json"
MAX_BODY_BYTES = 1024 * 1024

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_log = structlog.get_logger()


class Fault(BaseModel):
    field: str
    message: str


class Problem(BaseModel):
    """RFC 9457. `detail` says what is wrong and what to do; `errors` names the fields that cannot be used."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    errors: list[Fault] | None = None
    reasons: list[str] | None = None


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of the problems a route answers with."""
    content = {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def problem(
    request: Request,
    status: int,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    errors: list[Fault] | None = None,
    reasons: list[str] | None = None,
) -> Response:
    """The answer to a request that could not be served."""
    body = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        instance=request.url.path,
        request_id=request.state.request_id,
        errors=errors,
        reasons=reasons,
    )
    return Response(json.dumps(body.model_dump(exclude_none=True)), status, headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Every error of this app leaves as a problem, every response with its X-Request-ID."""
    app.add_middleware(Envelope)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(BackstopError, _mistake)
    for kind in (OperationalError, InterfaceError, InternalError, PoolTimeout):
        app.add_exception_handler(kind, _database_away)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(request, error.status_code, str(error.detail), headers=error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Only where and why: pydantic's `input` would send the prompt back, and into logs.
    faults = [
        Fault(field=".".join(str(part) for part in fault["loc"])[:200], message=fault["msg"].removeprefix("Value error, "))
        for fault in error.errors()[:20]
    ]
    detail = "; ".join(f"{fault.field}: {fault.message}" for fault in faults[:3])
    return problem(request, 422, detail, errors=faults)


async def _mistake(request: Request, error: Exception) -> Response:
    match error:
        case NotFound():
            return problem(request, 404, str(error))
        case Unreachable():
            return problem(request, 503, str(error), headers={"Retry-After": "1"})
        case Unreadable():
            return problem(request, 500, str(error))
        case _:
            return problem(request, 422, str(error))


async def _database_away(request: Request, error: Exception) -> Response:
    _log.error("database_unreachable", error=type(error).__name__)
    return problem(request, 503, "Postgres does not answer at the moment: try again", headers={"Retry-After": "1"})


class Envelope:
    """Gives a request its id (the client's own if that is a plain one), bounds its body, masks what nobody handled."""

    def __init__(self, app: ASGIApp, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id().hex
        scope.setdefault("state", {})["request_id"] = request_id
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self._serve(scope, self._bounded(receive), _signed(send, request_id))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def sent(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except Exception as error:
            # Frames only: the message of a driver's or a client's exception may hold a prompt.
            where = traceback.format_list(traceback.extract_tb(error.__traceback__)[-5:])
            _log.error("request_failed", error=type(error).__name__, path=scope["path"], where=where)
            if started:
                raise BrokenOff from None
            answer = problem(Request(scope), 500, "something went wrong here; the log knows more under this request_id")
            await answer(scope, receive, send)

    def _bounded(self, receive: Receive) -> Receive:
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body_bytes:
                raise HTTPException(413, f"a request may have {self._max_body_bytes} bytes at most")
            return message

        return bounded


class BrokenOff(Exception):
    """A response that has begun cannot be finished: the server closes the connection, so that the client sees it."""


def _signed(send: Send, request_id: str) -> Send:
    async def signed(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["X-Request-ID"] = request_id
        await send(message)

    return signed
