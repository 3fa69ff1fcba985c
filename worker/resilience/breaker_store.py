"""Circuits in Redis: one hash for each provider, one script, one round trip for whatever goes out together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar, cast

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from worker.resilience.circuit import RULES, BreakerState, Circuit, Force, Look, Report

# What a Redis raises that does not answer: RuntimeError is uvloop's for a connection just closed, ValueError an answer
# that makes no sense; OSError covers TimeoutError.
TROUBLE = (RedisError, OSError, RuntimeError, ValueError)
_LOOKS = 10
ROUND_TRIP_S = 0.2  # 100 ms to connect and 100 ms to answer: a breaker that holds up its job has failed

_RULES_LUA = ", ".join(f"{name} = {value}" for name, value in RULES._asdict().items())
SCRIPT = f"local rules = {{{_RULES_LUA}}}\n" + Path(__file__).with_name("circuit.lua").read_text("utf-8")

T = TypeVar("T")


def key(provider: str) -> str:
    return f"backstop:{{p:{provider}}}:breaker"


def admit_arguments(lease: str, lease_ms: int) -> list[str | int]:
    return [lease, lease_ms]


def report_arguments(reports: Sequence[Report], jitter: int) -> list[str | int]:
    """Equal reports that follow each other travel once, with their number."""
    arguments: list[str | int] = [jitter]
    for report, run in groupby(reports):
        arguments += [len(list(run)), report.generation, report.lease, report.verdict.value, int(report.slow)]
        arguments += [report.block_ms, report.isolate_ms, report.reason]
    return arguments


def to_look(reply: Sequence[Any]) -> Look:
    return Look(BreakerState(_text(reply[0])), reply[1], reply[2], reply[3], reply[4] == 1, reply[5])


class BreakerStore:
    """Every method is one round trip and answers within `ROUND_TRIP_S`, or raises one of `TROUBLE`."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._sha = ""

    async def admit(self, leases_ms: Mapping[str, int], lease: str) -> dict[str, Look]:
        """Looks by provider. Where `probe` is set, `lease` now holds that provider's only probe for so long."""
        return await self._run({p: ["admit", "", *admit_arguments(lease, ms)] for p, ms in leases_ms.items()})

    async def report(self, reports: Mapping[str, Sequence[Report]], jitter: int) -> dict[str, Look]:
        """The reports have counted, each provider's in their order."""
        return await self._run({p: ["report", "", *report_arguments(rs, jitter)] for p, rs in reports.items()})

    async def force(self, provider: str, word: Force) -> Look:
        return (await self._run({provider: ["force", "", word]}))[provider]

    async def circuits(self, providers: Sequence[str]) -> tuple[int, list[Circuit]]:
        """The server's clock in ms, and the circuits as they stand."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.time()
        for provider in providers:
            pipeline.hgetall(key(provider))
        (seconds, microseconds), *hashes = await _bounded(pipeline.execute())
        now = seconds * 1000 + microseconds // 1000
        return now, [Circuit.from_fields({_text(k): _text(v) for k, v in h.items()}, now) for h in hashes]

    async def check(self) -> None:
        """Redis answers and takes writes; a read alone would not show a full or a read-only one."""
        await _bounded(cast(Awaitable[Any], self._redis.set("backstop:breaker:check", "1", px=1000)))

    async def _run(self, calls: Mapping[str, list[str | int]]) -> dict[str, Look]:
        return await _bounded(self._evaluate(calls))

    async def _evaluate(self, calls: Mapping[str, list[str | int]]) -> dict[str, Look]:
        if not self._sha:
            await self._load()
        replies = await self._send(calls)
        unknown = {p: calls[p] for p, reply in replies.items() if isinstance(reply, NoScriptError)}
        if unknown:  # another server, or one that was restarted: those calls did nothing yet
            await self._load()
            replies |= await self._send(unknown)
        for reply in replies.values():
            if isinstance(reply, Exception):
                raise reply
        return {provider: to_look(reply) for provider, reply in replies.items()}

    async def _send(self, calls: Mapping[str, list[str | int]]) -> dict[str, Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for provider, arguments in calls.items():
            pipeline.evalsha(self._sha, 1, key(provider), *arguments)
        return dict(zip(calls, await pipeline.execute(raise_on_error=False), strict=True))

    async def _load(self) -> None:
        self._sha = await self._redis.script_load(SCRIPT)


async def _bounded(work: Awaitable[T]) -> T:
    """What `work` returns, within `ROUND_TRIP_S`, else TimeoutError.

    The time is told by looks at the reply: an event loop that is held up takes longer over each of them, so Redis is
    never blamed for a reply that nobody has read yet.
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(_retrieve)
    try:
        for _ in range(_LOOKS):
            done, _pending = await asyncio.wait({task}, timeout=ROUND_TRIP_S / _LOOKS)
            if done:
                return task.result()
        raise TimeoutError
    finally:
        task.cancel()


def _retrieve(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
