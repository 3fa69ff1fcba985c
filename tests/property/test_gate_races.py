"""Worker processes that ask one gate at the same time, by the real clock."""

import asyncio
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from worker.resilience import gate_store
from worker.resilience.breaker_rules import RULES
from worker.resilience.gate import Ending, Gates
from worker.resilience.gate_store import key
from worker.signals import Verdict

RACER = Path(__file__).with_name("racer.py")


def raced(url, seconds, number, processes=4):
    """What each process got, and how many seconds the whole race took at most."""
    with ExitStack() as stack:
        command = [sys.executable, str(RACER), url, str(seconds), str(number)]
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        racers = [stack.enter_context(subprocess.Popen(command, **pipe)) for _ in range(processes)]
        assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * processes
        began_s = time.monotonic()
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        got = [json.loads(racer.stdout.readline()) for racer in racers]
        return got, time.monotonic() - began_s


def test_of_64_racers_in_four_processes_exactly_one_gets_the_probe(redis_url, monkeypatch):
    monkeypatch.setattr(gate_store, "ROUND_TRIP_S", 20)

    async def an_open_breaker():
        redis = AsyncRedis.from_url(redis_url, socket_timeout=None)
        gates = Gates(redis)
        for _ in range(RULES.fails_in_a_row):
            await gates.report("p", await gates.admit("p", lease_s=30), Ending(verdict=Verdict.FAILURE))
        await gates.aclose()
        await redis.aclose()

    asyncio.run(an_open_breaker())
    with Redis.from_url(redis_url) as redis:
        redis.hset(key("p"), "until", 1)
    got, _ = raced(redis_url, 0, 16)
    assert [probe for of in got for probe, _ in of] == [True]


def test_four_processes_together_keep_the_limit_by_the_real_clock(redis_url):
    """L1: 600 requests a minute are a burst of 100, and 9 a second from then on."""
    got, took_s = raced(redis_url, 1.5, 20)
    admitted = sum(len(of) for of in got)
    assert 100 <= admitted <= 100 + 9 * took_s + 1
    assert sum(tokens for of in got for _, tokens in of) == 50 * admitted
