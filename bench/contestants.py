"""The two who do the same jobs: Backstop's bulk worker, and the usual Celery worker. One round each, the same measure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from sqlalchemy import text

from bench import processes
from worker.database import run
from worker.job import ChatRequest, Lane
from worker.settings import Settings
from worker.submit import Row, add_rows, close_batch, open_batch
from worker.wiring import connections

PROMPT = "The laptop of a colleague does not find the network since this morning. " * 27  # 2 kB
ROUND_LIMIT_S = 120.0

_PAUSE = text("UPDATE lanes SET paused = :paused WHERE name = 'bulk'")
_SUCCEEDED = text("SELECT succeeded FROM batches WHERE id = :id")


@dataclass(frozen=True, slots=True)
class Round:
    """Of one contestant. `cpu_ms` is its worker's own, all of its processes together, per job."""

    jobs: int
    jobs_per_s: float
    cpu_ms: float
    rss_mb: float


@contextmanager
def worker(lane: Lane, place: Path, env: Mapping[str, str]) -> Iterator[int]:
    """Backstop's worker of that lane runs as `backstop up` runs it; its process id. BENCH_PROFILE profiles its loop."""
    module = "bench.profiled" if env.get("BENCH_PROFILE") else "worker"
    argv = ["-m", module, "worker", "--lane", lane.value]
    with processes.running(argv, place / f"worker-{lane}.log", env, grace_s=45) as process:
        yield process.pid


def backstop(jobs: int, place: Path, env: Mapping[str, str]) -> Round:
    """A batch is there before the lane opens, so that loading it is no part of the measure."""
    with worker(Lane.BULK, place, env) as pid:
        return asyncio.run(_backstop(jobs, pid))


async def _backstop(jobs: int, pid: int) -> Round:
    async with connections(Settings()) as open_:

        async def done(batch_jobs: int) -> tuple[float, float]:
            """Jobs of a new batch have succeeded; the seconds that took, and the worker's CPU seconds."""
            await run(open_.db, _PAUSE, paused=True)
            batch = await open_batch(open_.db, f"bench-{uuid4()}", fingerprint=[], columns=None)
            rows = (
                Row(
                    ordinal=n,
                    custom_id=None,
                    request=ChatRequest([{"role": "user", "content": f"{n} {PROMPT}"}]),
                    chain="default",
                )
                for n in range(1, batch_jobs + 1)
            )
            async for _ in add_rows(open_.db, batch, rows):
                pass
            await close_batch(open_.db, batch)
            began_s, cpu_s = time.monotonic(), processes.cpu_s(pid)
            await run(open_.db, _PAUSE, paused=False)
            while True:
                if (await run(open_.db, _SUCCEEDED, id=batch.id))[0].succeeded == batch_jobs:
                    return time.monotonic() - began_s, processes.cpu_s(pid) - cpu_s
                if time.monotonic() - began_s > ROUND_LIMIT_S:
                    raise TimeoutError(f"backstop: {batch_jobs} jobs not within {ROUND_LIMIT_S:.0f} s")
                await asyncio.sleep(0.05)

        await done(200)  # imports, connections, plans
        took_s, cpu_s = await done(jobs)
        return Round(jobs, jobs / took_s, cpu_s * 1000 / jobs, processes.rss_mb(pid))


def usual(jobs: int, concurrency: int, place: Path, env: Mapping[str, str], *, shared_client: bool = False) -> Round:
    """Warmed up on one queue; then the jobs wait in another before it opens, so that publishing is no part of the measure."""
    from bench import usual as app

    queue, before = f"usual-{uuid4()}", app.answered()
    argv = ["-m", "celery", "-A", "bench.usual", "worker", f"--concurrency={concurrency}", f"--queues={queue}-warm"]
    argv += [f"--hostname=usual-{uuid4()}", "--without-gossip", "--without-mingle", "--loglevel=warning"]
    env = {**env, "USUAL_SHARED_CLIENT": "1"} if shared_client else env
    with processes.running(argv, place / "usual.log", env) as process:
        warm = 4 * concurrency
        for ticket in range(warm):
            app.answer.apply_async((ticket, PROMPT), queue=f"{queue}-warm")
        processes.wait_until(lambda: app.answered() == before + warm, limit_s=60, what="the usual worker's warm-up")
        for ticket in range(jobs):
            app.answer.apply_async((ticket, f"{ticket} {PROMPT}"), queue=queue)
        began_s, cpu_s = time.monotonic(), processes.cpu_s(process.pid)
        app.app.control.add_consumer(queue)
        processes.wait_until(lambda: app.answered() == before + warm + jobs, limit_s=ROUND_LIMIT_S, what="the usual worker")
        took_s, cpu_s = time.monotonic() - began_s, processes.cpu_s(process.pid) - cpu_s
        return Round(jobs, jobs / took_s, cpu_s * 1000 / jobs, processes.tree_rss_mb(process.pid))
