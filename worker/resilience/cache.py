"""Answers kept for exactly the same request: for when nobody answers any more, or to spare a call."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import structlog
from redis.asyncio import Redis

from worker.errors import Unreadable
from worker.job import Answer, ChatRequest
from worker.resilience.gate_store import TROUBLE, bounded

MOST_TEMPERATURE = 0.3
MOST_BYTES = 64 * 2**10
LEASE_S = 30.0  # of the one who asks for all; a dead one holds the others up no longer
POLL_S = 0.1
_VERSION = 1
_INDEX = "backstop:cache:index"
# What does not shape the answer.
_SHAPELESS = frozenset({"stream", "stream_options", "user", "metadata", "store", "service_tier"})

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Cached:
    """An answer given `age_s` seconds ago."""

    answer: Answer
    age_s: float


def cacheable(request: ChatRequest, *, any_temperature: bool) -> bool:
    """Whether the same request may be given the same answer again.

    It has a temperature of at most 0.3 or a seed, or `any_temperature` holds; no tools; one choice; and names no image or file by
    its URL, behind which there may be another one tomorrow.
    """
    parameters = request.parameters
    temperature = parameters.get("temperature")
    cold = isinstance(temperature, int | float) and temperature <= MOST_TEMPERATURE
    steady = any_temperature or cold or parameters.get("seed") is not None
    plain = not parameters.get("tools") and not parameters.get("functions") and parameters.get("n") in (None, 1)
    return steady and plain and '"http' not in json.dumps([_urls(message.get("content")) for message in request.messages])


def key(tenant: str, chain: str, request: ChatRequest) -> str:
    """The same for the same request of the same tenant to the same chain, and for nothing else. It tells nothing of them."""
    shaping = {name: value for name, value in request.parameters.items() if name not in _SHAPELESS}
    named = [_VERSION, tenant, chain, request.messages, shaping]
    return hashlib.sha256(json.dumps(named, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class AnswerCache:
    """Answers in Redis, by `key`, of all workers.

    At most `entries` of them, each of at most 64 KiB and as long as `put` says, so it never takes more than 640 MB (10,000 answers
    of a kilobyte: 12 MB); the oldest go first. Redis must not evict by itself, or breakers would go as well. It holds answers, never
    prompts. None of its methods raises: a Redis that is away knows no answer.
    """

    def __init__(self, redis: Redis, *, entries: int = 10_000) -> None:
        self._redis = redis
        self._entries = entries
        self._away = False

    async def get(self, name: str, *, at_most_s: float) -> Cached | None:
        """The answer, if it is not older than that by the server's clock."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.get(_value(name))
        pipeline.time()
        reply = await self._asked(pipeline.execute())
        if reply is None or reply[0] is None:
            return None
        (kept, (seconds, microseconds)) = reply
        stored_ms, _, body = kept.partition(b" ")
        age_s = max(0.0, seconds + microseconds / 1e6 - int(stored_ms) / 1000)
        try:
            return Cached(Answer.from_json(json.loads(body)), age_s) if age_s <= at_most_s else None
        except (Unreadable, ValueError):
            return None  # another version's

    async def put(self, name: str, answer: Answer, *, keep_s: float) -> None:
        """Kept for so long; nothing happens with a degraded, unfinished or large answer, or one that calls tools."""
        if answer.degraded or answer.age_s is not None or answer.finish_reason != "stop" or answer.tool_calls:
            return
        body = json.dumps(answer.to_json()).encode()
        if len(body) <= MOST_BYTES:
            await self._asked(self._redis.eval(_PUT, 2, _value(name), _INDEX, body, int(keep_s * 1000) or 1, self._entries))

    @asynccontextmanager
    async def alone(self, name: str, *, at_most_s: float, wait_s: float) -> AsyncIterator[Cached | None]:
        """The answer, for which others may have been waited for, up to `wait_s`; None for the one who now asks for all of them."""
        token, ends_s = uuid4().hex, time.monotonic() + min(wait_s, LEASE_S)
        found = await self.get(name, at_most_s=at_most_s)
        while found is None and not await self._leads(name, token) and time.monotonic() < ends_s:
            await asyncio.sleep(POLL_S)
            found = await self.get(name, at_most_s=at_most_s)
        try:
            yield found
        finally:
            if found is None:
                await self._asked(self._redis.eval(_RELEASE, 1, _lease(name), token))

    async def _leads(self, name: str, token: str) -> bool:
        await self._asked(self._redis.set(_lease(name), token, nx=True, px=int(LEASE_S * 1000)))
        holder = await self._asked(self._redis.get(_lease(name)))
        return holder is None or holder == token.encode()

    async def _asked(self, work: Awaitable[Any]) -> Any:
        """What Redis says, or None when it says nothing in time."""
        try:
            reply = await bounded(work)
        except TROUBLE as error:
            if not self._away:
                log.warning("cache_away", error=type(error).__name__)
            self._away = True
            return None
        self._away = False
        return reply


def _value(name: str) -> str:
    return f"backstop:cache:{name}"


def _lease(name: str) -> str:
    return f"backstop:cache:{name}:lease"


def _urls(content: Any) -> list[Any]:
    """The parts of a message that are no text; data: URLs are what they say."""
    return [part for part in content if isinstance(part, dict) and part.get("type") != "text"] if isinstance(content, list) else []


_PUT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('SET', KEYS[1], string.format('%.0f ', now) .. ARGV[1], 'PX', ARGV[2])
redis.call('ZADD', KEYS[2], now, KEYS[1])
local over = redis.call('ZCARD', KEYS[2]) - tonumber(ARGV[3])
if over > 0 then
  local oldest = redis.call('ZPOPMIN', KEYS[2], over)
  for i = 1, #oldest, 2 do redis.call('UNLINK', oldest[i]) end
end
"""

_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"
