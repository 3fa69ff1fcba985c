"""How often a key may be used: so many requests a minute, over all processes of the API.

All of a minute's requests may come at once; then the allowance comes back evenly, one request each 60/rpm seconds (`rate.lua`, GCRA).
While Redis is away every key may do what it likes: a limit is there to keep order, and its loss must not stop work.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import structlog
from fastapi import HTTPException
from redis.asyncio import Redis
from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from worker.keys import Caller
from worker.resilience.gate_store import TROUBLE, bounded

AT_ONCE = 50  # half of what the client may open connections: one more, and Redis would seem to be away
_SCRIPT = Path(__file__).with_suffix(".lua").read_text("utf-8")

_log = structlog.get_logger()


class Meter:
    """Counts the requests of keys that have a limit. One per process."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def counted(self, redis: Redis, caller: Caller, send: Send) -> Send:
        """`send` for a request that has counted: its answer says what is left. Raises HTTPException, a 429, when nothing was.

        Costs one round trip, or nothing for a key without a limit.
        """
        if caller.rpm is None:
            return send
        try:
            async with self._turns:
                found: Any = await bounded(redis.eval(_SCRIPT, 1, f"backstop:rate:{caller.key_id}", caller.rpm))
        except TROUBLE as error:
            _log.warning("rate_not_limited", key_id=str(caller.key_id), error=type(error).__name__)
            return send
        left, wait_ms = found
        if wait_ms:
            detail = f"this API key may be used {caller.rpm} times a minute: wait as long as Retry-After says"
            raise HTTPException(429, detail, {"Retry-After": str(math.ceil(wait_ms / 1000)), **_headers(caller.rpm, 0)})
        return _telling(send, _headers(caller.rpm, left))


def _telling(send: Send, headers: dict[str, str]) -> Send:
    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(headers)
        await send(message)

    return told


def _headers(rpm: int, left: int) -> dict[str, str]:
    """https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers"""
    return {"RateLimit-Policy": f'"rpm";q={rpm};w=60', "RateLimit": f'"rpm";r={left}'}
