"""Answers kept for exactly the same request: for when nobody answers any more, or to spare a call."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import structlog
from redis.asyncio import Redis

from worker.errors import Unreadable
from worker.job import Answer, ChatRequest
from worker.resilience.gate_store import TROUBLE, bounded

MOST_TEMPERATURE = 0.3
MOST_BYTES = 256 * 2**10
LEASE_S = 30.0  # of the one who asks for all; a dead one holds the others up no longer
POLL_S = 0.1
AWAY_S = 1.0  # so long a Redis that did not answer is not asked again: four round trips a job are nothing to wait for in vain
_VERSION = 1
_INDEX, _SIZES = "backstop:cache:index", "backstop:cache:sizes"
# What does not shape the answer.
_SHAPELESS = frozenset({"stream", "stream_options", "user", "metadata", "store", "service_tier"})
# With these, or with a search, the vendor looks something up or the caller has to.
_TOOLS = frozenset({"tools", "functions", "plugins"})

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Cached:
    """An answer given `age_s` seconds ago."""

    answer: Answer
    age_s: float


def cacheable(request: ChatRequest, *, any_temperature: bool) -> bool:
    """Whether the same request may be given the same answer again.

    It has a temperature of at most 0.3 or a seed, or `any_temperature` holds; no tools and no search; one choice; and names no
    image or file by its URL, behind which there may be another one tomorrow.
    """
    parameters = request.parameters
    temperature = parameters.get("temperature")
    cold = isinstance(temperature, int | float) and temperature <= MOST_TEMPERATURE
    steady = any_temperature or cold or parameters.get("seed") is not None
    looks_up = any(value for name, value in parameters.items() if name in _TOOLS or "search" in name)
    linked = any("://" in json.dumps(_attached(message.get("content"))) for message in request.messages)
    return steady and not looks_up and parameters.get("n") in (None, 1) and not linked


def key(tenant: str, chain: str, request: ChatRequest) -> str:
    """The same for the same request of the same tenant to the same chain, and for nothing else. It tells nothing of them."""
    shaping = {name: value for name, value in request.parameters.items() if name not in _SHAPELESS}
    named = [_VERSION, tenant, chain, request.messages, shaping]
    return hashlib.sha256(json.dumps(named, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class AnswerCache:
    """Answers in Redis, by `key`, of all workers.

    At most `entries` of them and `most_bytes` of text, each of at most 256 KiB and for as long as `put` says; the oldest go first.
    As it stands it never takes more than 100 MB (20,000 answers of a kilobyte: 35 MB). Redis must not evict by itself, or breakers
    would go as well. It holds answers, never prompts. None of its methods raises: a Redis that is away knows no answer.
    """

    def __init__(self, redis: Redis, *, entries: int = 20_000, most_bytes: int = 64 * 2**20) -> None:
        self._redis = redis
        self._bounds = (entries, most_bytes)
        self._away_until_s: float | None = None

    async def get(self, name: str, *, at_most_s: float) -> Cached | None:
        """The answer, if it is not older than that by the server's clock."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.get(_value(name))
        pipeline.time()
        reply = await self._asked(pipeline.execute)
        return _cached(*reply, at_most_s=at_most_s) if reply else None

    async def put(self, name: str, answer: Answer, *, keep_s: float) -> None:
        """Kept for so long; nothing happens with a degraded, unfinished or large answer, or one that calls tools."""
        if answer.degraded or answer.age_s is not None or answer.finish_reason != "stop" or answer.tool_calls:
            return
        body, keep_ms = json.dumps(answer.to_json()).encode(), int(keep_s * 1000)
        if len(body) <= MOST_BYTES and keep_ms > 0:
            await self._asked(partial(self._redis.eval, _PUT, 3, _value(name), _INDEX, _SIZES, body, keep_ms, *self._bounds))

    @asynccontextmanager
    async def alone(self, name: str, *, at_most_s: float, wait_s: float) -> AsyncIterator[Cached | None]:
        """The answer, for which somebody else may have been waited for; None for who has to ask now.

        Of those who want the same at once one asks, and the others wait for it: up to `wait_s`, at most 30 s, and for no second one
        when the first got nothing to keep, or the last of them would wait for all.
        """
        found, leads, token = await self.get(name, at_most_s=at_most_s), False, uuid4().hex
        try:
            if found is None:
                leads = True  # cancelled meanwhile, nobody knows
                found, leads = await self._awaited(name, token, at_most_s, min(wait_s, LEASE_S))
            yield found
        finally:
            if leads:
                await self._asked(partial(self._redis.eval, _RELEASE, 1, _lease(name), token))

    async def _awaited(self, name: str, token: str, at_most_s: float, wait_s: float) -> tuple[Cached | None, bool]:
        """What there is when the wait is over, and whether the lease is this one's now."""
        began_s, first = time.monotonic(), None
        while True:
            holder, found = await self._look(name, token, at_most_s)
            waited_s = time.monotonic() - began_s
            first = first or holder
            if found is not None or holder is None or holder != first or waited_s >= wait_s:
                return found, holder is None
            await asyncio.sleep(min(max(POLL_S, waited_s / 8), wait_s - waited_s))

    async def _look(self, name: str, token: str, at_most_s: float) -> tuple[bytes | None, Cached | None]:
        """Who else has the lease, None when it was free and taken; and then the answer: it is put before its lease is let go."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.set(_lease(name), token, nx=True, get=True, px=int(LEASE_S * 1000))
        pipeline.get(_value(name))
        pipeline.time()
        reply = await self._asked(pipeline.execute)
        return (reply[0], _cached(*reply[1:], at_most_s=at_most_s)) if reply else (None, None)

    async def _asked(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """What Redis says, or None when it says nothing in time, or did not a moment ago."""
        if self._away_until_s is not None and time.monotonic() < self._away_until_s:
            return None
        try:
            reply = await bounded(ask())
        except TROUBLE as error:
            if self._away_until_s is None:
                log.warning("cache_away", error=type(error).__name__)
            self._away_until_s = time.monotonic() + AWAY_S
            return None
        self._away_until_s = None
        return reply


def _value(name: str) -> str:
    return f"backstop:cache:{name}"


def _lease(name: str) -> str:
    return f"backstop:cache:{name}:lease"


def _cached(kept: bytes | None, now: tuple[int, int], *, at_most_s: float) -> Cached | None:
    """What `put` wrote, if it is not too old; None also for what another version wrote."""
    stored_us, _, body = (kept or b"").partition(b" ")
    try:
        age_s = max(0.0, now[0] + (now[1] - int(stored_us)) / 1e6)
        return Cached(Answer.from_json(json.loads(body)), age_s) if age_s <= at_most_s else None
    except (Unreadable, ValueError):
        return None


def _attached(content: Any) -> list[Any]:
    """The parts of a message that are no text."""
    return [part for part in content if isinstance(part, dict) and part.get("type") != "text"] if isinstance(content, list) else []


_PUT = Path(__file__).with_name("cache.lua").read_text("utf-8")
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"
