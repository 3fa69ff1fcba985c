"""The circuit breaker: whether a provider may be asked now, known to every worker at once through Redis.

Ask `admit` before a call; when it is allowed, `report` after it, always. Without Redis the same rules hold
within this process.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeVar
from uuid import uuid4

import structlog
from redis.asyncio import Redis

from worker.errors import Unreachable
from worker.grouping import Group
from worker.resilience.breaker_store import TROUBLE, BreakerStore
from worker.resilience.circuit import RULES, BreakerState, Circuit, Look, Report
from worker.resilience.health import Health, Status, describe
from worker.signals import Verdict

__all__ = ["Admission", "BreakerState", "Breakers", "Health", "Status"]

DENIAL_KEPT_MS = 1_000  # a no is believed for so long; a yes is never kept
RAMP_WAIT_S = 0.25  # who is turned away by the ramp may be let in by the next draw
SNAPSHOT_KEPT_MS = 30_000  # what Redis said longer ago is no ground for local mode
CHECK_AGAIN_S = 1.0

T = TypeVar("T")
_log = structlog.get_logger()


class _Lost(Exception):
    """Redis does not answer: the rules hold within this process."""


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer to `admit`; give it back to `report`.

    `retry_after_s`: 0 when allowed, else when to ask again. `probe`: this one call decides whether the provider is well
    again; `lease` names its holder. A negative `generation` was given by this process alone, without Redis.
    """

    allowed: bool
    probe: bool
    generation: int
    retry_after_s: float
    state: BreakerState
    lease: str


