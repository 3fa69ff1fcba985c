"""One provider's gate, asked and told by workers that die, repeat themselves and disagree about the time, with an operator at hand.

Each step is played on the model and on Valkey, which have to agree in what they answer and in what they remember; and
whatever happened, the gate keeps the invariants of a breaker and of a limiter.
"""

import json
from copy import deepcopy
from dataclasses import replace
from math import floor, inf
from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from worker.resilience import budget as budgets
from worker.resilience import histogram, limits
from worker.resilience.breaker_rules import RULES
from worker.resilience.budget import Budget
from worker.resilience.circuit import BreakerState, Circuit
from worker.resilience.gate_store import KEYS, admit_argument, key, keys, report_argument, to_answers, wire
from worker.resilience.limits import Limits, Meter
from worker.resilience.local import Answer, Ask, LocalGate, Tell
from worker.signals import Verdict

S, F, X = Verdict.SUCCESS, Verdict.FAILURE, Verdict.NEUTRAL
START = 1_800_000_000_000
CLOSE = 1e-3  # of a request or token, after a hundred sums
CONFIGURED = (Limits(), Limits(60, 6_000, 5), Limits(rpm=600), Limits(rpm=4, concurrency=10), Limits(tpm=1_200), Limits(concurrency=2))

MOMENTS = st.sampled_from([0, 0, 0, 1, 50, 500, 3_000, 9_999, 10_000, 11_000, 20_000, 61_000, 301_000, 700_000, -1, -5_000])
LEASES_MS = st.sampled_from([2_000, 30_000, 30_000, 90_000])
TOKENS = st.sampled_from([0, 1, 10, 100, 250, 1_000, 5_000])
PICK = st.integers(0, 50)
RARELY = st.sampled_from([False, False, False, True])
WAITS_MS = st.sampled_from([0, 0, 0, 0, 0, 0, 700, 30_000, 5_000_000])
EASES = st.sampled_from([1.0, 1.0, 1.0, 0.7, 0.5, 0.1])
WANTS = st.lists(st.tuples(LEASES_MS, TOKENS, st.booleans(), RARELY, RARELY), min_size=1, max_size=6)
MAYBE_FEW = st.sampled_from([None, None, None, 0, 3, 100_000])
COSTS = st.sampled_from([0, 1_000, 1_000, 20_000])


class Held(NamedTuple):
    """A call on its way, as its worker knows it."""

    ask: Ask
    answer: Answer
    generation: int


class Stand:
    """Where the script runs: clients of one Valkey, and a script."""

    def __init__(self, clients, script):
        self.clients, self.script = clients, script
        self.turn = 0

    def play(self, provider, operation, now, argument):
        """What was answered, and all that is remembered now: breaker, limits, flying, budget, latency."""
        self.turn += 1
        pipeline = self.clients[self.turn % len(self.clients)].pipeline(transaction=False)
        pipeline.eval(self.script, len(KEYS), *keys(provider), operation, now, argument)
        for part in ("breaker", "limits", "budget", "latency"):
            pipeline.hgetall(key(provider, part))
        pipeline.zrange(key(provider, "flying"), 0, -1, withscores=True)
        return pipeline.execute()


