"""Around every request: an id, a bounded body, and nothing internal on the way out."""

from __future__ import annotations

import logging
import re
import traceback

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.paths import path_of
from api.problems import problem
from worker.job import new_id

MAX_BODY_BYTES = 1024 * 1024
MAX_FILE_BYTES = 200 * 1024 * 1024  # as OpenAI's, for a batch

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_log = structlog.get_logger()


class Envelope:
    """Gives a request its id (the client's own if that is a plain one), bounds its body, masks what nobody handled."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id().hex
        scope.setdefault("state", {})["request_id"] = request_id
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self._serve(scope, _bounded(scope, receive), _signed(send, request_id))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def sent(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except BrokenOff:
            raise
        except Exception as error:
            # Frames only: the message of a driver's or a client's exception may hold a prompt.
            where = traceback.format_list(traceback.extract_tb(error.__traceback__)[-5:])
            _log.error("request_failed", error=type(error).__name__, path=scope["path"], where=where)
            if started:
                raise BrokenOff from None
            answer = problem(Request(scope), 500, "something went wrong here; the log knows more under this request_id")
            await answer(scope, receive, send)


def _bounded(scope: Scope, receive: Receive) -> Receive:
    """Of a form with a file, what is no file is bounded like any other body."""
    most = MAX_BODY_BYTES + (MAX_FILE_BYTES if path_of(scope) == "/v1/files" else 0)
    size = 0

    async def bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            raise HTTPException(413, f"a request may have {most} bytes at most")
        return message

    return bounded


class BrokenOff(Exception):
    """A response that has begun cannot be finished: the server closes the connection, so that the client sees it.

    Who raises it has logged why.
    """


def news(record: logging.LogRecord) -> bool:
    """The filter of the server's log: it has nothing to add to what was broken off."""
    return record.exc_info is None or not isinstance(record.exc_info[1], BrokenOff)


def _signed(send: Send, request_id: str) -> Send:
    async def signed(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["X-Request-ID"] = request_id
        await send(message)

    return signed
