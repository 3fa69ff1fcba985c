"""X11 and X12: the cache on Valkey beside a list that ages, and many who want the same at once, in whatever order things happen."""

import asyncio
import json
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from redis.asyncio import Redis

from worker.cost import Usage
from worker.job import Answer, ChatRequest
from worker.resilience import cache as cache_module
from worker.resilience import gate_store
from worker.resilience.cache import MOST_BYTES, AnswerCache, key

ENTRIES, BYTES = 4, 6_000
UNIT_S = 1_000  # by this much ages differ, so that a busy machine makes no difference
ANSWER = Answer(content="well", finish_reason="stop", provider="p", model="m", usage=Usage(1, 2))
LESSER = [{"degraded": rung} for rung in ("smaller", "cache", "static")] + [{"age_s": 0.0}, {"content": "x" * MOST_BYTES}]
LESSER += [{"finish_reason": reason} for reason in ("length", "content_filter", "")] + [{"tool_calls": [{"id": "x"}]}]
NAMES = st.sampled_from("abcdefg")
BOUNDED = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A busy machine is no reason for a miss."""
    monkeypatch.setattr(gate_store, "ROUND_TRIP_S", 20)


@dataclass
class Kept:
    name: str
    answer: Answer | None  # None: overwritten with something else
    keep: int
    size: int
    age: int = 0


class Shelf(RuleBasedStateMachine):
    """Two workers' caches, and what they ought to hold, oldest first; times in units."""

    def __init__(self, url):
        super().__init__()
        self.runner = asyncio.Runner()
        self.redis = Redis.from_url(url)
        self.caches = [AnswerCache(self.redis, entries=ENTRIES, most_bytes=BYTES) for _ in range(2)]
        self.held = []
        self.puts = 0
        self.runner.run(self.redis.flushall())

    def teardown(self):
        self.runner.run(self.redis.aclose())
        self.runner.close()

    @rule(name=NAMES, size=st.sampled_from([1, 10, 900, 2_500, 5_000]), keep=st.integers(1, 6), who=st.integers(0, 1))
    def an_answer_is_kept_and_the_oldest_make_room(self, name, size, keep, who):
        self.puts += 1
        answer = replace(ANSWER, content=f"{self.puts} {'x' * size}")
        self.runner.run(self.caches[who].put(name, answer, keep_s=keep * UNIT_S))
        self.held = [kept for kept in self.held if kept.name != name]
        self.held.append(Kept(name, answer, keep, len(json.dumps(answer.to_json()))))
        while len(self.held) > ENTRIES or sum(kept.size for kept in self.held) > BYTES:
            self.held.pop(0)

    @rule(name=NAMES, lesser=st.sampled_from(LESSER))
    def less_than_a_full_answer_changes_nothing(self, name, lesser):
        self.runner.run(self.caches[0].put(name, replace(ANSWER, **lesser), keep_s=6 * UNIT_S))

    @rule(units=st.integers(1, 4))
    def time_passes(self, units):
        self.runner.run(self.age(units * UNIT_S))
        for kept in self.held:
            kept.age += units

    @rule()
    def redis_loses_all(self):
        self.runner.run(self.redis.flushall())
        self.held = []

    @rule(name=NAMES)
    def another_version_writes(self, name):
        self.runner.run(self.redis.set(f"backstop:cache:{name}", b"what is this", xx=True, keepttl=True))
        for kept in self.held:
            kept.answer = None if kept.name == name else kept.answer

    @rule(name=NAMES, at_most=st.integers(0, 8), who=st.integers(0, 1))
    def it_gives_what_was_kept_under_the_name_and_is_young_enough(self, name, at_most, who):
        found = self.runner.run(self.caches[who].get(name, at_most_s=(at_most + 0.5) * UNIT_S))
        wanted = next((kept for kept in self.live() if kept.name == name and kept.answer and kept.age <= at_most), None)
        assert (found and found.answer) == (wanted and wanted.answer)
        assert found is None or 0 <= found.age_s - wanted.age * UNIT_S < UNIT_S / 2

    @invariant()
    def it_holds_no_more_than_it_may_and_nothing_for_ever(self):
        names, sizes, left_ms = self.runner.run(self.look())
        assert names == {f"backstop:cache:{kept.name}" for kept in self.live()}
        assert sizes.pop("all", 0) == sum(sizes.values()) <= BYTES
        assert sizes == {f"backstop:cache:{kept.name}": kept.size for kept in self.held}
        assert all(0 < left <= 6 * UNIT_S * 1000 for left in left_ms)

    def live(self):
        return [kept for kept in self.held if kept.age < kept.keep]

    async def age(self, seconds):
        """For Redis, what it holds was stored so much earlier, and has so much less time left."""
        for name, stored_us in await self.redis.zrange("backstop:cache:index", 0, -1, withscores=True):
            await self.redis.zadd("backstop:cache:index", {name: stored_us - seconds * 1_000_000})
            stamp, space, body = (await self.redis.get(name) or b"").partition(b" ")
            if stamp.isdigit():
                await self.redis.set(name, b"%d%s%s" % (int(stamp) - seconds * 1_000_000, space, body), keepttl=True)
            left_ms = await self.redis.pttl(name)
            if left_ms > 0:
                await self.redis.pexpire(name, left_ms - seconds * 1_000)

    async def look(self):
        """Names of the answers, sizes on the books, and how long each answer stays."""
        names = {name.decode() for name in await self.redis.keys("*")} - {"backstop:cache:index", "backstop:cache:sizes"}
        sizes = {name.decode(): int(size) for name, size in (await self.redis.hgetall("backstop:cache:sizes")).items()}
        return names, sizes, [await self.redis.pttl(name) for name in names]


