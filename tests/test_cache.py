"""The cache on a real Redis: the same request of the same tenant, not older than asked, and nothing that is less than an answer."""

import asyncio
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from structlog.testing import capture_logs

from worker.cost import Usage
from worker.job import Answer, ChatRequest
from worker.resilience import cache as cache_module
from worker.resilience import gate_store
from worker.resilience.cache import MOST_BYTES, AnswerCache, cacheable, key

HI = [{"role": "user", "content": "hi"}]
ANSWER = Answer(content="well", finish_reason="stop", provider="p", model="m", usage=Usage(1, 2))
DAY_S = 86_400


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A busy machine is no reason for a miss in a test that is not about it."""
    monkeypatch.setattr(gate_store, "ROUND_TRIP_S", 20)


def play(redis_url, story, **options):
    async def main():
        async with Redis.from_url(redis_url) as redis:
            await story(AnswerCache(redis, **options), redis)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 0.3}, True),
        ({"temperature": 0.31}, False),
        ({}, False),  # a vendor's default is warm
        ({"temperature": "0"}, False),
        ({"temperature": 1, "seed": 0}, True),
        ({"temperature": 0, "n": 2}, False),
        ({"temperature": 0, "n": 1}, True),
        ({"temperature": 0, "tools": [{"type": "function"}]}, False),
    ],
)
def test_what_may_be_given_twice(parameters, kept):
    assert cacheable(ChatRequest(HI, parameters), any_temperature=False) is kept
    alone = not parameters.get("tools") and parameters.get("n") != 2
    assert cacheable(ChatRequest(HI, parameters), any_temperature=True) is alone


@pytest.mark.parametrize(("url", "kept"), [("https://example.com/cat.png", False), ("data:image/png;base64,AAAA", True)])
def test_a_picture_behind_a_url_may_be_another_one_tomorrow(url, kept):
    parts = [{"type": "text", "text": 'see "https://example.com"'}, {"type": "image_url", "image_url": {"url": url}}]
    assert cacheable(ChatRequest([{"role": "user", "content": parts}], {"seed": 1}), any_temperature=False) is kept


words = st.text(max_size=5)
requests = st.builds(
    ChatRequest,
    messages=st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": words}), min_size=1, max_size=3),
    parameters=st.dictionaries(st.sampled_from(["temperature", "max_tokens", "stop", "seed"]), st.integers(0, 3) | words),
)


@given(st.tuples(words, words, requests), st.tuples(words, words, requests))
def test_two_keys_are_equal_exactly_when_all_that_shapes_the_answer_is(one, other):
    same = json.dumps(one[:2]) == json.dumps(other[:2]) and json.dumps(one[2].to_json(), sort_keys=True) == json.dumps(
        other[2].to_json(), sort_keys=True
    )
    assert (key(*one) == key(*other)) is same


def test_what_does_not_shape_the_answer_is_not_in_the_key_and_the_order_of_names_is_none():
    plain = ChatRequest(HI, {"temperature": 0, "max_tokens": 5})
    other = ChatRequest(HI, {"max_tokens": 5, "user": "ann", "metadata": {"a": 1}, "stream": True, "temperature": 0})
    assert key("t", "c", plain) == key("t", "c", other)


def test_an_answer_comes_back_with_its_age_and_not_to_another_key(redis_url):
    async def story(cache, redis):
        await cache.put("one", ANSWER, keep_s=DAY_S)
        found = await cache.get("one", at_most_s=DAY_S)
        assert found.answer == ANSWER
        assert 0 <= found.age_s < 60
        assert await cache.get("other", at_most_s=DAY_S) is None

    play(redis_url, story)


def test_one_that_is_older_than_asked_for_is_not_given(redis_url):
    async def story(cache, redis):
        await cache.put("one", ANSWER, keep_s=DAY_S)
        stored_ms, _, body = (await redis.get("backstop:cache:one")).partition(b" ")
        await redis.set("backstop:cache:one", b"%d %s" % (int(stored_ms) - 100_000, body))
        assert await cache.get("one", at_most_s=99) is None
        assert (await cache.get("one", at_most_s=200)).age_s >= 100

    play(redis_url, story)


@pytest.mark.parametrize(
    "lesser",
    [
        {"degraded": "smaller"},
        {"age_s": 3.0},
        {"finish_reason": "length"},
        {"tool_calls": [{"id": "x"}]},
        {"content": "x" * MOST_BYTES},
    ],
)
def test_what_is_no_full_answer_is_not_kept(redis_url, lesser):
    async def story(cache, redis):
        await cache.put("one", replace(ANSWER, **lesser), keep_s=DAY_S)
        assert await redis.keys("*") == []

    play(redis_url, story)


def test_it_holds_so_many_and_the_oldest_go_first(redis_url):
    async def story(cache, redis):
        for name in ("a", "b", "c", "a", "d"):
            await cache.put(name, ANSWER, keep_s=DAY_S)
            await asyncio.sleep(0.002)  # the server counts milliseconds
        kept = [name for name in "abcd" if await cache.get(name, at_most_s=DAY_S)]
        assert kept == ["a", "c", "d"]
        assert 0 < await redis.pttl("backstop:cache:a") <= DAY_S * 1000
        assert await redis.zcard("backstop:cache:index") == 3

    play(redis_url, story, entries=3)


def test_an_answer_that_another_version_wrote_is_none(redis_url):
    async def story(cache, redis):
        for body in (b"no json", b'{"content": 5}'):
            await redis.set("backstop:cache:one", b"1 " + body)
            assert await cache.get("one", at_most_s=1e12) is None

    play(redis_url, story)


def test_of_many_who_want_the_same_at_once_one_asks_for_all(redis_url):
    async def story(cache, redis):
        asked = []

        async def want(number):
            async with cache.alone("one", at_most_s=DAY_S, wait_s=30) as found:
                if found is None:
                    asked.append(number)
                    await asyncio.sleep(0.05)
                    await cache.put("one", ANSWER, keep_s=DAY_S)
                    return ANSWER
                return found.answer

        assert await asyncio.gather(*(want(number) for number in range(20))) == [ANSWER] * 20
        assert len(asked) == 1

    play(redis_url, story)


def test_when_the_one_who_asks_gets_nothing_or_dies_the_next_one_asks(redis_url, monkeypatch):
    monkeypatch.setattr(cache_module, "POLL_S", 0.01)

    async def story(cache, redis):
        async with cache.alone("one", at_most_s=DAY_S, wait_s=30) as found:
            assert found is None
        async with cache.alone("one", at_most_s=DAY_S, wait_s=30) as found:  # the first one failed
            assert found is None
        await redis.set("backstop:cache:one:lease", "of a dead one", px=50)
        async with cache.alone("one", at_most_s=DAY_S, wait_s=30) as found:
            assert found is None
            await redis.set("backstop:cache:one:lease", "somebody else's by now")
        assert await redis.get("backstop:cache:one:lease") == b"somebody else's by now"

    play(redis_url, story)


def test_nobody_waits_longer_than_he_has(redis_url):
    async def story(cache, redis):
        await redis.set("backstop:cache:one:lease", "of a slow one", px=60_000)
        async with cache.alone("one", at_most_s=DAY_S, wait_s=0.05) as found:
            assert found is None

    play(redis_url, story)


def test_a_redis_that_is_away_knows_nothing_and_that_is_said_once():
    async def main():
        async with Redis.from_url("redis://127.0.0.1:1/0") as redis:
            cache = AnswerCache(redis)
            await cache.put("one", ANSWER, keep_s=1)
            assert await cache.get("one", at_most_s=1) is None
            async with cache.alone("one", at_most_s=1, wait_s=30) as found:
                assert found is None

    with capture_logs() as logs:
        asyncio.run(main())
    assert [entry["event"] for entry in logs] == ["cache_away"]
