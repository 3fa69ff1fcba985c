"""What a person waits for: one interactive job at a time over REST, with the fleet as `backstop up` runs it."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import httpx
from redis import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from bench import processes
from bench.contestants import PROMPT, worker
from worker import keys
from worker.database import run
from worker.intervene import cancel
from worker.job import Lane
from worker.settings import Settings
from worker.wiring import Connections, connections

BODY = {"messages": [{"role": "user", "content": PROMPT}]}
BETWEEN_S = 0.02  # from one answer to the next question
WARM_UP = 20


@dataclass(frozen=True, slots=True)
class Waits:
    """`added_ms`: from the request to the answer, less what the provider alone takes with the same client.

    `settled_ms`: from `created_at` to `finished_at` in the ledger.
    """

    asked: int
    added_ms: tuple[float, float]  # median, 99th percentile
    settled_ms: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Load:
    """Enqueueing the tickets. `producer_mb`: in the first fifth of the time, and at most. `redis_mb`: at most."""

    tickets: int
    rows_per_s: float
    producer_mb: tuple[float, float]
    redis_mb: float


@dataclass(frozen=True, slots=True)
class People:
    idle: Waits
    load: Load
    busy: Waits
    bulk_jobs_per_s: float  # beside the interactive ones
    bulk_left: int  # after the last question: the queue never ran dry


def measure(asked: int, tickets: int, place: Path, env: Mapping[str, str]) -> People:
    """Idle first; then `tickets` rows are enqueued by the command line, and people ask while these are worked off."""
    with _fleet(place, env) as base_url:
        return asyncio.run(_measure(asked, tickets, place, env, base_url))


async def _measure(asked: int, tickets: int, place: Path, env: Mapping[str, str], base_url: str) -> People:
    async with connections(Settings()) as open_:
        key = (await keys.create(open_.db, name="bench")).secret
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
            await until_ready(http, base_url)
            alone_ms = median(await _ask(http, f"{env['STUB_URL']}/chat/completions", 100, 0.0))
            idle = await _waits(http, base_url, open_, asked, alone_ms)
            before = await _succeeded(open_.db)
            began_s = time.monotonic()
            load = await asyncio.to_thread(_enqueue, tickets, place, env)
            async with processes.peaks(partial(_redis_mb, env["REDIS_URL"]), 0.5) as redis_mb:
                busy = await _waits(http, base_url, open_, asked, alone_ms)
            done = await _succeeded(open_.db) - before - busy.asked
            rate = done / (time.monotonic() - began_s)
            load = Load(load.tickets, load.rows_per_s, load.producer_mb, max(load.redis_mb, *redis_mb))
            (batch,) = await run(open_.db, text("SELECT id FROM batches WHERE name = 'bench-people'"))
            await cancel(open_.db, batch_id=batch.id)
            return People(idle, load, busy, rate, tickets - done)


@contextmanager
def _fleet(place: Path, env: Mapping[str, str]) -> Iterator[str]:
    """A worker for each lane and the API, as `backstop up` starts them; the API's base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:
        for lane in Lane:
            stack.enter_context(worker(lane, place, {**env, "BENCH_PROFILE": ""}))
        stack.enter_context(processes.running(["-m", "worker", "api", "--port", str(port)], place / "api.log", env))
        yield f"http://127.0.0.1:{port}"


async def until_ready(http: httpx.AsyncClient, base_url: str) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                if (await http.get(f"{base_url}/livez")).is_success:
                    return
            except httpx.TransportError:
                await asyncio.sleep(0.1)


async def _ask(http: httpx.AsyncClient, url: str, times: int, between_s: float) -> list[float]:
    """Milliseconds of each, one after the other, warmed up first."""
    took: list[float] = []
    for _ in range(times + WARM_UP):
        await asyncio.sleep(between_s)
        began_s = time.perf_counter()
        response = await http.post(url, json=BODY)
        took.append((time.perf_counter() - began_s) * 1000)
        if response.status_code != 200:
            raise RuntimeError(f"{url}: {response.status_code} {response.text[:200]}")
    return took[WARM_UP:]


async def _waits(http: httpx.AsyncClient, base_url: str, open_: Connections, asked: int, alone_ms: float) -> Waits:
    took = await _ask(http, f"{base_url}/v1/jobs?wait=30", asked, BETWEEN_S)
    rows = await run(open_.db, _SETTLED, most=asked)
    return Waits(asked, _middle_and_tail([ms - alone_ms for ms in took]), _middle_and_tail([row.ms for row in rows]))


def _middle_and_tail(values: Sequence[float]) -> tuple[float, float]:
    return median(values), quantiles(values, n=100, method="inclusive")[98]


def _enqueue(tickets: int, place: Path, env: Mapping[str, str]) -> Load:
    """`backstop enqueue` reads a file of so many tickets while the workers are at it."""
    file = place / "tickets.jsonl"
    with file.open("w") as out:
        out.writelines(json.dumps({"id": n, "body": f"{n} {PROMPT}"}) + "\n" for n in range(1, tickets + 1))
    argv = ["-m", "worker", "enqueue", str(file), "--batch", "bench-people"]
    samples: list[tuple[float, float]] = []
    began_s = time.monotonic()
    with processes.running(argv, place / "enqueue.log", env) as producer, Redis.from_url(env["REDIS_URL"]) as redis:
        while producer.poll() is None:
            samples.append((processes.rss_mb(producer.pid), redis.info("memory")["used_memory"] / 2**20))
            time.sleep(0.1)
        if producer.returncode:
            raise RuntimeError(f"backstop enqueue ended with {producer.returncode}: see {place / 'enqueue.log'}")
    took_s = time.monotonic() - began_s
    producer_mb = [mb for mb, _ in samples]
    return Load(tickets, tickets / took_s, (max(producer_mb[: len(samples) // 5 + 1]), max(producer_mb)), max(mb for _, mb in samples))


def _redis_mb(url: str) -> float:
    with Redis.from_url(url) as redis:
        used: int = redis.info("memory")["used_memory"]
        return used / 2**20


async def _succeeded(db: AsyncEngine) -> int:
    return int((await run(db, text("SELECT count(*) AS n FROM jobs WHERE state = 'succeeded'")))[0].n)


_SETTLED = text("""
SELECT CAST(extract(epoch FROM finished_at - created_at) * 1000 AS float8) AS ms FROM jobs
WHERE lane = 'interactive' AND state = 'succeeded' ORDER BY created_at DESC LIMIT :most
""")