def test_the_cache_gives_what_was_kept_no_older_than_asked_for_and_keeps_its_bounds(redis_url):
    rules = settings(BOUNDED, max_examples=100, stateful_step_count=40)
    run_state_machine_as_test(lambda: Shelf(redis_url), settings=rules)
    print(f"{rules.max_examples} stories")


words = st.sampled_from(["", "a", "ab", "b", "\u00e9", "e\u0301", "\ud800", '"', "\\u00e9", "0", "None"])
values = st.one_of(st.sampled_from([None, True, False, 0, 1, 0.0, 1.0, "1", "true", [], {}]), words)
nested = st.recursive(values, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2), max_leaves=4)
requests = st.builds(
    ChatRequest,
    messages=st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": words | nested}), min_size=1, max_size=2
    ),
    parameters=st.dictionaries(st.sampled_from(["temperature", "max_tokens", "response_format", "seed"]), nested, max_size=3),
)
wants = st.tuples(words, words, requests)


def alike(one, other):
    """Equal without what Python forgives: 1 is neither 1.0 nor True."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(value, other[name]) for name, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other


@st.composite
def pairs(draw):
    """A want, and the same one with its names in another order and then, mostly, one thing changed."""
    tenant, chain, request = one = draw(wants)
    other = ChatRequest(deepcopy(request.messages), dict(reversed(request.parameters.items())))
    match draw(st.integers(0, 6)):
        case 0:
            return one, (draw(words), chain, other)
        case 1:
            return one, (tenant, draw(words), other)
        case 2:
            return one, (tenant + chain, "", other)
        case 3:
            other.messages[-1]["content"] = draw(words | nested)
        case 4:
            other.messages.reverse()
        case 5 if other.parameters:
            other.parameters[draw(st.sampled_from(sorted(other.parameters)))] = draw(nested)
    return one, (tenant, chain, other)


HELLO = ChatRequest([{"role": "user", "content": "caf\u00e9"}], {"seed": 1})
FORMS = ChatRequest([{"role": "user", "content": "cafe\u0301"}], {"seed": 1})


@settings(BOUNDED, max_examples=1_000)
@given(pairs())
@example((("a", "bc", HELLO), ("ab", "c", HELLO)))
@example((("a", "c", HELLO), ("b", "c", HELLO)))
@example((("a", "c", HELLO), ("a", "c", FORMS)))
@example((("a", "c", HELLO), ("a", "c", replace(HELLO, parameters={"seed": True}))))
@example((("a", "c", HELLO), ("a", "c", replace(HELLO, parameters={"seed": 1.0}))))
@example((("a", "c", HELLO), ("a", "c", replace(HELLO, parameters={"seed": 1, "user": "ann", "stream": True}))))
def test_two_keys_are_equal_exactly_when_tenant_chain_and_all_that_shapes_the_answer_are(pair):
    (tenant, chain, request), (other_tenant, other_chain, other) = pair
    shaping = {name: value for name, value in other.parameters.items() if name not in ("user", "stream")}
    same = (tenant, chain) == (other_tenant, other_chain) and alike(request.to_json(), {"messages": other.messages, "parameters": shaping})
    assert (key(*pair[0]) == key(*pair[1])) is same


@dataclass
class Crowd:
    """Those who want the same: when each one comes, whether the first to ask gets something to keep, and how it ends."""

    caches: list[AnswerCache]
    ending: str
    moments: int  # that asking takes
    asked: int = 0

    async def want(self, number, delay):
        for _ in range(delay):
            await asyncio.sleep(0)
        async with self.caches[number % len(self.caches)].alone("one", at_most_s=UNIT_S, wait_s=30) as found:
            if found is not None:
                return found.answer
            self.asked += 1
            first = self.asked == 1
            for _ in range(self.moments):
                await asyncio.sleep(0.001)
            if first and self.ending == "raises":
                raise ConnectionError
            if self.ending == "kept":
                await self.caches[number % len(self.caches)].put("one", ANSWER, keep_s=UNIT_S)
            return ANSWER


@settings(BOUNDED, max_examples=120)
@given(
    delays=st.lists(st.integers(0, 30), min_size=2, max_size=24),
    moments=st.integers(0, 8),
    ending=st.sampled_from(["kept", "kept", "nothing to keep", "raises"]),
)
def test_of_any_crowd_that_wants_the_same_exactly_one_asks_and_all_get_an_answer(redis_url, delays, moments, ending):
    async def main():
        async with Redis.from_url(redis_url) as redis, Redis.from_url(redis_url) as other, asyncio.timeout(60):
            await redis.flushall()
            crowd = Crowd([AnswerCache(redis), AnswerCache(other)], ending, moments)
            got = await asyncio.gather(*map(crowd.want, range(len(delays)), delays), return_exceptions=True)
            assert not await redis.exists("backstop:cache:one:lease")
            return crowd.asked, got

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cache_module, "POLL_S", 0.001)
        asked, got = asyncio.run(main())
    assert sorted(map(type, got), key=str) == sorted(
        [ConnectionError] * (ending == "raises") + [Answer] * (len(delays) - (ending == "raises")), key=str
    )
    assert asked == 1 if ending == "kept" else asked >= 1
    assert asked == len(delays) or ending != "nothing to keep"