class Gate(RuleBasedStateMachine):
    def __init__(self, stand):
        super().__init__()
        self.stand = stand

    @initialize(of=st.sampled_from(CONFIGURED))
    def begin(self, of):
        self.now, self.limits, self.serial = START, of, 0
        self.held, self.told, self.latencies = [], [], []
        self.used, self.falls, self.probe = [], [], None
        self.stand.clients[0].flushall()
        self.stand.play("q", "admit", START, admit_argument(self.limits, [Ask("stranger", 2_000)]))
        self.stranger = self._dumps("q")
        self._forget()
        self.asked([Ask(self.lease(), 2_000)])
        self.held.clear()

    def _forget(self):
        self.gate = LocalGate(Circuit.from_fields({}, self.now), Meter.from_fields({}, self.limits, self.now), Budget())
        self.used, self.falls, self.latencies = [], [], []

    def _dumps(self, provider):
        return [self.stand.clients[0].dump(name) for name in keys(provider)]

    # What workers do.

    @rule(
        wait_ms=MOMENTS,
        wants=st.lists(st.tuples(LEASES_MS, TOKENS, st.booleans(), RARELY, RARELY), min_size=1, max_size=6),
        draw=st.integers(0, 999),
    )
    def ask(self, wait_ms, wants, draw):
        self.now += wait_ms
        self.asked([Ask(self.lease(), ms, tokens, bulk, 2 if dear else int(again), draw) for ms, tokens, bulk, again, dear in wants])

    @rule(wait_ms=MOMENTS, number=st.integers(1, 25))
    def storm(self, wait_ms, number):
        self.now += wait_ms
        self.asked([Ask(self.lease(), 30_000, 10) for _ in range(number)])

    @rule(
        wait_ms=MOMENTS, which=PICK, verdict=st.sampled_from([S, S, F, F, X]), slow=RARELY, block_ms=WAITS_MS, isolate_ms=WAITS_MS,
        used=st.sampled_from([None, 0, 5, 400, 9_000]), sent=st.sampled_from([True, True, True, False]), ease=EASES,
        left=st.tuples(MAYBE_FEW, MAYBE_FEW), took_ms=st.sampled_from([None, 3, 700, 8_000]), cost=COSTS, again=RARELY,
        named=st.booleans(),
    )  # fmt: skip
    def tell(self, wait_ms, which, verdict, slow, block_ms, isolate_ms, used, sent, ease, left, took_ms, cost, again, named):
        self.now += wait_ms
        if not self.held:
            return
        held = self.held.pop(which % len(self.held))
        bucket = None if took_ms is None else histogram.bucket(took_ms)
        told = self.tell_of(held, verdict)._replace(
            slow=slow, block_ms=block_ms, isolate_ms=isolate_ms, used=used, sent=sent, ease=ease,
            remaining_requests=left[0], remaining_tokens=left[1], bucket=bucket, cost=cost, named=named,
        )  # fmt: skip
        self.reported([told, told] if again else [told])

    @rule(wait_ms=MOMENTS, verdict=st.sampled_from([S, F, F, X]), number=st.integers(1, 30))
    def all_end(self, wait_ms, verdict, number):
        self.now += wait_ms
        ended, self.held = self.held[:number], self.held[number:]
        if ended:
            self.reported([self.tell_of(held, verdict) for held in ended])

    @rule(which=PICK)
    def a_worker_dies(self, which):
        if self.held:
            self.held.pop(which % len(self.held))

    @rule(wait_ms=MOMENTS, which=PICK, verdict=st.sampled_from([S, F]))
    def a_report_comes_twice(self, wait_ms, which, verdict):
        self.now += wait_ms
        if not self.told:
            return
        told = self.told[which % len(self.told)]._replace(verdict=verdict)
        before = deepcopy(self.gate)
        before.meter.refresh(self.now)
        self.reported([told])
        assert self.gate == before, "L5: a report that came twice has counted twice"

    @rule(wait_ms=MOMENTS, tokens=TOKENS, bulk=st.booleans())
    def one_waits_as_told(self, wait_ms, tokens, bulk):
        """L3, L9: who is alone and waits as long as it was told is let in, however large it is."""
        self.now += wait_ms
        (answer,) = self.asked([Ask(self.lease(), 30_000, tokens, bulk)])
        if answer.denied != "limited":
            return
        self.now = max(self.now, self.gate.meter.at) + answer.retry_ms
        (again,) = self.asked([Ask(self.lease(), 30_000, tokens, bulk)])
        assert again.denied != "limited" or len(self.gate.meter.flying) + 1 > self._top(bulk), "L3: the hint was too short"

    @rule(wait_ms=MOMENTS, cost=COSTS)
    def hedge(self, wait_ms, cost):
        self.now += wait_ms
        before = deepcopy(self.gate.budget)
        allowed = self.gate.budget.hedge(self.now, cost)
        self._agree(allowed, self.stand.play("p", "hedge", self.now, json.dumps(cost)), lambda reply: reply == 1)
        if allowed:
            assert before.hedges >= 1
            assert before.money >= cost, "a hedge was not paid for"

    # What happens to the gate.

    @rule(wait_ms=MOMENTS, word=st.sampled_from(["open", "closed", "reset", "reset"]), really=RARELY)
    def operate(self, wait_ms, word, really):
        if really:
            self._force(wait_ms, word)

    def _force(self, wait_ms, word):
        self.now += wait_ms
        self.gate.circuit.force(self.now, word)
        self.gate.meter.refresh(self.now)
        if word == "reset":
            self.gate.meter.reset()
        self._agree(None, self.stand.play("p", "force", self.now, json.dumps([wire(self.limits), word])), lambda _: None)
        self.probe = None

    @rule(really=RARELY)
    def memory_is_lost(self, really):
        if not really:
            return
        generation = self.gate.circuit.generation
        self.now = max(self.now, self.gate.circuit.last, self.gate.meter.at) + 1_000  # a later generation, by the clock
        for name in keys("p"):
            self.stand.clients[0].delete(name)
        self._forget()
        self.probe = None
        self.asked([Ask(self.lease(), 2_000)])
        assert self.gate.circuit.generation > generation, "B1: a generation came twice"

    @rule(ms=st.sampled_from([5_000, 60_000]))
    def the_clock_steps_back(self, ms):
        self.now -= ms

    # How both sides are asked, and what has to hold then.

    def lease(self):
        self.serial += 1
        return f"lease{self.serial}"

    def tell_of(self, held, verdict):
        ask, answer = held.ask, held.answer
        return Tell(ask.lease, held.generation, answer.probe, verdict, reason="why", reserved=answer.tokens, first=not ask.extra)

    def asked(self, asks):
        before = deepcopy(self.gate)
        clock = before.meter.refresh(self.now)
        answers = self.gate.admit(self.now, asks)
        reply = self.stand.play("p", "admit", self.now, admit_argument(self.limits, asks))
        self._agree(answers, reply, lambda reply: to_answers(reply)[1])
        self._sees(reply[0])
        generation = self.gate.circuit.generation
        for ask, answer in zip(asks, answers, strict=True):
            self._check_answer(ask, answer, before)
            if answer.denied is None:
                self.held.append(Held(ask, answer, generation))
                self.used.append((clock, 1, answer.tokens, ask.tokens))
        self._check_probe(asks, answers, before)
        if all(answer.denied for answer in answers):
            before.meter.sweep(clock)
            assert self._levels(before) == self._levels(self.gate), "L2: a denied call has taken something"
        return answers

    def _check_answer(self, ask, answer, before):
        assert answer.retry_ms >= 0
        assert (answer.denied is None) == (answer.retry_ms == 0)
        assert (ask.lease in self.gate.meter.flying) == (answer.denied is None), "B9: who was denied is in flight, or who was let in is not"
        if answer.denied is None and before.circuit.state is BreakerState.OPEN:
            assert max(self.now, before.circuit.last) >= before.circuit.until, "B6: left OPEN early"
        if answer.denied is None and ask.extra:
            assert before.budget.wait_ms(self.now) == 0, "a retry without a budget"

    def _check_probe(self, asks, answers, before):
        holders = [(ask, answer) for ask, answer in zip(asks, answers, strict=True) if answer.probe]
        clock = max(self.now, before.circuit.last)
        assert len(holders) <= 1, "B3: two probes at once"
        if holders:
            ((ask, _),) = holders
            assert self.probe is None or self.probe[0] != self.gate.circuit.generation or self.probe[1] <= clock, "B3: two live probes"
            self.probe = self.gate.circuit.generation, clock + ask.lease_ms
            if all(answer.denied != "limited" and not other.extra for other, answer in zip(asks, answers, strict=True)):
                assert (not ask.bulk, ask.tokens) == min((not other.bulk, other.tokens) for other in asks), "the probe is a dear one"

    def reported(self, tells):
        before, flying = deepcopy(self.gate), dict(self.gate.meter.flying)
        clock = before.meter.refresh(self.now)
        for number, told in enumerate(tells):
            one, tokens = deepcopy(self.gate.circuit), (self.gate if number else before).meter.tokens
            level = tokens.level if tokens else 0
            counts = told.lease in self.gate.meter.flying
            m = self.gate.meter.multiplier
            self.gate.report(self.now, [told], 100)
            if number == 0:
                m = before.meter.multiplier
            if counts:
                self._check_report(one, told)
                self._check_fall(m, clock)
                self._credit(told, clock, level)
                if told.bucket is not None:
                    self.latencies.append((self.now // histogram.PERIOD_MS, told.bucket))
        assert set(self.gate.meter.flying) == set(flying) - {told.lease for told in tells}
        reply = self.stand.play("p", "report", self.now, report_argument(self.limits, 100, tells))
        self._agree(None, reply, lambda _: None)
        self._sees(reply[0])
        self.told += tells

    def _credit(self, told, clock, level):
        used = 0 if not told.sent else told.reserved if told.used is None else told.used
        most = level + max(1.0, (self.limits.tpm or 0) / 6)  # down to the deepest debt
        self.used.append((clock, 0 if told.sent else -1, min(used - told.reserved, most), 0))

    def _check_fall(self, m, clock):
        if self.gate.meter.multiplier < m:
            assert all(clock - fall >= 10_000 for fall in self.falls), "L7: two falls within ten seconds"
            self.falls.append(clock)

    def _check_report(self, before, told):
        after, report = self.gate.circuit, told.report(0)
        assert after.last >= before.last
        assert after.generation >= before.generation
        if report.generation != before.generation:
            assert replace(after, last=0) == replace(before, last=0), "B2: a report of an earlier generation counted"
            return
        if before.state is BreakerState.HALF_OPEN and after.state is not BreakerState.HALF_OPEN:
            assert report.lease == before.lease != "", "B4: someone else ended the probe"
        if before.state in (BreakerState.OPEN, BreakerState.ISOLATED):
            assert (after.state, after.until) == (before.state, before.until), "B6: a report changed how long it is open"
        if report.verdict is X and not report.block_ms and not report.isolate_ms:
            same = {"last": 0, "lease": "", "lease_until": 0}
            assert replace(after, **same) == replace(before, **same), "B8: X changed more than the slot"
        if before.state is BreakerState.HALF_OPEN and report.lease == before.lease != "":
            assert after.lease == "", "B8: the slot is not free"
            self.probe = None
        assert after.blocked >= before.blocked, "L6: a block ended sooner"
        if not report.named and report.verdict is X:
            assert after.blocked <= max(before.blocked, after.last + 60_000), "X9: a guess is longer than a minute"
            assert after.blocked == before.blocked or before.blocked <= after.last, "X9: a wait that stands was guessed anew"
        if after.state is BreakerState.OPEN and before.state is not BreakerState.OPEN:
            self._check_opening(before, after, report)

    def _check_opening(self, before, after, report):
        if before.state is BreakerState.CLOSED:
            window = before.window(after.last)
            assert window.total + 1 >= RULES.min_calls or before.fails + 1 + report.slow >= RULES.fails_in_a_row, "B7: tripped by a few"
            assert window.failures + (report.verdict is F) + window.slow + report.slow > 0, "B7: tripped by good calls"
        open_ms = min(300_000, 10_000 * 2 ** (after.opens - 1))
        assert after.until == max(after.last + open_ms + open_ms // 10, after.blocked), "B10"

    def _levels(self, gate):
        buckets = (gate.meter.requests, gate.meter.tokens)
        return [bucket and bucket.level for bucket in buckets], gate.meter.flying, gate.budget

    def _top(self, bulk):
        ceiling = self.gate.meter.ceiling
        return max(1, floor(ceiling * 0.7)) if bulk and ceiling < inf else ceiling

    def _agree(self, answered, replies, read):
        """B12: the model and Valkey give the same answer and remember the same."""
        reply, breaker, levels, budget, latency, flying = replies
        if answered is not None:
            assert read(reply) == answered
        if reply not in (0, 1):
            assert Circuit.from_fields(breaker, self.now) == self.gate.circuit
            there = Meter.from_fields(levels, self.limits, self.now, {lease: int(end) for lease, end in flying})
            assert there == self.gate.meter
        assert Budget.from_fields(budget) == self.gate.budget
        newest = int(latency.get("newest", 0))
        assert all(int(name.split(":")[0]) > newest - histogram.PERIODS for name in latency if ":" in name), "what is old is kept"
        counts = {}
        for period, bucket in self.latencies:
            if period > self.now // histogram.PERIOD_MS - histogram.PERIODS:
                counts[bucket] = counts.get(bucket, 0) + 1
        if newest <= self.now // histogram.PERIOD_MS:  # the clock did not step back since
            assert histogram.recent(latency.items(), self.now) == counts

    def _sees(self, reply):
        sight, _ = to_answers(reply)
        circuit = self.gate.circuit
        assert sight.look == circuit.look(max(self.now, circuit.last))
        assert sight.multiplier == floor(self.gate.meter.multiplier * 1000) / 1000

    # Always, and in the end.

    @invariant()
    def levels_keep_their_bounds(self):
        meter = self.gate.meter
        for bucket in (meter.requests, meter.tokens):
            if bucket:
                assert -bucket.burst <= bucket.level <= bucket.burst, "L4"
                assert bucket.promised >= 0
        assert 0.1 <= meter.multiplier <= 1, "L7"
        assert meter.room == 0 or 1 <= meter.room <= (self.limits.concurrency or limits.RULES.most_room)
        assert 0 <= self.gate.budget.retries <= 100
        assert 0 <= self.gate.budget.hedges <= budgets.RULES.hedges_most
        assert self.gate.budget.money >= 0

    def teardown(self):
        if not hasattr(self, "gate"):
            return
        self._windows_hold()
        if self.gate.circuit.state in (BreakerState.FORCED_OPEN, BreakerState.FORCED_CLOSED):
            self._force(0, "reset")
        self.now = max(self.now, self.gate.circuit.last, self.gate.meter.at) + 86_400_000 * 2
        for _ in range(RULES.good_probes):
            (answer,) = self.asked([Ask(self.lease(), 30_000, 100)])
            assert answer.denied is None, "B5: a good provider is not asked any more"
            assert len(self.gate.meter.flying) == 1, "L11: the dead are still in flight"
            self.reported([self.tell_of(self.held.pop(), S)])
            self.now += 100_000
        assert self.gate.circuit.state is BreakerState.CLOSED, "B5: a good provider is not closed again"
        assert self.gate.meter.multiplier == 1, "L7: the multiplier has not recovered"
        assert self._dumps("q") == self.stranger, "B16: a stranger's keys were touched"

    def _windows_hold(self):
        """L1: from any moment to any admission, no more than a burst and what the rate gives meanwhile."""
        for which, limit in ((1, self.limits.rpm), (2, self.limits.tpm)):
            if not limit:
                continue
            burst, pace = max(1.0, limit / 6), limit * 0.9 / 60_000
            for end, entry in enumerate(self.used):
                if entry[1] != 1 or entry[3] > burst:
                    continue  # no admission, or one larger than the bucket, which runs into debt
                total = 0
                for start in range(end, -1, -1):
                    total += self.used[start][which]
                    assert total <= burst + pace * (entry[0] - self.used[start][0]) + CLOSE, "L1"
