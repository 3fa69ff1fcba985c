"""The rules of the circuit breaker, as plain values: what one provider's reports make of it, and whom it lets in.

`circuit.lua` does the same in Redis for the whole fleet; tests hold the two together. This one serves a process that
has lost Redis.

    CLOSED --trip--> OPEN --time--> HALF_OPEN --2 good probes--> CLOSED (ramp: 10 % of the calls, 100 % after 60 s)
                      ^------failed probe--------'
    CLOSED | HALF_OPEN --key, quota or model refused--> ISOLATED --time--> HALF_OPEN
    any --operator--> FORCED_OPEN | FORCED_CLOSED, until the operator resets

Times are milliseconds of one clock that never runs backwards here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple

from worker.resilience.breaker_rules import RULES
from worker.signals import Verdict


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    FORCED_CLOSED = "forced_closed"
    ISOLATED = "isolated"


Force = Literal["open", "closed", "reset"]


class Report(NamedTuple):
    """What one admitted call says. `lease` is empty but for a probe. `named`: the provider itself said to wait for `block_ms`.

    `survivors`: calls that went out with it or before it and are still in flight. Faults come back sooner than answers,
    so each of them stands for a success that is under way, until it says otherwise.
    """

    generation: int
    lease: str
    verdict: Verdict
    slow: bool = False
    block_ms: int = 0
    isolate_ms: int = 0
    reason: str = ""
    survivors: int = 0
    named: bool = True


class Look(NamedTuple):
    """What a circuit answers.

    `retry_ms` 0: lets in `permille` of the calls, else when to ask again. `probe`: the asker, alone, holds the lease.
    """

    state: BreakerState
    generation: int
    retry_ms: int
    permille: int
    probe: bool
    opens: int


class Window(NamedTuple):
    successes: int
    failures: int
    slow: int

    @property
    def total(self) -> int:
        return self.successes + self.failures


_NO_BUCKET = (-1, 0, 0, 0)  # ten-second period it counts, successes, failures, slow


@dataclass(slots=True)
class Circuit:
    """One provider's breaker. Fields are those of its Redis hash; `jitter` is 0..`RULES.jitter_permille`."""

    generation: int  # grows on each transition, so that a report from before one is told apart
    state: BreakerState = BreakerState.CLOSED
    last: int = 0  # clock when it last changed
    until: int = 0  # OPEN, ISOLATED
    blocked: int = 0  # the provider's own Retry-After; leaves the state as it is
    guesses: int = 0  # waits in a row that the provider did not name
    opens: int = 0
    closed_at: int = 0
    lease: str = ""  # who holds the probe
    lease_until: int = 0
    passed: int = 0  # good probes
    fails: int = 0  # in a row
    reason: str = ""
    buckets: list[tuple[int, int, int, int]] = field(default_factory=lambda: [_NO_BUCKET] * RULES.buckets)

    @classmethod
    def from_fields(cls, fields: Mapping[str, str], now: int) -> Circuit:
        """The circuit a Redis hash holds; a new, closed one when it holds nothing."""
        circuit = cls(int(fields.get("generation", now)), BreakerState(fields.get("state", BreakerState.CLOSED)))
        circuit.last = int(fields.get("last", now))
        for name in ("until", "blocked", "guesses", "opens", "closed_at", "lease_until", "passed", "fails"):
            setattr(circuit, name, int(fields.get(name, 0)))
        circuit.lease, circuit.reason = fields.get("lease", ""), fields.get("reason", "")
        for slot in range(RULES.buckets):
            if f"b{slot}" in fields:
                period, successes, failures, slow = map(int, fields[f"b{slot}"].split(","))
                circuit.buckets[slot] = (period, successes, failures, slow)
        return circuit

    @classmethod
    def from_look(cls, look: Look, age_ms: int, now: int) -> Circuit:
        """A stand-in for one looked at `age_ms` ago: as open, blocked or ramping as that, its counts at zero."""
        circuit = cls(look.generation, look.state, last=now, opens=look.opens, reason="as last seen in Redis")
        left = max(0, look.retry_ms - age_ms)
        if look.state in (BreakerState.OPEN, BreakerState.ISOLATED):
            circuit.until = now + left
        elif look.state is not BreakerState.FORCED_OPEN:
            circuit.blocked = now + left
        if look.permille < 1000:
            risen = (look.permille - RULES.ramp_from_permille) * RULES.ramp_ms // (1000 - RULES.ramp_from_permille)
            circuit.closed_at = now - age_ms - risen
        return circuit

    def admit(self, now: int, lease: str, lease_ms: int) -> Look:
        """May a call go out? In HALF_OPEN the asker gets the one lease, when it is free."""
        now = max(now, self.last)
        self.awake(now)
        probe = self.state is BreakerState.HALF_OPEN and self.blocked <= now and not self._leased(now)
        if probe:
            self.lease, self.lease_until, self.last = lease, now + lease_ms, now
        return self.look(now, probe=probe)

    def release(self) -> None:
        """The probe was not made after all: the next one who asks may have it."""
        self.lease, self.lease_until = "", 0

    def report(self, now: int, report: Report, jitter: int) -> Look:
        """The call's outcome counts, when it was admitted under the present generation; else nothing changes."""
        self.last = now = max(now, self.last)
        if report.generation == self.generation:
            if self.state is BreakerState.HALF_OPEN:
                if report.lease == self.lease != "":
                    self._judge_probe(now, report, jitter)
            elif self.state in (BreakerState.CLOSED, BreakerState.FORCED_CLOSED):
                self._judge(now, report, jitter)
        return self.look(now)

    def force(self, now: int, word: Force) -> Look:
        """An operator's word stands until `reset`, which forgets everything but the generation."""
        self.last = now = max(now, self.last)
        self.blocked = self.guesses = 0
        if word == "open":
            self._move(BreakerState.FORCED_OPEN, "opened by an operator")
        elif word == "closed":
            self._move(BreakerState.FORCED_CLOSED, "closed by an operator")
        else:
            self._move(BreakerState.CLOSED, "")
            self.until = self.opens = self.closed_at = 0
        return self.look(now)

    def look(self, now: int, *, probe: bool = False) -> Look:
        retry_ms, permille = 0, 1000
        if self.state is BreakerState.FORCED_OPEN:
            retry_ms = RULES.forced_wait_ms
        elif self.state in (BreakerState.OPEN, BreakerState.ISOLATED):
            retry_ms = max(0, self.until - now, self.blocked - now)
        elif self.blocked > now:
            retry_ms = self.blocked - now
        elif self.state is BreakerState.HALF_OPEN and not probe and self._leased(now):
            retry_ms = min(self.lease_until - now, RULES.probe_wait_ms)
        if self.state is BreakerState.CLOSED and self.closed_at > 0 and now < self.closed_at + RULES.ramp_ms:
            start = RULES.ramp_from_permille
            permille = start + (1000 - start) * (now - self.closed_at) // RULES.ramp_ms
        return Look(self.state, self.generation, retry_ms, permille, probe, self.opens)

    def window(self, now: int) -> Window:
        """What the last minute counted."""
        oldest = now // RULES.bucket_ms - RULES.buckets
        live = [bucket for bucket in self.buckets if bucket[0] > oldest]
        return Window(sum(b[1] for b in live), sum(b[2] for b in live), sum(b[3] for b in live))

    def awake(self, now: int) -> Circuit:
        """This circuit as the next call finds it: an open one whose time is over is half-open."""
        now = max(now, self.last)
        if self.state in (BreakerState.OPEN, BreakerState.ISOLATED) and now >= max(self.until, self.blocked):
            self._move(BreakerState.HALF_OPEN, self.reason)
            self.last = now
        return self

    def _leased(self, now: int) -> bool:
        return self.lease != "" and self.lease_until > now

    def _judge_probe(self, now: int, report: Report, jitter: int) -> None:
        self.lease, self.lease_until = "", 0
        self._block(now, report)
        if report.isolate_ms:
            self._isolate(now, report)
        elif report.verdict is Verdict.FAILURE:
            self._open(now, _because("the probe failed", report.reason), jitter)
        elif report.verdict is Verdict.SUCCESS:
            self.guesses = 0
            self.passed += 1
            if self.passed >= RULES.good_probes:
                self._move(BreakerState.CLOSED, "")
                self.closed_at = now

    def _judge(self, now: int, report: Report, jitter: int) -> None:
        self._block(now, report)
        if report.isolate_ms and self.state is BreakerState.CLOSED:
            self._isolate(now, report)
        elif report.verdict is not Verdict.NEUTRAL:
            self._count(now, report)
            cause = self._cause(now, report)
            if cause and self.state is BreakerState.CLOSED:
                self._open(now, _because(cause, report.reason), jitter)

    def _count(self, now: int, report: Report) -> None:
        failed, period = report.verdict is Verdict.FAILURE, now // RULES.bucket_ms
        slot = period % RULES.buckets
        at, successes, failures, slow = self.buckets[slot] if self.buckets[slot][0] == period else (period, 0, 0, 0)
        self.buckets[slot] = (at, successes + (not failed), failures + failed, slow + report.slow)
        self.fails = self.fails + 1 + report.slow if failed else 0
        self.guesses = self.guesses if failed else 0

    def _cause(self, now: int, report: Report) -> str:
        """Why this report trips, or "". A good call trips nothing, whatever the others were."""
        window = self.window(now)
        if report.verdict is Verdict.FAILURE:
            if self.fails >= max(RULES.fails_in_a_row, report.survivors):
                return f"{self.fails} failures in a row"
            of = window.total + report.survivors
            if window.total >= RULES.min_calls and window.failures * 100 >= RULES.fail_percent * of:
                return f"{window.failures} of {window.total} calls failed"
        if report.slow and window.total >= RULES.min_calls and window.slow * 100 >= RULES.slow_percent * window.total:
            return f"{window.slow} of {window.total} calls were slow"
        return ""

    def _block(self, now: int, report: Report) -> None:
        if report.block_ms:
            self.blocked = max(self.blocked, now + self._wait_ms(now, report))
            if self.state is BreakerState.CLOSED:
                self.reason = _because("it asked to wait", report.reason)

    def _wait_ms(self, now: int, report: Report) -> int:
        """As named; else as guessed, for twice as long as the guess before: of a wait that still stands nothing is guessed anew.

        What failed is not guessed at either, the breaker grows by itself.
        """
        if report.named or report.verdict is Verdict.FAILURE:
            return min(report.block_ms, RULES.block_most_ms)
        if self.blocked > now:
            return 0
        self.guesses += 1
        return min(report.block_ms << min(self.guesses - 1, 20), RULES.guess_most_ms)

    def _isolate(self, now: int, report: Report) -> None:
        self._move(BreakerState.ISOLATED, _because("isolated", report.reason))
        self.until = now + min(report.isolate_ms, RULES.isolate_most_ms)

    def _open(self, now: int, reason: str, jitter: int) -> None:
        """For `min(300 s, 10 s x 2^(opens-1))`, lengthened by `jitter` thousandths."""
        if self.state is BreakerState.CLOSED and now - self.closed_at > RULES.forget_ms:
            self.opens = 0
        self._move(BreakerState.OPEN, reason)
        self.opens += 1
        open_ms = min(RULES.open_most_ms, RULES.open_ms * 2 ** min(self.opens - 1, 20))
        self.until = max(now + open_ms + open_ms * jitter // 1000, self.blocked)

    def _move(self, state: BreakerState, reason: str) -> None:
        self.state, self.generation, self.reason = state, self.generation + 1, reason
        self.lease, self.lease_until, self.passed, self.fails = "", 0, 0, 0
        self.buckets = [_NO_BUCKET] * RULES.buckets


def _because(cause: str, reason: str) -> str:
    return f"{cause}: {reason}" if reason else cause
