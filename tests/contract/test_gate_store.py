"""The breaker's part of the script and its model in Python are one machine, and both keep the invariants of a breaker."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.resilience.breaker_rules import RULES
from worker.resilience.circuit import BreakerState, Circuit, Look, Report
from worker.resilience.gate_store import SCRIPT, key
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

# The breaker alone, without what stands beside it in the gate.
ALONE = """
local said = cjson.decode(ARGV[3])
local circuit = circuit_of(KEYS[1], tonumber(ARGV[2]))
local look
if ARGV[1] == 'admit' then look = circuit.admit(unpack(said)) end
if ARGV[1] == 'force' then circuit.force(said) end
if ARGV[1] == 'report' then
  for _, told in ipairs(said[2]) do
    local survivors = told.survivors
    told.survivors = function() return survivors end
    circuit.report(told, said[1])
  end
end
circuit.save()
return cjson.encode(look or circuit.look(false))
"""
BREAKER = SCRIPT[: SCRIPT.index("local function meter_of")] + ALONE


def told(report):
    return report._asdict() | {"slow": int(report.slow)}


def to_look(reply):
    state, generation, retry_ms, permille, probe, opens = json.loads(reply)
    return Look(BreakerState(state), generation, retry_ms, permille, probe == 1, opens)


moments = st.sampled_from([0, 0, 1, 50, 500, 3_000, 9_999, 10_000, 11_000, 20_000, 61_000, 301_000, 700_000, -5_000])
verdicts = st.sampled_from([S, S, F, F, F, X])
waits = st.sampled_from([0, 0, 0, 0, 0, 700, 30_000, 5_000_000])
steps = st.one_of(
    st.tuples(st.just("ask"), moments, st.sampled_from([2_000, 30_000])),
    st.tuples(st.just("tell"), moments, st.integers(0, 9), verdicts, st.booleans(), waits, waits, st.booleans()),
    st.tuples(st.just("lose"), moments, st.integers(0, 9)),
    st.tuples(st.just("once"), moments, verdicts),
    st.tuples(st.just("burst"), moments, st.integers(1, 25), st.sampled_from([S, F]), st.booleans(), st.sampled_from([0, 0, 15])),
    st.tuples(st.just("force"), moments, st.sampled_from(["open", "closed", "reset"])),
    st.tuples(st.just("forget"), moments),
)
stories = st.lists(steps, min_size=1, max_size=40)


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

    def play(self, story):
        self.ask(30_000)
        for name, wait_ms, *arguments in story:
            self.now += wait_ms
            getattr(self, name)(*arguments)

    def ask(self, lease_ms):
        self.serial += 1
        lease, before = f"lease{self.serial}", replace(self.circuit)
        look = self.circuit.admit(self.now, lease, lease_ms)
        self.record(["admit", self.now, json.dumps([lease, lease_ms])], look, before)
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

    def tell(self, which, verdict, slow, block_ms, isolate_ms, twice):
        if not self.inflight:
            return
        index = which % len(self.inflight)
        look, lease = self.inflight[index] if twice else self.inflight.pop(index)
        self.hear([Report(look.generation, lease, verdict, slow, block_ms, isolate_ms, "why")], 100)

    def lose(self, which):
        if self.inflight:
            self.inflight.pop(which % len(self.inflight))

    def once(self, verdict):
        look, lease = self.ask(30_000)
        if look.retry_ms == 0:
            self.inflight.pop()
            self.hear([Report(look.generation, lease if look.probe else "", verdict)], 200)

    def burst(self, number, verdict, slow, survivors=0):
        look, lease = self.ask(30_000)
        if look.retry_ms == 0:
            self.inflight.pop()
            self.hear([Report(look.generation, lease if look.probe else "", verdict, slow, survivors=survivors)] * number, 0)

    def force(self, word):
        before = replace(self.circuit)
        look = self.circuit.force(self.now, word)
        self.record(["force", self.now, json.dumps(word)], look, before)

    def forget(self):
        """Redis loses its memory."""
        self.now = max(self.now, self.circuit.last) + 1_000  # a generation is newer than any before by the clock
        self.circuit = Circuit.from_fields({}, self.now)
        self.counted = []
        self.sent.append(([], None, self.circuit))
        self.ask(30_000)

    def hear(self, reports, jitter):
        start = replace(self.circuit)
        for report in reports:
            before = replace(self.circuit, buckets=list(self.circuit.buckets))
            self.circuit.report(self.now, report, jitter)
            self.check_report(before, report, jitter)
        arguments = ["report", self.now, json.dumps([jitter, [told(report) for report in reports]])]
        self.record(arguments, self.circuit.look(max(self.now, start.last)), start)

    def check_report(self, before, report, jitter):
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

    def check_opening(self, before, after, report, jitter, clock):
        if before.state is CLOSED:
            window = before.window(clock)
            in_a_row = before.fails + 1 + report.slow
            assert window.total + 1 >= RULES.min_calls or in_a_row >= max(RULES.fails_in_a_row, report.survivors)  # B7
            assert window.failures + (report.verdict is F) + window.slow + report.slow > 0
        open_ms = min(300_000, 10_000 * 2 ** (after.opens - 1))  # B10
        shortest = clock + open_ms + open_ms * jitter // 1000
        assert after.until == max(shortest, after.blocked)

    def check_window(self, before, report, clock):
        """B14: the buckets say what a list of everything would say."""
        if self.circuit.generation != before.generation:
            self.counted = []
        elif before.state in (CLOSED, BreakerState.FORCED_CLOSED) and report.verdict is not X:
            self.counted.append((clock // RULES.bucket_ms, report.verdict, report.slow))
        live = [c for c in self.counted if c[0] > clock // RULES.bucket_ms - RULES.buckets]
        failures = sum(c[1] is F for c in live)
        assert self.circuit.window(clock) == (len(live) - failures, failures, sum(c[2] for c in live))

    def record(self, arguments, look, before):
        assert self.circuit.generation >= before.generation  # B1
        assert self.circuit.last >= before.last
        assert look.retry_ms >= 0
        if self.circuit.generation != before.generation:
            self.counted = []
        self.sent.append((arguments, look, replace(self.circuit, buckets=list(self.circuit.buckets))))


def recorded(story):
    trace = Trace()
    trace.play(story)
    return trace.sent


def replayed(client, script, sent):
    """What Redis answered, and what it holds, after each thing sent."""
    pipeline = client.pipeline(transaction=False)
    pipeline.delete(key(PROVIDER))
    for arguments, look, _ in sent:
        if look is None:
            pipeline.delete(key(PROVIDER))
        else:
            pipeline.eval(script, 1, key(PROVIDER), *arguments)
        pipeline.hgetall(key(PROVIDER))
    replies = pipeline.execute()[1:]
    return list(zip(replies[::2], replies[1::2], strict=True))


def same(client, script, story):
    sent = recorded(story)
    for (arguments, look, circuit), (reply, fields) in zip(sent, replayed(client, script, sent), strict=True):
        if look is not None:
            assert (to_look(reply), Circuit.from_fields(fields, 0)) == (look, circuit), arguments


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@given(stories)
@settings(max_examples=300, deadline=None)
def test_the_rules_keep_their_invariants(story):
    recorded(story)


def test_redis_and_the_model_give_the_same_verdicts_for_the_same_story(client):
    @given(stories)
    @settings(max_examples=250, deadline=None)
    def agree(story):
        same(client, BREAKER, story)

    agree()


@given(stories)
@settings(max_examples=200, deadline=None)
def test_from_wherever_it_stands_a_good_provider_is_closed_again(story):
    trace = Trace()
    trace.play(story)
    if trace.circuit.state in (BreakerState.FORCED_OPEN, BreakerState.FORCED_CLOSED):
        trace.force("reset")
    longest_ms = max(RULES.open_most_ms * 1.2, RULES.block_most_ms, RULES.isolate_most_ms) + 30_000
    trace.now = max(trace.now, trace.circuit.last) + int(longest_ms)
    for _ in range(RULES.good_probes):
        trace.once(S)
    assert trace.circuit.state is CLOSED


TRIP = ("burst", 0, 8, F, False)
# What the script says, what a careless edit would make of it, and a story in which the difference is seen.
MUTANTS = {
    "no generation check": (
        "if report.generation ~= number('generation') then return end",
        "",
        [("forget", 0), ("tell", 0, 0, S, False, 0, 0, False)],
    ),
    "no probe exclusion": (
        "and number('blocked') <= now and not leased()",
        "and number('blocked') <= now",
        [TRIP, ("ask", 11_000, 2_000), ("ask", 0, 2_000)],
    ),
    "no holder check": (
        "if report.lease ~= '' and report.lease == text('lease') then judge",
        "if true then judge",
        [TRIP, ("burst", 11_000, 2, S, False)],
    ),
    "no lease expiry": (
        "text('lease') ~= '' and number('lease_until') > now",
        "text('lease') ~= ''",
        [TRIP, ("ask", 11_000, 2_000), ("ask", 3_000, 2_000)],
    ),
    "no clock clamp": ("now = math.max(now, number('last'))", "", [("once", -5_000, S)]),
    "open time does not grow": (
        "rules.open_ms * 2 ^ math.min(number('opens') - 1, 20)",
        "rules.open_ms",
        [TRIP, ("once", 11_000, F)],
    ),
    "openings are not forgotten": (
        "if stored.state == 'closed' and now - number('closed_at') > rules.forget_ms",
        "if false",
        [TRIP, ("once", 11_000, S), ("once", 0, S), ("burst", 700_000, 8, F, False)],
    ),
    "isolation ends by itself early": (
        "now >= math.max(number('until'), number('blocked'))",
        "now >= number('blocked')",
        [("tell", 0, 0, S, False, 0, 700, False), ("ask", 0, 2_000)],
    ),
    "a later block is shorter": (
        "set('blocked', math.max(number('blocked'), now",
        "set('blocked', math.max(0, now",
        [("tell", 0, 0, S, False, 30_000, 0, True), ("tell", 0, 0, S, False, 700, 0, False)],
    ),
    "a block has no limit": (
        "math.min(report.block_ms, rules.block_most_ms)",
        "report.block_ms",
        [("tell", 0, 0, X, False, 5_000_000, 0, False)],
    ),
    "a block does not lengthen the opening": (
        "math.floor(open_ms * jitter / 1000), number('blocked'))",
        "math.floor(open_ms * jitter / 1000), 0)",
        [("burst", 0, 7, F, False), ("tell", 0, 0, F, False, 30_000, 0, False)],
    ),
    "no ramp": ("now < closed_at + rules.ramp_ms", "false", [TRIP, ("once", 11_000, S), ("once", 0, S)]),
    "old buckets count": (
        "if period > oldest then",
        "if true then",
        [("burst", 0, 18, S, True), ("burst", 70_000, 2, S, True)],
    ),
    "buckets are not emptied": (
        "if period ~= this then successes",
        "if false then successes",
        [("once", 0, S), ("once", 60_000, S)],
    ),
    "no verdict counts": ("elseif report.verdict ~= 'X' then", "else", [("once", 0, X)]),
    "one good probe closes": (">= rules.good_probes", ">= 1", [TRIP, ("once", 11_000, S)]),
    "a probe is not isolated": (
        "  block(report)\n  if report.isolate_ms > 0 then",
        "  block(report)\n  if false then",
        [TRIP, ("ask", 11_000, 2_000), ("tell", 0, -1, X, False, 0, 700, False)],
    ),
    "who is in flight stands for nothing": (
        "and number('fails') >= report.survivors()",
        "",
        [("burst", 0, 10, F, False, 15)],
    ),
    "who is in flight is no part of the whole": (
        "and failed * 100 >= rules.fail_percent * (total + report.survivors())",
        "",
        [("burst", 0, 10, S, False), ("burst", 0, 7, F, False, 15), ("once", 0, S), ("burst", 0, 5, F, False, 15)],
    ),
    "a good call trips": (
        "if report.verdict == 'F' then\n    if",
        "if true then\n    if",
        [("burst", 0, 7, F, False), ("once", 0, S)] * 2 + [("once", 0, F), ("once", 0, S)] * 3,
    ),
    "reset keeps the openings": (
        "{'until', 'opens', 'closed_at'}",
        "{'until', 'closed_at'}",
        [TRIP, ("force", 0, "reset")],
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_script_is_noticed(client, name):
    old, new, story = MUTANTS[name]
    assert BREAKER.count(old) == 1
    same(client, BREAKER, story)
    with pytest.raises(AssertionError):
        same(client, BREAKER.replace(old, new), story)