class Breakers:
    """The breakers of all providers, for one event loop. Only `force` raises; a job is never failed for want of Redis.

    When Redis is lost, each provider goes on from what was last seen of it, if that is at most 30 s old, else closed.
    Redis is asked again every second; when it answers, what was counted here is dropped.
    """

    def __init__(self, redis: Redis | None, *, rng: Callable[[], float] = random.random) -> None:
        self._store = BreakerStore(redis) if redis is not None else None
        self._rng = rng
        self._admits = Group(self._send_admits)
        self._reports = Group(self._send_reports)
        self._seen: dict[str, tuple[Look, int]] = {}  # and when
        self._local: dict[str, Circuit] | None = None if redis is not None else {}  # not None: local mode
        self._restoring: asyncio.Task[None] | None = None

    async def admit(self, provider: str, *, lease_s: float) -> Admission:
        """Whether a call may go to `provider` now. One round trip, shared by all who ask meanwhile.

        A denial is kept for up to a second, an admission never. `lease_s`: how long a probe may take before another
        may try; the call's own limit and a little more.
        """
        waiting_ms = self._denied_for_ms(provider)
        if waiting_ms > 0:
            return self._admission(self._seen[provider][0]._replace(retry_ms=waiting_ms), "")
        with suppress(_Lost):
            return self._admission(*await self._admits.ask((provider, _milliseconds(lease_s))))
        lease = uuid4().hex
        look = self._circuit(provider).admit(_now_ms(), lease, _milliseconds(lease_s))
        return self._admission(look._replace(generation=-look.generation), lease)

    async def report(
        self,
        provider: str,
        admission: Admission,
        verdict: Verdict,
        *,
        slow: bool = False,
        block_s: float = 0,
        isolate_s: float = 0,
        reason: str = "",
    ) -> None:
        """The call that `admission` allowed has counted, unless the breaker has moved on since.

        `block_s`: the provider asked all of us to wait so long (at most an hour). `isolate_s`: it refuses us for a
        fault of key, quota or configuration (at most a day). `reason`: a short code for `Status`, no provider's text.
        """
        if not admission.allowed:
            return
        generation, lease = abs(admission.generation), admission.lease if admission.probe else ""
        waits = _milliseconds(block_s), _milliseconds(isolate_s)
        report = Report(generation, lease, verdict, slow, *waits, reason[:100])
        if admission.generation > 0:
            with suppress(_Lost):
                await self._reports.ask((provider, report))
                return
        if self._local is not None:
            self._circuit(provider).report(_now_ms(), report, self._jitter())

    def seems_closed(self, provider: str) -> bool:
        """Whether `provider` took calls when last heard of; True when nothing is known. A guess: no round trip."""
        if self._local is not None:
            look, at = self._circuit(provider).look(_now_ms()), _now_ms()
        elif provider in self._seen:
            look, at = self._seen[provider]
        else:
            return True
        return look.state in (BreakerState.CLOSED, BreakerState.FORCED_CLOSED) and at + look.retry_ms <= _now_ms()

    async def status(self, providers: Sequence[str]) -> list[Status]:
        """How they are, in the order asked; from Redis, or `local` when it does not answer."""
        with suppress(_Lost):
            now, circuits = await self._shared(lambda store: store.circuits(providers))
            return [describe(p, c, now, local=False) for p, c in zip(providers, circuits, strict=True)]
        return [describe(provider, self._circuit(provider), _now_ms(), local=True) for provider in providers]

    async def force(self, provider: str, state: Literal["open", "closed", "reset"]) -> Status:
        """An operator's word, obeyed by every worker within a second. `open` and `closed` stand until `reset`, which
        forgets everything.

        Raises Unreachable when Redis does not answer.
        """
        if self._store is None:
            raise Unreachable("breakers are not shared here, so none can be forced: set REDIS_URL")
        try:
            self._seen[provider] = await self._store.force(provider, state), _now_ms()
            now, (circuit,) = await self._store.circuits([provider])
        except TROUBLE as error:
            raise Unreachable(
                f"Redis does not answer ({type(error).__name__}), so the breaker of {provider} may be unchanged: "
                "check REDIS_URL, or run `backstop doctor`"
            ) from None
        return describe(provider, circuit, now, local=False)

    async def aclose(self) -> None:
        """No task of this object runs any more. The Redis client stays open: it was given."""
        if self._restoring is not None:
            self._restoring.cancel()
            with suppress(asyncio.CancelledError):
                await self._restoring

    async def _send_admits(self, asked: Sequence[tuple[str, int]]) -> list[tuple[Look, str]]:
        lease, leases_ms = uuid4().hex, dict(reversed(asked))
        looks = await self._shared(lambda store: store.admit(leases_ms, lease))
        self._see(looks)
        answers = []
        for provider, _ in asked:
            look = looks[provider]
            answers.append((look, lease))
            if look.probe:  # the first one who asked holds it
                looks[provider] = look._replace(probe=False, retry_ms=RULES.probe_wait_ms)
        return answers

    async def _send_reports(self, heard: Sequence[tuple[str, Report]]) -> list[None]:
        reports: defaultdict[str, list[Report]] = defaultdict(list)
        for provider, report in heard:
            reports[provider].append(report)
        self._see(await self._shared(lambda store: store.report(reports, self._jitter())))
        return [None] * len(heard)

    def _see(self, looks: dict[str, Look]) -> None:
        now = _now_ms()
        self._seen.update({provider: (look, now) for provider, look in looks.items()})

    def _denied_for_ms(self, provider: str) -> int:
        """How long still, when a denial not older than a second says so; 0 or less when it has to be asked."""
        if self._local is not None or provider not in self._seen:
            return 0
        (look, at), now = self._seen[provider], _now_ms()
        return at + look.retry_ms - now if now < at + DENIAL_KEPT_MS else 0

    def _admission(self, look: Look, lease: str) -> Admission:
        if look.retry_ms:
            return Admission(False, False, look.generation, look.retry_ms / 1000, look.state, "")
        if look.permille < 1000 and self._rng() * 1000 >= look.permille:
            return Admission(False, False, look.generation, RAMP_WAIT_S, look.state, "")
        return Admission(True, look.probe, look.generation, 0.0, look.state, lease if look.probe else "")

    def _jitter(self) -> int:
        return int(self._rng() * (RULES.jitter_permille + 1))

    def _circuit(self, provider: str) -> Circuit:
        """This process's own circuit, begun from what was last seen."""
        local = self._local if self._local is not None else {}  # restored this moment: one last answer of its own
        if provider not in local:
            now = _now_ms()
            look, at = self._seen.get(provider, (None, 0))
            if look is not None and now - at <= SNAPSHOT_KEPT_MS:
                local[provider] = Circuit.from_look(look, now - at, now)
            else:
                local[provider] = Circuit(generation=now)
        return local[provider]

    async def _shared(self, work: Callable[[BreakerStore], Awaitable[T]]) -> T:
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


def _milliseconds(seconds: float) -> int:
    """Of a wait, 0 to a day; what is negative or no number is no wait."""
    return int(min(max(0.0, seconds), RULES.isolate_most_ms / 1000) * 1000)
