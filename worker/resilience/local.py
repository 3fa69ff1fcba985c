"""The gate of one provider, as plain values: breaker, limits and budget asked and told together.

`gate.lua` does the same in Redis for the whole fleet; tests hold the two together. This one serves a process that has
lost Redis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from worker.resilience import histogram
from worker.resilience.admission import Admission, Denial, Ending, Extra
from worker.resilience.breaker_rules import RULES
from worker.resilience.budget import Budget, nano
from worker.resilience.circuit import BreakerState, Circuit, Look, Report
from worker.resilience.limits import STRAINED, Limits, Meter, Settling
from worker.signals import Verdict

_EMPTY = {"requests": "0", "tokens": "0"}
RAMP_WAIT_MS = 250  # who is turned away by the ramp may be let in by the next draw


class Ask(NamedTuple):
    """`extra`: what the call costs the retry budget, 0 for a first one. `draw`: 0 to 999, by lot, for the ramp."""

    lease: str
    lease_ms: int
    tokens: int = 0
    bulk: bool = False
    extra: int = 0
    draw: int = 0


class Answer(NamedTuple):
    """`denied` None: it may go out, with so many `tokens` reserved. Else `retry_ms` says when to ask again."""

    denied: Denial | None
    retry_ms: int
    probe: bool
    tokens: int

    def admission(self, look: Look, multiplier: float, lease: str, extra: Extra | None) -> Admission:
        """What is said to who asked; `look` and `multiplier` are of the same round trip."""
        strained, wait_s = multiplier < STRAINED, self.retry_ms / 1000
        if self.denied:
            return Admission(False, False, look.generation, wait_s, look.state, "", 0, self.denied, strained, extra)
        return Admission(True, self.probe, look.generation, 0.0, look.state, lease, self.tokens, None, strained, extra)


class Tell(NamedTuple):
    """How the call under a lease ended; see `admission.Ending`. `bucket`: of the histogram. `cost`: thousand-millionths of a dollar."""

    lease: str
    generation: int
    probe: bool
    verdict: Verdict
    slow: bool = False
    block_ms: int = 0
    isolate_ms: int = 0
    reason: str = ""
    reserved: int = 0
    used: int | None = None
    sent: bool = True
    ease: float = 1.0
    remaining_requests: int | None = None
    remaining_tokens: int | None = None
    bucket: int | None = None
    first: bool = True
    cost: int = 0
    took_ms: int | None = None
    named: bool = True

    @classmethod
    def of(cls, admission: Admission, ending: Ending) -> Tell:
        return cls(
            lease=admission.lease,
            generation=abs(admission.generation),
            probe=admission.probe,
            verdict=ending.verdict,
            slow=ending.slow,
            block_ms=milliseconds(ending.block_s),
            isolate_ms=milliseconds(ending.isolate_s),
            reason=ending.reason[:100],
            reserved=admission.tokens,
            used=ending.tokens,
            sent=ending.sent,
            ease=ending.ease,
            remaining_requests=ending.remaining_requests,
            remaining_tokens=ending.remaining_tokens,
            bucket=None if ending.took_ms is None else histogram.bucket(ending.took_ms),
            first=admission.extra is None,
            cost=0 if ending.cost_usd is None else nano(ending.cost_usd),
            took_ms=ending.took_ms,
            named=ending.named,
        )

    def report(self, survivors: int) -> Report:
        """What the breaker hears of it."""
        lease = self.lease if self.probe else ""
        return Report(self.generation, lease, self.verdict, self.slow, self.block_ms, self.isolate_ms, self.reason, survivors, self.named)

    def settling(self) -> Settling:
        """What the limits hear of it."""
        good = self.verdict is Verdict.SUCCESS
        left = self.remaining_requests, self.remaining_tokens
        return Settling(self.reserved, self.used, self.sent, good, self.ease, *left, self.took_ms)


@dataclass(slots=True)
class LocalGate:
    circuit: Circuit
    meter: Meter
    budget: Budget

    @classmethod
    def begun(cls, limits: Limits, now: int, seen: tuple[Look, float, int] | None, *, full: bool) -> LocalGate:
        """Goes on from the look and the multiplier last seen so many ms ago, else closed. `full`: nobody else has taken anything."""
        gate = cls(Circuit(generation=now), Meter.from_fields({} if full else _EMPTY, limits, now), Budget())
        if seen is not None:
            look, gate.meter.multiplier, age_ms = seen
            gate.circuit = Circuit.from_look(look, age_ms, now)
        return gate

    def admit(self, now: int, asks: Sequence[Ask]) -> list[Answer]:
        """Who may go out, in the order asked. What the breaker denies reserves nothing, and an extra call draws on the budget.

        The probe goes to bulk before interactive, and to the one with the fewest tokens.
        """
        clock = self.meter.refresh(now)
        self.meter.sweep(clock)
        self.circuit.awake(now)
        order = list(range(len(asks)))
        if self.circuit.state is BreakerState.HALF_OPEN:
            order.sort(key=lambda i: (not asks[i].bulk, asks[i].tokens))
        answers = {i: self._decide(now, clock, asks[i]) for i in order}
        return [answers[i] for i in range(len(asks))]

    def _decide(self, now: int, clock: int, ask: Ask) -> Answer:
        look = self.circuit.admit(now, ask.lease, ask.lease_ms)
        if look.retry_ms:
            held = look.state in (BreakerState.CLOSED, BreakerState.FORCED_CLOSED)
            return Answer(Denial.BLOCKED if held else Denial.BREAKER, look.retry_ms, False, 0)
        if ask.draw >= look.permille:
            return Answer(Denial.RAMPING, RAMP_WAIT_MS, False, 0)
        why, wait_ms, tokens = Denial.BUDGET, self.budget.wait_ms(now) if ask.extra else 0, 0
        if not wait_ms:
            why = Denial.LIMITED
            wait_ms, tokens = self.meter.reserve(ask.tokens, ask.bulk)
        if wait_ms:
            if look.probe:
                self.circuit.release()
            if why is Denial.LIMITED and self.meter.is_congested(ask.bulk):
                why = Denial.CONGESTED
            return Answer(why, wait_ms, False, 0)
        self.meter.flying[ask.lease] = clock + ask.lease_ms
        if ask.extra:
            self.budget.draw(now, ask.extra)
        return Answer(None, 0, look.probe, tokens)

    def report(self, now: int, tells: Sequence[Tell], jitter: int) -> None:
        """The calls have ended, each once: what is told of a lease that has ended before changes nothing."""
        clock = self.meter.refresh(now)
        for tell in tells:
            survivors = self.meter.survivors(tell.lease, clock) if tell.verdict is Verdict.FAILURE else 0
            if not self.meter.settle(tell.lease, tell.settling()):
                continue
            self.circuit.report(now, tell.report(survivors), jitter)
            if tell.first:
                self.budget.earn(now, answered=tell.verdict is Verdict.SUCCESS, sent=tell.sent, cost=tell.cost)


def milliseconds(seconds: float) -> int:
    """Of a wait, 0 to a day; what is negative or no number is no wait."""
    return int(min(max(0.0, seconds), RULES.isolate_most_ms / 1000) * 1000)
