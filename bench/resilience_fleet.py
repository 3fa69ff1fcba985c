"""Backstop as a contestant: real Celery workers, jobs through the queue, how they ended from the ledger."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import text

from bench import processes
from bench.faultmodel import PRICES, PROVIDERS
from bench.resilience_plan import DEAD, DEADLINE_S, Plan
from bench.rivals import TIMEOUT_S
from worker.database import run
from worker.job import ChatRequest
from worker.submit import NewJob, submit
from worker.wiring import Connections

WORKERS = 4
_EXTRAS = {"ordered": "", "hedge": "hedge_dearer = true\n"}


def configuration(worlds: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """`backstop.toml`: for each strategy and each world, three providers and a chain of its own."""
    words = []
    for strategy, urls in worlds.items():
        for world, bases in urls.items():
            for name, base_url in zip(PROVIDERS, bases, strict=True):
                price = 'price = {{ input = "{}", output = "{}" }}'.format(*PRICES[name])
                head = f'[providers."{strategy}.{world}.{name}"]'
                words.append(f'{head}\nbase_url = "{base_url}"\nmodel = "sim"\ntimeout_s = {TIMEOUT_S}\n{price}')
            chain = ", ".join(f'"{strategy}.{world}.{name}"' for name in PROVIDERS)
            words.append(f'[chains."{strategy}.{world}"]\nproviders = [{chain}]\nstrategy = "{strategy}"\n{_EXTRAS[strategy]}')
    first = next(iter(worlds))
    return "\n".join([*words, f'[chains.default]\nproviders = ["{first}.{next(iter(worlds[first]))}.{PROVIDERS[0]}"]\n'])


@contextmanager
def workers(place: Path, env: Mapping[str, str]) -> Iterator[list[int]]:
    """Their process ids."""
    with ExitStack() as stack:
        argv = ["-m", "celery", "-A", "worker.app", "worker", "--without-gossip", "--without-mingle"]
        yield [
            stack.enter_context(processes.running([*argv, "-n", f"{n}@bench"], place / f"worker-{n}.log", env, grace_s=45)).pid
            for n in range(1, WORKERS + 1)
        ]


async def until_live(open_: Connections, pids: Sequence[int]) -> None:
    async with asyncio.timeout(60):
        while len(await run(open_.db, _LIVE, pids=list(pids))) < len(pids):  # noqa: ASYNC110 - the event is another process's
            await asyncio.sleep(0.1)


async def play(open_: Connections, plan: Plan, turn: int, strategy: str, began: float) -> None:
    """Every job was submitted at its moment, and has ended."""
    async with asyncio.TaskGroup() as submissions:
        for job in plan.jobs(turn):
            await asyncio.sleep(max(0.0, began + job["at_s"] - time.time()))
            request = ChatRequest([{"role": "user", "content": job["prompt"]}])
            labels = {"n": job["n"], "due": began + job["at_s"]}
            new = NewJob(request=request, chain=f"{strategy}.{job['world']}", deadline_s=DEADLINE_S, metadata=labels)
            submissions.create_task(submit(open_.db, open_.publish, new))
    async with asyncio.timeout(DEADLINE_S + 30):
        while await run(open_.db, _UNFINISHED):  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.5)


async def ended(open_: Connections, strategy: str) -> list[dict[str, Any]]:
    """How its jobs ended, as a rival says it; and the call rows' own times."""
    rows = await run(open_.db, _ENDED, chains=f"{strategy}.%")
    return [
        {
            "world": row.chain.partition(".")[2],
            "n": row.n,
            "took_s": row.took_s,
            "ok": row.state == "succeeded" and row.took_s <= DEADLINE_S,
            "degraded": bool(row.degraded),
            "late_s": row.late_s,
        }
        for row in rows
    ]


async def failovers_ms(open_: Connections, strategy: str) -> list[float]:
    """In the worlds: from the end of a failed call to the start of the next one, at another provider, in the same attempt."""
    rows = await run(open_.db, _FAILOVERS, strategy=strategy)
    return [row.ms for row in rows if row.world.startswith(("independent.", "common."))]


async def dead_host_ms(open_: Connections, strategy: str) -> list[float]:
    """From the start of a call to the host that takes no connection to the start of the next one."""
    return [row.call_ms + row.ms for row in await run(open_.db, _FAILOVERS, strategy=strategy) if row.world == DEAD]


_LIVE = text("SELECT FROM workers WHERE state = 'live' AND pid = ANY(CAST(:pids AS int[]))")
_UNFINISHED = text("SELECT FROM jobs WHERE finished_at IS NULL LIMIT 1")
_ENDED = text("""
SELECT j.chain, CAST(j.metadata->>'n' AS int) AS n, j.state, r.answer->>'degraded' AS degraded,
    CAST(extract(epoch FROM j.created_at) - CAST(j.metadata->>'due' AS float8) AS float8) AS late_s,
    CAST(extract(epoch FROM j.finished_at) - CAST(j.metadata->>'due' AS float8) AS float8) AS took_s
FROM jobs j LEFT JOIN results r ON r.job_id = j.id WHERE j.chain LIKE :chains
""")
_FAILOVERS = text("""
SELECT regexp_replace(failed, '^[^.]+[.](.+)[.][^.]+$', '\\1') AS world,
    CAST(extract(epoch FROM began - before_ended) * 1000 AS float8) AS ms,
    CAST(extract(epoch FROM before_ended - before_began) * 1000 AS float8) AS call_ms
FROM (
    SELECT provider, started_at AS began, lag(provider) OVER attempt AS failed, lag(started_at) OVER attempt AS before_began,
        lag(ended_at) OVER attempt AS before_ended
    FROM provider_calls WHERE provider LIKE :strategy || '.%' AND started_at IS NOT NULL
    WINDOW attempt AS (PARTITION BY job_id, fence ORDER BY started_at)
) calls WHERE provider <> failed AND began >= before_ended
""")
