"""The cache on a real Redis: the same request of the same tenant, not older than asked, and nothing that is less than an answer."""

import asyncio
from dataclasses import replace

import pytest
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


async def until(answer):
    """What `answer` gives, as soon as it gives something."""
    while not (found := await answer()):  # noqa: ASYNC110 - the event is Redis's
        await asyncio.sleep(0.005)
    return found


async def told(redis, command, times):
    """Whether Redis has been told this so often since its statistics were reset."""
    return (await redis.info("commandstats")).get(f"cmdstat_{command}", {"calls": 0})["calls"] >= times


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
        ({"temperature": 0, "n": 1}, True),
        ({"temperature": 0, "tools": []}, True),
    ],
)
def test_a_request_that_is_answered_much_the_same_each_time_may_be_given_the_same_answer(parameters, kept):
    assert cacheable(ChatRequest(HI, parameters), any_temperature=False) is kept
    assert cacheable(ChatRequest(HI, parameters), any_temperature=True)


@pytest.mark.parametrize(
    "parameters",
    [
        {"n": 2},
        {"tools": [{"type": "function"}]},
        {"functions": [{"name": "f"}]},
        {"plugins": [{"id": "web"}]},
        {"web_search_options": {"user_location": None}},
        {"enable_search": True},
    ],
)
def test_one_with_several_choices_or_that_looks_something_up_may_not_whatever_its_temperature(parameters):
    for any_temperature in (False, True):
        assert not cacheable(ChatRequest(HI, {"temperature": 0} | parameters), any_temperature=any_temperature)


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://example.com/cat.png", False),
        (" HTTP://EXAMPLE.COM", False),
        ("gs://b/cat.png", False),
        ("data:image/png;base64,A/+/", True),
    ],
)
def test_a_picture_behind_a_url_may_be_another_one_tomorrow_but_not_a_link_in_the_text(url, kept):
    parts = [{"type": "text", "text": 'see "https://example.com"'}, {"type": "image_url", "image_url": {"url": url}}]
    assert cacheable(ChatRequest([{"role": "user", "content": parts}], {"seed": 1}), any_temperature=False) is kept


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
        stored_us, _, body = (await redis.get("backstop:cache:one")).partition(b" ")
        await redis.set("backstop:cache:one", b"%d %s" % (int(stored_us) - 100_000_000, body))
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
        kept = [name for name in "abcd" if await cache.get(name, at_most_s=DAY_S)]
        assert kept == ["a", "c", "d"]
        assert 0 < await redis.pttl("backstop:cache:a") <= DAY_S * 1000
        assert await redis.zcard("backstop:cache:index") == 3

    play(redis_url, story, entries=3)


def test_it_holds_so_many_bytes_and_the_oldest_go_first(redis_url):
    async def story(cache, redis):
        for name, size in (("a", 3000), ("b", 1000), ("c", 4000), ("b", 10), ("d", 2000)):
            await cache.put(name, replace(ANSWER, content="x" * size), keep_s=DAY_S)
        assert [name for name in "abcd" if await cache.get(name, at_most_s=DAY_S)] == ["b", "c", "d"]
        await cache.put("e", replace(ANSWER, content="x" * 7000), keep_s=DAY_S)
        assert [name for name in "abcde" if await cache.get(name, at_most_s=DAY_S)] == ["e"]

    play(redis_url, story, most_bytes=8000)


def test_nothing_is_kept_for_no_time(redis_url):
    async def story(cache, redis):
        with capture_logs() as logs:
            for keep_s in (0, -1):
                await cache.put("one", ANSWER, keep_s=keep_s)
        assert (await redis.keys("*"), logs) == ([], [])

    play(redis_url, story)


def test_without_its_index_it_still_keeps_answers(redis_url):
    async def story(cache, redis):
        for name in ("a", "b"):
            await cache.put(name, replace(ANSWER, content="x" * 3000), keep_s=DAY_S)
        await redis.delete("backstop:cache:index")
        for name in ("c", "d", "e", "f"):
            await cache.put(name, replace(ANSWER, content="x" * 3000), keep_s=DAY_S)
        assert [name for name in "cdef" if await cache.get(name, at_most_s=DAY_S)] == ["e", "f"]

    play(redis_url, story, most_bytes=8000)


def test_an_answer_that_another_version_wrote_is_none(redis_url):
    async def story(cache, redis):
        for value in (b"", b"x", b"1", b"1 no json", b'1 {"content": 5}', b"\xff \xff", b"1" * 99 + b" {}"):
            await redis.set("backstop:cache:one", value)
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
        assert sorted(await redis.keys("*")) == [b"backstop:cache:index", b"backstop:cache:one", b"backstop:cache:sizes"]

    play(redis_url, story)


