"""Gates in Redis: five keys for each provider, one script, one round trip for whatever goes out together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from worker.resilience import breaker_rules, budget, histogram, limits
from worker.resilience.admission import Denial
from worker.resilience.circuit import BreakerState, Circuit, Force, Look
from worker.resilience.limits import Limits, Meter
from worker.resilience.local import RAMP_WAIT_MS, Answer, Ask, Tell

# What a Redis raises that does not answer: RuntimeError is uvloop's for a connection just closed, ValueError an answer
# that makes no sense; OSError covers TimeoutError.
TROUBLE = (RedisError, OSError, RuntimeError, ValueError)
_LOOKS = 10
ROUND_TRIP_S = 0.2  # 100 ms to connect and 100 ms to answer: a gate that holds up its job has failed
KEYS = ("breaker", "limits", "flying", "budget", "latency")


def _script() -> str:
    """The rules as numbers, then each part as a function, then what calls them."""
    rules = breaker_rules.RULES._asdict() | limits.RULES._asdict() | budget.RULES._asdict()
    rules |= {"ramp_wait_ms": RAMP_WAIT_MS, "period_ms": histogram.PERIOD_MS, "periods": histogram.PERIODS}
    texts = {name: Path(__file__).with_name(f"{name}.lua").read_text("utf-8") for name in ("circuit", "limits", "budget", "gate")}
    parts = {"circuit_of": texts["circuit"], "meter_of": texts["limits"], "budget_of": texts["budget"]}
    lines = [f"local rules = {{{', '.join(f'{name} = {value!r}' for name, value in rules.items())}}}"]
    lines += [f"local function {name}(...)\n{text}end" for name, text in parts.items()]
    return "\n".join([*lines, texts["gate"]])


SCRIPT = _script()
T = TypeVar("T")


class Sight(NamedTuple):
    """What one round trip showed of a provider: its breaker, and its limits' multiplier."""

    look: Look
    multiplier: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All there is to say about one provider. `in_flight`: calls whose leases have not ended."""

    circuit: Circuit
    meter: Meter
    in_flight: int


def key(provider: str, part: str = "breaker") -> str:
    """The name of one of a provider's `KEYS`; all of them are in one slot of a cluster."""
    return f"backstop:{{p:{provider}}}:{part}"


def keys(provider: str) -> list[str]:
    return [key(provider, part) for part in KEYS]


def wire(of: Limits) -> list[int]:
    return [of.rpm or 0, of.tpm or 0, of.concurrency or 0]


def admit_argument(of: Limits, asks: Sequence[Ask]) -> str:
    return json.dumps([wire(of), asks])


def report_argument(of: Limits, jitter: int, tells: Sequence[Tell]) -> str:
    return json.dumps([wire(of), jitter, tells])


def to_answers(reply: Any) -> tuple[Sight, list[Answer]]:
    look, multiplier, answers = json.loads(reply)
    sight = Sight(Look(BreakerState(look[0]), look[1], look[2], look[3], look[4] == 1, look[5]), multiplier / 1000)
    return sight, [Answer(Denial(why) if why else None, wait_ms, probe, tokens) for why, wait_ms, probe, tokens in answers or ()]


class GateStore:
    """Every method is one round trip, but for the two of `snapshots`; each answers within `ROUND_TRIP_S`, or one of `TROUBLE` is raised."""

    def __init__(self, redis: Redis, limits: Mapping[str, Limits]) -> None:
        self._redis = redis
        self._limits = limits
        self._sha = ""

    async def admit(self, asks: Mapping[str, Sequence[Ask]]) -> dict[str, tuple[Sight, list[Answer]]]:
        """By provider, what was answered to its asks in their order. What is allowed is reserved, under the lease it named."""
        replies = await self._run({p: ["admit", "", admit_argument(self._of(p), of)] for p, of in asks.items()})
        return {provider: to_answers(reply) for provider, reply in replies.items()}

    async def report(self, tells: Mapping[str, Sequence[Tell]], jitter: int) -> dict[str, Sight]:
        """What was told has counted, each provider's in its order and each lease once."""
        replies = await self._run({p: ["report", "", report_argument(self._of(p), jitter, of)] for p, of in tells.items()})
        return {provider: to_answers(reply)[0] for provider, reply in replies.items()}

    async def force(self, provider: str, word: Force) -> Sight:
        replies = await self._run({provider: ["force", "", json.dumps([wire(self._of(provider)), word])]})
        return to_answers(replies[provider])[0]

    async def hedge(self, provider: str, cost: int) -> bool:
        """Whether a hedge that costs so many thousand-millionths of a dollar was drawn from the provider's allowance."""
        return bool((await self._run({provider: ["hedge", "", json.dumps(cost)]}))[provider])

    async def latencies(self, provider: str) -> dict[int, int]:
        """Counts of the last ten minutes by bucket of the histogram."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.time()
        pipeline.hgetall(key(provider, "latency"))
        time, fields = await bounded(pipeline.execute())
        return histogram.recent(_texts(fields).items(), _milliseconds(time))

    async def snapshots(self, providers: Sequence[str]) -> tuple[int, list[Snapshot]]:
        """The server's clock in ms, and the gates as they stand."""
        now = _milliseconds(await bounded(self._redis.time()))
        pipeline = self._redis.pipeline(transaction=False)
        for provider in providers:
            pipeline.hgetall(key(provider))
            pipeline.hgetall(key(provider, "limits"))
            pipeline.zcount(key(provider, "flying"), f"({now}", "+inf")
        replies = iter(await bounded(pipeline.execute()))
        return now, [
            Snapshot(Circuit.from_fields(_texts(breaker), now), Meter.from_fields(_texts(levels), self._of(provider), now), flying)
            for provider, breaker, levels, flying in zip(providers, replies, replies, replies, strict=True)
        ]

    async def check(self) -> None:
        """Redis answers and takes writes; a read alone would not show a full or a read-only one."""
        await bounded(cast(Awaitable[Any], self._redis.set("backstop:gate:check", "1", px=1000)))

    def _of(self, provider: str) -> Limits:
        return self._limits.get(provider, Limits())

    async def _run(self, calls: Mapping[str, list[str]]) -> dict[str, Any]:
        return await bounded(self._evaluate(calls))

    async def _evaluate(self, calls: Mapping[str, list[str]]) -> dict[str, Any]:
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
        return replies

    async def _send(self, calls: Mapping[str, list[str]]) -> dict[str, Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for provider, arguments in calls.items():
            pipeline.evalsha(self._sha, len(KEYS), *keys(provider), *arguments)
        return dict(zip(calls, await pipeline.execute(raise_on_error=False), strict=True))

    async def _load(self) -> None:
        self._sha = await self._redis.script_load(SCRIPT)


async def bounded(work: Awaitable[T]) -> T:
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


def _texts(fields: Mapping[Any, Any]) -> dict[str, str]:
    return {_text(name): _text(value) for name, value in fields.items()}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _milliseconds(time: tuple[int, int]) -> int:
    seconds, microseconds = time
    return seconds * 1000 + microseconds // 1000
