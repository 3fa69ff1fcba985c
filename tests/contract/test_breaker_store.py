"""The script in Redis and the model in Python are one machine, and both keep the invariants of a breaker."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from worker.resilience.breaker_store import SCRIPT, admit_arguments, key, report_arguments, to_look
from worker.resilience.circuit import RULES, BreakerState, Circuit, Look, Report
from worker.signals import Verdict

START = 1_800_000_000_000
PROVIDER = "p"
S, F, X = Verdict.SUCCESS, Verdict.FAILURE, Verdict.NEUTRAL
OPEN, HALF_OPEN, CLOSED, ISOLATED = (
    BreakerState.OPEN,
    BreakerState.HALF_OPEN,
    BreakerState.CLOSED,
    BreakerState.ISOLATED,
)

moments = st.sampled_from([0, 0, 1, 50, 500, 3_000, 9_999, 10_000, 11_000, 20_000, 61_000, 301_000, 700_000, -5_000])
verdicts = st.sampled_from([S, S, F, F, F, X])
waits = st.sampled_from([0, 0, 0, 0, 0, 700, 30_000, 5_000_000])
steps = st.one_of(
    st.tuples(st.just("ask"), moments, st.sampled_from([2_000, 30_000])),
    st.tuples(st.just("tell"), moments, st.integers(0, 9), verdicts, st.booleans(), waits, waits, st.booleans()),
    st.tuples(st.just("lose"), moments, st.integers(0, 9)),
    st.tuples(st.just("probe"), moments, verdicts),
    st.tuples(st.just("burst"), moments, st.integers(1, 25), st.sampled_from([S, F]), st.booleans()),
    st.tuples(st.just("force"), moments, st.sampled_from(["open", "closed", "reset"])),
    st.tuples(st.just("forget"), moments),
)
weighted = st.one_of(steps, steps.filter(lambda step: step[0] not in ("force", "forget")))


@dataclass
class Trace:
    """Plays steps on the model, checks the invariants there, and keeps what Redis has to answer."""

    now: int = START
    circuit: Circuit = field(default_factory=lambda: Circuit.from_fields({}, START))
    inflight: list[tuple[Look, str]] = field(default_factory=list)
    probe: tuple[int, int, str] = (0, 0, "")  # live one: generation, end of its lease, holder
    counted: list[tuple[int, Verdict, bool]] = field(default_factory=list)  # since the last transition, by the clock
    sent: list[tuple[list[Any], Look | None, Circuit]] = field(default_factory=list)
    serial: int = 0

    def play(self, story: list[tuple[Any, ...]]) -> None:
        self.ask(30_000)
        for name, wait_ms, *arguments in story:
            self.now += wait_ms
            getattr(self, name)(*arguments)

    def ask(self, lease_ms: int) -> tuple[Look, str]:
        self.serial += 1
        lease, before = f"lease{self.serial}", replace(self.circuit)
        look = self.circuit.admit(self.now, lease, lease_ms)
        self.record(["admit", self.now, *admit_arguments(lease, lease_ms)], look, before)
        clock = max(self.now, before.last)
        if look.probe:  # B3
            generation, end, holder = self.probe
            assert generation != look.generation or end <= clock or holder == "", "two live probes"
            self.probe = (look.generation, clock + lease_ms, lease)
        if before.state is OPEN and look.state is not OPEN:
            assert clock >= before.until, "left OPEN early"  # B6
        if look.retry_ms == 0:
            self.inflight.append((look, lease if look.probe else ""))
        return look, lease

    def tell(
        self, which: int, verdict: Verdict, slow: bool, block_ms: int, isolate_ms: int, twice: bool, jitter: int = 100
    ) -> None:
        if not self.inflight:
            return
        index = which % len(self.inflight)
        look, lease = self.inflight[index] if twice else self.inflight.pop(index)
        self.hear([Report(look.generation, lease, verdict, slow, block_ms, isolate_ms, "why")], jitter)

    def lose(self, which: int) -> None:
        if self.inflight:
            self.inflight.pop(which % len(self.inflight))

    def probe_once(self, verdict: Verdict) -> None:
        look, lease = self.ask(30_000)
        if look.retry_ms == 0:
            self.inflight.pop()
            self.hear([Report(look.generation, lease if look.probe else "", verdict)], 200)

    def burst(self, number: int, verdict: Verdict, slow: bool) -> None:
        look, lease = self.ask(30_000)
        if look.retry_ms == 0:
            self.inflight.pop()
            self.hear([Report(look.generation, lease if look.probe else "", verdict, slow)] * number, 0)

    def force(self, word: Any) -> None:
        before = replace(self.circuit)
        look = self.circuit.force(self.now, word)
        self.record(["force", self.now, word], look, before)

    def forget(self) -> None:
        """Redis loses its memory."""
        self.now = max(self.now, self.circuit.last) + 1_000  # a generation is newer than any before by the clock
        self.circuit = Circuit.from_fields({}, self.now)
        self.counted = []
        self.sent.append(([], None, self.circuit))
        self.ask(30_000)

    def hear(self, reports: list[Report], jitter: int) -> None:
        start = replace(self.circuit)
        for report in reports:
            before = replace(self.circuit, buckets=list(self.circuit.buckets))
            self.circuit.report(self.now, report, jitter)
            self.check_report(before, report, jitter)
        arguments = ["report", self.now, *report_arguments(reports, jitter)]
        self.record(arguments, self.circuit.look(max(self.now, start.last)), start)

    def check_report(self, before: Circuit, report: Report, jitter: int) -> None:
        after, clock = self.circuit, self.circuit.last
        if report.generation != before.generation:  # B2
            assert replace(after, last=0) == replace(before, last=0), "a report of an earlier generation counted"
            return
        if before.state is HALF_OPEN and after.state is not HALF_OPEN:  # B4
            assert report.lease == before.lease != "", "someone else ended the probe"
        if before.state is HALF_OPEN and report.lease == before.lease != "":
            self.probe = (0, 0, "")
        if before.state in (OPEN, ISOLATED):  # B6
            assert after.state is before.state
            assert after.until == before.until
        plain = not report.block_ms and not report.isolate_ms
        if report.verdict is X and plain:  # B8
            same = {"last": 0, "lease": "", "lease_until": 0}
            assert replace(after, **same) == replace(before, **same), "X changed more than the slot"
        if report.block_ms:
            assert after.blocked >= before.blocked or after.state is not before.state
        if after.state is OPEN and before.state is not OPEN:
            self.check_opening(before, after, report, jitter, clock)
        self.check_window(before, report, clock)

    def check_opening(self, before: Circuit, after: Circuit, report: Report, jitter: int, clock: int) -> None:
        assert report.verdict is F or report.slow or self.counted, "opened for nothing"  # B7
        if before.state is CLOSED:
            window = before.window(clock)
            assert window.total + 1 >= RULES.min_calls or before.fails + 1 >= RULES.fails_in_a_row  # B7
            assert window.failures + (report.verdict is F) + window.slow + report.slow > 0
        open_ms = min(300_000, 10_000 * 2 ** (after.opens - 1))  # B10
        shortest = clock + open_ms + open_ms * jitter // 1000
        assert after.until == max(shortest, after.blocked)

    def check_window(self, before: Circuit, report: Report, clock: int) -> None:
        """B14: the buckets say what a list of everything would say."""
        if self.circuit.generation != before.generation:
            self.counted = []
        elif before.state in (CLOSED, BreakerState.FORCED_CLOSED) and report.verdict is not X:
            self.counted.append((clock // RULES.bucket_ms, report.verdict, report.slow))
        live = [c for c in self.counted if c[0] > clock // RULES.bucket_ms - RULES.buckets]
        failures = sum(c[1] is F for c in live)
        assert self.circuit.window(clock) == (len(live) - failures, failures, sum(c[2] for c in live))

    def record(self, arguments: list[Any], look: Look, before: Circuit) -> None:
        assert self.circuit.generation >= before.generation  # B1
        assert self.circuit.last >= before.last
        assert look.retry_ms >= 0
        if self.circuit.generation != before.generation:
            self.counted = []
        self.sent.append((arguments, look, replace(self.circuit, buckets=list(self.circuit.buckets))))


Trace.probe_ = None  # type: ignore[attr-defined]
