"""The gate of a provider: whether it may be called now, known to every worker at once through Redis.

Ask `admit` before each HTTP call; when it is allowed, `report` after it, always and once. Breaker, limits and retry
budget are asked together. Without Redis the same rules hold within this process.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from itertools import count
from secrets import token_hex
from types import MappingProxyType
from typing import Literal, TypeVar

import structlog
from redis.asyncio import Redis

from worker.errors import Unreachable
from worker.grouping import Group
from worker.job import Lane
from worker.resilience import histogram
from worker.resilience.admission import Admission, Denial, Ending, Extra
from worker.resilience.breaker_rules import RULES
from worker.resilience.budget import nano
from worker.resilience.circuit import BreakerState
from worker.resilience.gate_store import TROUBLE, GateStore, Sight, Snapshot
from worker.resilience.health import Health, Status, describe
from worker.resilience.limits import Limits
from worker.resilience.local import Answer, Ask, LocalGate, Tell, milliseconds
from worker.signals import Verdict

__all__ = ["Admission", "BreakerState", "Denial", "Ending", "Extra", "Gates", "Health", "Limits", "Status"]

DENIAL_KEPT_MS = 1_000  # a breaker's no is believed for so long; a yes is never kept
SNAPSHOT_KEPT_MS = 30_000  # what Redis said longer ago is no ground for local mode
CHECK_AGAIN_S = 1.0
LATENCIES_KEPT_MS = 10_000
LEAST_SAMPLES = 200  # fewer say nothing about a 95th percentile
LEAST_P95_S = 1.0
_COSTS = {None: 0, Extra.RETRY: 1, Extra.AFTER_TIMEOUT: 2}
T = TypeVar("T")
_log = structlog.get_logger()


class _Lost(Exception):
    """Redis does not answer: the rules hold within this process."""


@dataclass(slots=True, eq=False)
class _Wanted:
    """An admission on its way. `given_up`: whoever asked was cancelled meanwhile."""

    provider: str
    ask: Ask
    extra: Extra | None
    admission: Admission | None = None
    given_up: bool = False


class Gates:
    """The gates of all providers, for one event loop. Only `force` raises; a job is never failed for want of Redis.

    `fleet`: how many workers live, which divides the limits when each has to keep them alone. When Redis is lost, each
    provider goes on from what was last seen of it, if that is at most 30 s old, else closed, and with empty buckets.
    Redis is asked again every second; when it answers, what was counted here is dropped.
    """

    def __init__(
        self,
        redis: Redis | None,
        limits: Mapping[str, Limits] = MappingProxyType({}),
        *,
        rng: Callable[[], float] = random.random,
        fleet: Callable[[], int] = lambda: 1,
    ) -> None:
        self._store = GateStore(redis, limits) if redis is not None else None
        self._limits = limits
        self._rng = rng
        self._fleet = fleet
        self._admits = Group(self._send_admits)
        self._reports = Group(self._send_reports)
        self._seen: dict[str, tuple[Sight, int]] = {}  # and when
        self._p95_s: dict[str, tuple[float | None, int]] = {}  # and when
        self._local: dict[str, LocalGate] | None = None if redis is not None else {}  # not None: local mode
        self._restoring: asyncio.Task[None] | None = None
        self._giving_back: set[asyncio.Task[None]] = set()
        self._name, self._number = token_hex(8), count()

    async def admit(
        self,
        provider: str,
        *,
        lease_s: float,
        tokens: int = 0,
        lane: Lane = Lane.INTERACTIVE,
        extra: Extra | None = None,
    ) -> Admission:
        """Whether a call may go to `provider` now. One round trip, shared by all who ask meanwhile.

        `lease_s`: how long the call counts as in flight, and a probe keeps others out, when nobody reports it: the call's
        own limit and a little more. `tokens`: what it is expected to use, in and out. `extra`: it is no first call. A
        breaker's denial is believed for up to a second, an admission never.
        """
        if (waiting_ms := self._denied_for_ms(provider)) > 0:
            sight = self._seen[provider][0]
            held = sight.look.state in (BreakerState.CLOSED, BreakerState.FORCED_CLOSED)
            return Answer(Denial.BLOCKED if held else Denial.BREAKER, waiting_ms, False, 0).admission(*sight, "", extra)
        lease, draw = f"{self._name}{next(self._number):x}", int(self._rng() * 1000)
        ask = Ask(lease, milliseconds(lease_s), max(0, tokens), lane is Lane.BULK, _COSTS[extra], draw)
        with suppress(_Lost):
            return await self._asked(_Wanted(provider, ask, extra))
        gate, now = self._gate(provider), _now_ms()
        (answer,) = gate.admit(now, [ask])
        look = gate.circuit.look(now)
        return answer.admission(look._replace(generation=-look.generation), gate.meter.multiplier, lease, extra)

    async def report(self, provider: str, admission: Admission, ending: Ending) -> None:
        """The call that `admission` allowed has ended, and has counted; the breaker forgets it when it has moved on since.

        A second report of the same admission changes nothing.
        """
        if not admission.allowed:
            return
        tell = Tell.of(admission, ending)
        if admission.generation > 0:
            with suppress(_Lost):
                await self._reports.ask((provider, tell))
                return
        if self._local is None:
            return
        gate, now = self._gate(provider), _now_ms()
        if admission.generation > 0:  # reserved in Redis: here only the breaker has a use for it
            gate.circuit.report(now, tell.report(survivors=0), self._jitter())
        else:
            gate.report(now, [tell], self._jitter())

    async def may_hedge(self, provider: str, *, cost_usd: Decimal | None) -> bool:
        """Whether another provider may be asked because `provider` is slow. When it may, the hedge is drawn from the allowance
        of `provider`: 2 % of its ordinary calls, 5 % of their cost, and a retry of its budget. Never in local mode.

        `cost_usd`: of the hedge; one of unknown cost is not allowed.
        """
        if cost_usd is not None:
            with suppress(_Lost):
                return await self._shared(lambda store: store.hedge(provider, nano(cost_usd)))
        return False

    async def p95_s(self, provider: str) -> float | None:
        """The 95th percentile of what its answered calls took in the last ten minutes, at least 1 s; None when fewer than
        200 are known. Up to 10 s old, and within 10 % of the truth."""
        known, at = self._p95_s.get(provider, (None, -LATENCIES_KEPT_MS))
        if (now := _now_ms()) - at < LATENCIES_KEPT_MS:
            return known
        self._p95_s[provider] = known, now  # who asks meanwhile makes do with the last one
        with suppress(_Lost):
            counts = await self._shared(lambda store: store.latencies(provider))
            enough = sum(counts.values()) >= LEAST_SAMPLES
            known = max(LEAST_P95_S, histogram.quantile_ms(counts, 0.95) / 1000) if enough else None
            self._p95_s[provider] = known, now
        return known

    def seems_closed(self, provider: str) -> bool:
        """Whether `provider` took calls when last heard of; True when nothing is known. A guess: no round trip."""
        if self._local is not None:
            look, at = self._gate(provider).circuit.look(_now_ms()), _now_ms()
        elif provider in self._seen:
            (look, _), at = self._seen[provider]
        else:
            return True
        return look.state in (BreakerState.CLOSED, BreakerState.FORCED_CLOSED) and at + look.retry_ms <= _now_ms()

    async def status(self, providers: Sequence[str]) -> list[Status]:
        """How they are, in the order asked; from Redis, or `local` when it does not answer."""
        with suppress(_Lost):
            now, snapshots = await self._shared(lambda store: store.snapshots(providers))
            return [describe(p, snapshot, now, local=False) for p, snapshot in zip(providers, snapshots, strict=True)]
        now = _now_ms()
        gates = [(provider, self._gate(provider)) for provider in providers]
        return [describe(p, Snapshot(g.circuit, g.meter, g.meter.in_flight(now)), now, local=True) for p, g in gates]

    async def force(self, provider: str, state: Literal["open", "closed", "reset"]) -> Status:
        """An operator's word, obeyed by every worker within a second. `open` and `closed` stand until `reset`, which
        forgets everything the breaker knows, and what congestion made of the limits.

        Raises Unreachable when Redis does not answer.
        """
        if self._store is None:
            raise Unreachable("breakers are not shared here, so none can be forced: set REDIS_URL")
        try:
            self._see({provider: await self._store.force(provider, state)})
            now, (snapshot,) = await self._store.snapshots([provider])
        except TROUBLE as error:
            raise Unreachable(
                f"Redis does not answer ({type(error).__name__}), so the breaker of {provider} may be unchanged: "
                "check REDIS_URL, or run `backstop doctor`"
            ) from None
        return describe(provider, snapshot, now, local=False)

    async def aclose(self) -> None:
        """No task of this object runs any more. The Redis client stays open: it was given."""
        if self._restoring is not None:
            self._restoring.cancel()
            with suppress(asyncio.CancelledError):
                await self._restoring
        await asyncio.gather(*self._giving_back)

    async def _asked(self, wanted: _Wanted) -> Admission:
        """Cancelled meanwhile, what was reserved is given back: nobody else would."""
        try:
            return await self._admits.ask(wanted)
        except asyncio.CancelledError:
            wanted.given_up = True
            self._give_back(wanted)
            raise

    def _give_back(self, wanted: _Wanted) -> None:
        if wanted.given_up and wanted.admission is not None:
            never_sent = Ending(verdict=Verdict.NEUTRAL, sent=False)
            task = asyncio.create_task(self.report(wanted.provider, wanted.admission, never_sent))
            self._giving_back.add(task)
            task.add_done_callback(self._giving_back.discard)

    async def _send_admits(self, asked: Sequence[_Wanted]) -> list[Admission]:
        asks: defaultdict[str, list[Ask]] = defaultdict(list)
        for wanted in asked:
            asks[wanted.provider].append(wanted.ask)
        replies = await self._shared(lambda store: store.admit(asks))
        self._see({provider: sight for provider, (sight, _) in replies.items()})
        answers, admissions = {provider: iter(of) for provider, (_, of) in replies.items()}, []
        for wanted in asked:
            sight, answer = replies[wanted.provider][0], next(answers[wanted.provider])
            wanted.admission = answer.admission(*sight, wanted.ask.lease, wanted.extra)
            admissions.append(wanted.admission)
            self._give_back(wanted)
        return admissions

    async def _send_reports(self, heard: Sequence[tuple[str, Tell]]) -> list[None]:
        tells: defaultdict[str, list[Tell]] = defaultdict(list)
        for provider, tell in heard:
            tells[provider].append(tell)
        self._see(await self._shared(lambda store: store.report(tells, self._jitter())))
        return [None] * len(heard)

    def _see(self, sights: Mapping[str, Sight]) -> None:
        now = _now_ms()
        self._seen.update({provider: (sight, now) for provider, sight in sights.items()})

    def _denied_for_ms(self, provider: str) -> int:
        """How long still, when the breaker's denial not older than a second says so; 0 or less when it has to be asked."""
        if self._local is not None or provider not in self._seen:
            return 0
        (sight, at), now = self._seen[provider], _now_ms()
        return at + sight.look.retry_ms - now if now < at + DENIAL_KEPT_MS else 0

    def _jitter(self) -> int:
        return int(self._rng() * (RULES.jitter_permille + 1))

    def _gate(self, provider: str) -> LocalGate:
        """This process's own gate, begun from what was last seen."""
        local = self._local if self._local is not None else {}  # restored this moment: one last answer of its own
        if provider not in local:
            now, share = _now_ms(), self._limits.get(provider, Limits()).shared_by(self._fleet())
            sight, at = self._seen.get(provider, (None, 0))
            seen = (*sight, now - at) if sight is not None and now - at <= SNAPSHOT_KEPT_MS else None
            local[provider] = LocalGate.begun(share, now, seen, full=self._store is None)
        return local[provider]

    async def _shared(self, work: Callable[[GateStore], Awaitable[T]]) -> T:
        """What Redis answers; raises _Lost in local mode, which its silence begins: nobody waits for it twice."""
        if self._local is not None or self._store is None:
            raise _Lost
        try:
            return await work(self._store)
        except TROUBLE as error:
            if self._local is None:
                self._local = {}
                _log.warning("coordination_lost", error=type(error).__name__)
                self._restoring = asyncio.create_task(self._restore())
            raise _Lost from None

    async def _restore(self) -> None:
        assert self._store is not None
        while self._local is not None:
            await asyncio.sleep(CHECK_AGAIN_S)
            with suppress(*TROUBLE):
                await self._store.check()
                self._local = None
                self._seen.clear()
                _log.info("coordination_restored")


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
