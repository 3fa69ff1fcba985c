"""A worker process of its own that wants to call one provider: `racer.py URL SECONDS NUMBER`.

With 0 seconds it asks so many times at once, else again and again until they are over. Says what it got as JSON.
"""

import asyncio
import json
import sys
import time

from redis.asyncio import Redis

from worker.resilience import gate_store
from worker.resilience.gate import Gates, Limits

LIMITS = {"limited": Limits(rpm=600, tpm=60_000)}


async def race(url, seconds, number):
    gate_store.ROUND_TRIP_S = 20
    redis = Redis.from_url(url, socket_timeout=None, socket_connect_timeout=None)
    gates = Gates(redis, LIMITS)
    await gates.status(["p"])
    print("ready", flush=True)
    sys.stdin.readline()
    got, end = [], time.monotonic() + seconds
    while True:
        provider = "limited" if seconds else "p"
        admissions = await asyncio.gather(*(gates.admit(provider, lease_s=30, tokens=50) for _ in range(number)))
        got += [(admission.probe, admission.tokens) for admission in admissions if admission.allowed]
        if time.monotonic() >= end:
            break
    await gates.aclose()
    await redis.aclose()
    print(json.dumps(got))


if __name__ == "__main__":
    asyncio.run(race(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
