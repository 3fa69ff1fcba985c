"""How often a key may be used, in a Redis that all processes of the API share."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from fastapi import HTTPException
from redis.asyncio import Redis

from api import rate
from worker.job import new_id
from worker.keys import Caller


def test_a_key_is_answered_429_once_its_requests_of_a_minute_are_used_and_others_go_on(stage):
    limited, other = stage.key(rpm=3), stage.key(rpm=3)
    answers = [stage.client.get("/v1/jobs", headers=limited) for _ in range(4)]
    assert [response.status_code for response in answers] == [200, 200, 200, 429]
    assert [response.headers["RateLimit"] for response in answers] == ['"rpm";r=2', '"rpm";r=1', '"rpm";r=0', '"rpm";r=0']
    assert {response.headers["RateLimit-Policy"] for response in answers} == {'"rpm";q=3;w=60'}
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 20
    assert answers[-1].headers["Content-Type"] == "application/problem+json"
    assert stage.client.get("/v1/jobs", headers=other).status_code == 200
    assert "RateLimit" not in stage.client.get("/v1/jobs").headers


def test_a_limited_key_is_told_so_in_openais_words_on_its_routes(stage):
    limited = stage.key(rpm=1)
    assert stage.client.get("/v1/models", headers=limited).status_code == 200
    response = stage.client.get("/v1/models", headers=limited)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(response.headers["Retry-After"]) >= 1


def test_nothing_is_submitted_by_a_request_beyond_the_limit(stage):
    limited = stage.key(rpm=1, tenant="acme")
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    assert [stage.client.post("/v1/jobs", headers=limited, json=body).status_code for _ in range(3)] == [202, 429, 429]
    assert len(stage.sql("SELECT FROM jobs WHERE tenant = 'acme'")) == 1


def test_a_revoked_key_is_refused_whatever_is_left_of_its_limit(stage):
    limited = stage.key(rpm=1, tenant="acme")
    stage.client.get("/v1/jobs", headers=limited)
    stage.sql("UPDATE api_keys SET revoked_at = now() WHERE tenant = 'acme'")
    assert stage.client.get("/v1/jobs", headers=limited).status_code == 401


def test_without_redis_nobody_is_limited(stage_without_redis):
    limited = stage_without_redis.key(rpm=1)
    assert [stage_without_redis.client.get("/v1/jobs", headers=limited).status_code for _ in range(3)] == [200] * 3


def with_redis(redis_url: str, story: Callable[[Redis], Awaitable[None]]) -> None:
    async def told() -> None:
        async with Redis.from_url(redis_url) as redis:
            await story(redis)

    asyncio.run(told())


async def send(message: object) -> None: ...


async def drawn(redis: Redis, key: str, rpm: int) -> list[int]:
    return await redis.eval(rate._SCRIPT, 1, key, rpm)


def test_what_many_draw_at_once_is_no_more_than_the_limit(redis_url):
    async def story(redis: Redis) -> None:
        meter, caller = rate.Meter(), Caller(new_id(), "default", "ci", rpm=50)
        answers = await asyncio.gather(*(meter.counted(redis, caller, send) for _ in range(400)), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, HTTPException)]
        assert {answer.status_code for answer in refused} == {429}
        assert 400 - len(refused) in (50, 51)  # one comes back each 1.2 s

    with_redis(redis_url, story)


def test_the_allowance_comes_back_evenly_and_never_grows_beyond_a_minutes(redis_url):
    async def story(redis: Redis) -> None:
        for rpm in (1, 7, 60, 1_000_000):
            await redis.delete("k")
            assert await drawn(redis, "k", rpm) == [rpm - 1, 0]
            await redis.set("k", b"0")  # as long ago as can be
            assert await drawn(redis, "k", rpm) == [rpm - 1, 0]
        seconds, _ = await redis.time()
        await redis.set("k", str((seconds + 60) * 1_000_000).encode())  # all of this minute's are used
        left, wait_ms = await drawn(redis, "k", 6)
        assert left == 0
        assert 9_000 <= wait_ms <= 11_000
        await redis.set("k", str((seconds + 20) * 1_000_000).encode())  # two of six were used just now
        left, wait_ms = await drawn(redis, "k", 6)
        assert (left in (3, 4), wait_ms) == (True, 0)

    with_redis(redis_url, story)


def test_what_is_kept_of_a_key_is_gone_when_its_allowance_is_whole_again(redis_url):
    async def story(redis: Redis) -> None:
        await drawn(redis, "k", 60)
        assert 1 <= await redis.pttl("k") <= 1_000

    with_redis(redis_url, story)


def test_a_key_without_a_limit_costs_no_round_trip(redis_url):
    async def story(redis: Redis) -> None:
        meter = rate.Meter()
        await redis.config_resetstat()
        assert await meter.counted(redis, Caller(new_id(), "default", "ci"), send) is send
        assert "cmdstat_eval" not in await redis.info("commandstats")
        assert await meter.counted(redis, Caller(new_id(), "default", "ci", rpm=5), send) is not send
        assert "cmdstat_eval" in await redis.info("commandstats")

    with_redis(redis_url, story)


def test_what_was_refused_does_not_count(redis_url):
    async def story(redis: Redis) -> None:
        await redis.set("k", str(await in_a_minute(redis)).encode())
        before = await redis.get("k")
        for _ in range(5):
            left, wait_ms = await drawn(redis, "k", 6)
            assert (left, wait_ms > 0) == (0, True)
        assert await redis.get("k") == before

    with_redis(redis_url, story)


def test_a_wait_of_less_than_a_second_is_told_as_one(redis_url):
    async def story(redis: Redis) -> None:
        caller = Caller(new_id(), "default", "ci", rpm=120)
        await redis.set(f"backstop:rate:{caller.key_id}", str(await in_a_minute(redis) + 300_000).encode())
        with pytest.raises(HTTPException) as refused:
            await rate.Meter().counted(redis, caller, send)
        assert refused.value.headers["Retry-After"] == "1"

    with_redis(redis_url, story)


async def in_a_minute(redis: Redis) -> int:
    """When all of a minute's requests are used now: microseconds of Redis."""
    seconds, micros = await redis.time()
    return (seconds + 60) * 1_000_000 + micros


def test_a_redis_that_keeps_silent_holds_up_nobody():
    async def story() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with asyncio.timeout(30), Redis(host="127.0.0.1", port=port) as redis:
                assert await rate.Meter().counted(redis, Caller(new_id(), "default", "ci", rpm=1), send) is send

    asyncio.run(story())