class Interrupted(AnswerCache):
    """One in whose way something happens before its `before`th question to Redis."""

    async def _asked(self, ask):
        self.before -= 1
        if self.before == 0:
            await self.happens()
        return await super()._asked(ask)


@pytest.mark.parametrize("before", [1, 2, 3])
def test_whoever_comes_while_the_other_one_finishes_gets_that_answer(redis_url, before, monkeypatch):
    monkeypatch.setattr(cache_module, "POLL_S", 0.01)

    async def story(cache, redis):
        leader = cache.alone("one", at_most_s=DAY_S, wait_s=30)
        assert await leader.__aenter__() is None

        async def finishes():
            await cache.put("one", ANSWER, keep_s=DAY_S)
            await leader.__aexit__(None, None, None)

        other = Interrupted(redis)
        other.before, other.happens = before, finishes
        async with other.alone("one", at_most_s=DAY_S, wait_s=30) as found:
            assert other.before <= 0
            assert found.answer == ANSWER
        assert not await redis.exists("backstop:cache:one:lease")

    play(redis_url, story)


def test_when_the_one_who_asks_gets_nothing_to_keep_nobody_waits_for_a_second_one(redis_url, monkeypatch):
    """Or of a hundred tickets with the same text, all cut off by max_tokens, the last would wait for ninety-nine."""
    monkeypatch.setattr(cache_module, "POLL_S", 0.01)

    async def story(cache, redis):
        asking, all_ask = 0, asyncio.Event()

        async def want():
            nonlocal asking
            async with cache.alone("one", at_most_s=DAY_S, wait_s=30) as found:
                assert found is None
                asking += 1
                if asking == 5:
                    all_ask.set()
                await all_ask.wait()

        async with cache.alone("one", at_most_s=DAY_S, wait_s=30) as found:
            assert found is None
            waiting = [asyncio.create_task(want()) for _ in range(5)]
            await until(lambda: told(redis, "set", 6))
            assert asking == 0
        async with asyncio.timeout(20):
            await asyncio.gather(*waiting)
        assert await redis.keys("*") == []

    play(redis_url, story)


def test_one_who_dies_holds_up_the_others_no_longer_than_his_lease(redis_url, monkeypatch):
    monkeypatch.setattr(cache_module, "LEASE_S", 0.3)
    monkeypatch.setattr(cache_module, "POLL_S", 0.01)

    async def story(cache, redis):
        dead = cache.alone("one", at_most_s=DAY_S, wait_s=60)
        assert await dead.__aenter__() is None
        monkeypatch.setattr(cache_module, "LEASE_S", 30)  # of the others
        async with asyncio.timeout(20), cache.alone("one", at_most_s=DAY_S, wait_s=60) as found:
            assert found is None
            mine = await redis.get("backstop:cache:one:lease")
            await dead.__aexit__(None, None, None)  # not dead after all, only slow
            assert await redis.get("backstop:cache:one:lease") == mine
        assert await redis.keys("*") == []

    play(redis_url, story)


def test_nobody_waits_longer_than_he_has(redis_url):
    async def story(cache, redis):
        await redis.set("backstop:cache:one:lease", "of a slow one", px=60_000)
        async with cache.alone("one", at_most_s=DAY_S, wait_s=0.05) as found:
            assert found is None
        assert await redis.get("backstop:cache:one:lease") == b"of a slow one"

    play(redis_url, story)


@pytest.mark.parametrize("away_s", [0, 60])
def test_a_redis_that_is_away_knows_nothing_and_that_is_said_once(monkeypatch, away_s):
    monkeypatch.setattr(cache_module, "AWAY_S", away_s)

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


def test_one_that_was_away_is_left_alone_for_a_moment_and_then_asked_again(redis_url):
    async def story(cache, redis):
        await redis.lpush("backstop:cache:one", "no text, which is an error")
        assert await cache.get("one", at_most_s=DAY_S) is None
        await redis.delete("backstop:cache:one")
        await AnswerCache(redis).put("one", ANSWER, keep_s=DAY_S)
        await redis.config_resetstat()
        assert await cache.get("one", at_most_s=DAY_S) is None
        assert not await told(redis, "get", 1)
        await until(lambda: cache.get("one", at_most_s=DAY_S))

    play(redis_url, story)
