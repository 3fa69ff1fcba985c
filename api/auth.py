"""Who is calling: `Authorization: Bearer KEY`, always (RFC 6750)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated

import structlog
from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from sqlalchemy.exc import DBAPIError
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Connection

from api.envelope import BrokenOff
from api.parts import Parts
from api.paths import path_of
from api.rate import Meter
from worker import keys

CHECK_S = 1.0  # for so long a stream goes on under a key that was revoked

_log = structlog.get_logger()
_BEARER = HTTPBearer(auto_error=False, description="An API key, as `backstop keys create` prints it.")


class Doorkeeper:
    """Nobody without a key that works gets past it under /v1: no body is read, no path looked up, nothing told of what there is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._meter = Meter()

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and path_of(scope).startswith("/v1"):
            request = Request(scope)
            caller = request.state.caller = await _caller(request)
            send = await self._meter.counted(request.app.state.parts.redis, caller, send)
            send = _while_it_works(request, send)
        await self._app(scope, receive, send)


async def _caller(request: Request) -> keys.Caller:
    """The holder of the key; 401 without one that works."""
    scheme, secret = get_authorization_scheme_param(request.headers.get("authorization"))
    if scheme.lower() != "bearer" or not secret:
        raise HTTPException(401, "send your API key as `Authorization: Bearer KEY`", {"WWW-Authenticate": "Bearer"})
    parts = request.app.state.parts
    assert isinstance(parts, Parts)
    caller = await parts.callers.ask(secret)
    if caller is None:
        challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
        raise HTTPException(401, "this API key is not known here, or it was revoked", challenge)
    return caller


def _while_it_works(request: Request, send: Send) -> Send:
    """`send` for the answer to whoever had a key when asking. Raises BrokenOff in the middle of a stream if the key was revoked since."""
    clock = asyncio.get_running_loop().time
    checked_at = clock()

    async def sent(message: Message) -> None:
        nonlocal checked_at
        if message.get("more_body") and clock() - checked_at >= CHECK_S:
            checked_at = clock()
            try:
                await _caller(request)
            except HTTPException:
                _log.info("stream_broken_off", why="its key was revoked", key_id=str(request.state.caller.key_id))
                raise BrokenOff from None
            except DBAPIError:
                pass  # without Postgres no key can be revoked, and a stream lives through its absence
        await send(message)

    return sent


def allowed(scope: keys.Scope) -> Callable[[Request, object], Awaitable[keys.Caller]]:
    """The holder of a key that may do this; 403 for one that may not."""

    async def check(request: Request, documented: Annotated[object, Depends(_BEARER)]) -> keys.Caller:
        caller = request.state.caller
        assert isinstance(caller, keys.Caller)
        if scope not in caller.scopes:
            challenge = {"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{scope}"'}
            raise HTTPException(403, f"this API key may not {scope}: use one with the scope `{scope}`", challenge)
        return caller

    return check


Reads = Annotated[keys.Caller, Depends(allowed(keys.Scope.READ))]
Submits = Annotated[keys.Caller, Depends(allowed(keys.Scope.SUBMIT))]
Operates = Annotated[keys.Caller, Depends(allowed(keys.Scope.OPERATE))]
