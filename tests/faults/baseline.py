"""Plain Celery beside Backstop under one and the same schedule of kills: what is lost, run twice, paid twice and off the books.

`make controls CONTROLS=--baseline`. The figures are counts; how long things take is not looked at.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from celery import Celery
from fleet import Worker
from lab import DEADLINE_S, Lab, a_lab
from plain import TABLE, VISIBILITY_S
from server import Servers, named
from sqlalchemy.exc import DBAPIError

from worker.cli.screen import say, show_table
from worker.dispatch import queue_name
from worker.job import ChatRequest, Lane
from worker.simulator.bill import fingerprint
from worker.submit import NewJob, submit

KILLS, FLUSHES, RESTARTS = 10, 3, 1
WORKERS = 2
STEP_S = 0.5
JOBS_A_STEP = 25
QUIET_S = 3.0 * VISIBILITY_S  # nothing more has come for so long: nothing will
SCRIPT = {"providers": {"first": {"model": "sim", "latency": {"ms": 300}}}}
CONFIG = {"providers.first": {"timeout_s": 30}}


@dataclass(frozen=True, slots=True)
class Figures:
    """`jobs` accepted; `unanswered` of them; `twice`: asked more than once; `surplus`: answers paid for beyond the first; `rows`:
    results beyond the first; `unbooked`: requests without a row of their own; `left`: messages still in Redis when nothing happened any
    more, so not all unanswered need be lost; `flushed`: messages that waited when Redis was flushed, more on a slower machine.
    """

    jobs: int
    unanswered: int
    twice: int
    surplus: int
    rows: int
    unbooked: int
    left: int = 0
    flushed: int = 0


class Contestant(Protocol):
    async def prepare(self) -> None: ...
    async def start(self) -> None: ...
    async def kill(self, place: int) -> None:
        """SIGKILL, with all its children, and another comes in its place."""

    async def submit(self, ticket: str) -> None: ...
    async def progress(self) -> Any:
        """Something that changes as long as anything happens; None once all has ended."""

    async def figures(self, tickets: Sequence[str]) -> Figures: ...
    async def close(self) -> None: ...


class Plain:
    def __init__(self, lab: Lab, pool: Sequence[str]) -> None:
        self._lab = lab
        self._pool = pool
        self._workers: list[asyncio.subprocess.Process] = []
        self._numbers = count(1)
        self._courier = Celery("courier", broker=lab.valkey.url(), set_as_current=False)
        name = lab.environment["DATABASE_URL"].rpartition("/")[2]
        self._environment = {
            "PLAIN_REDIS_URL": lab.valkey.url(),
            "PLAIN_DATABASE_URL": named(lab.postgres.url(), name),
            "PLAIN_VENDOR": lab.simulator.base_url("first"),
        }

    async def prepare(self) -> None:
        await self._lab.rows(TABLE)

    async def start(self) -> None:
        self._workers = [await self._started() for _ in range(WORKERS)]

    async def kill(self, place: int) -> None:
        _end(self._workers[place])
        await self._workers[place].wait()
        self._workers[place] = await self._started()

    async def submit(self, ticket: str) -> None:
        await asyncio.to_thread(self._courier.send_task, "plain.answer", [ticket])

    async def progress(self) -> Any:
        return len(self._lab.bill), await self._lab.rows("SELECT count(*) FROM plain_results")

    async def figures(self, tickets: Sequence[str]) -> Figures:
        answered = Counter(row.ticket for row in await self._lab.rows("SELECT ticket FROM plain_results"))
        asked = Counter(line.prompt for line in self._lab.bill.lines())
        unbooked = sum(max(0, asked[_print(ticket)] - answered[ticket]) for ticket in tickets)
        return _figures(self._lab, tickets, set(answered), answered.total() - len(answered), unbooked)

    async def close(self) -> None:
        for worker in self._workers:
            _end(worker)
            await worker.wait()
        self._courier.close()

    async def _started(self) -> asyncio.subprocess.Process:
        name = f"plain-{next(self._numbers)}"
        with (self._lab.directory / f"{name}.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "celery", "-A", "plain", "worker", "--without-gossip", "--without-mingle"],
                *["-n", f"{name}@lab", "--loglevel", "warning", *self._pool],
                cwd=Path(__file__).parent,
                env={**os.environ, **self._environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


class Backstop:
    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._workers: list[Worker] = []
        self._numbers = count(1)

    async def prepare(self) -> None:
        pass

    async def start(self) -> None:
        self._workers = [await self._started() for _ in range(WORKERS)]

    async def kill(self, place: int) -> None:
        await self._workers[place].gone()
        self._workers[place] = await self._started()

    async def submit(self, ticket: str) -> None:
        request = ChatRequest([{"role": "user", "content": ticket}])
        job = NewJob(request=request, chain="default", lane=Lane.BULK, deadline_s=DEADLINE_S, idempotency_key=ticket)
        while True:
            with suppress(DBAPIError):
                await submit(self._lab.db, self._lab.publish, job)
                return
            await asyncio.sleep(0.2)

    async def progress(self) -> Any:
        (found,) = await self._lab.rows("SELECT count(*) FILTER (WHERE finished_at IS NULL) AS left, count(*) FROM jobs")
        return (len(self._lab.bill), found) if found.left else None

    async def figures(self, tickets: Sequence[str]) -> Figures:
        rows = await self._lab.rows("SELECT j.idempotency_key AS ticket FROM jobs j JOIN results r ON r.job_id = j.id")
        answered = Counter(row.ticket for row in rows)
        booked = {str(row.id) for row in await self._lab.rows("SELECT id FROM provider_calls")}
        unbooked = sum(line.call_id not in booked for line in self._lab.bill.lines())
        return _figures(self._lab, tickets, set(answered), answered.total() - len(answered), unbooked)

    async def close(self) -> None:
        pass  # the lab ends what it started

    async def _started(self) -> Worker:
        return await self._lab.worker(f"backstop-{next(self._numbers)}")


def _print(ticket: str) -> str:
    return fingerprint([{"role": "user", "content": ticket}])


def _figures(lab: Lab, tickets: Sequence[str], answered: set[str], rows: int, unbooked: int) -> Figures:
    lines = list(lab.bill.lines())
    asked, paid = Counter(line.prompt for line in lines), Counter(line.prompt for line in lines if line.cost > 0)
    return Figures(
        jobs=len(tickets),
        unanswered=len(set(tickets) - answered),
        twice=sum(n > 1 for n in asked.values()),
        surplus=paid.total() - len(paid),
        rows=rows,
        unbooked=unbooked,
    )


def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a session of its own: its children only


def schedule(seed: int, steps: int) -> dict[int, list[str]]:
    """What befalls whom at which step of the load: the same seed, the same schedule, and never two things at one step."""
    chance = random.Random(seed)
    faults = [f"kill {n % WORKERS}" for n in range(KILLS)] + ["flush"] * FLUSHES + ["restart"] * RESTARTS
    chance.shuffle(faults)
    first = steps // 10
    return {step: [fault] for step, fault in zip(sorted(chance.sample(range(first, steps), len(faults))), faults, strict=True)}


async def played(lab: Lab, contestant: Contestant, seed: int, jobs: int) -> Figures:
    """Jobs come at a steady pace, things happen on the way, and then it is waited until nothing more happens."""
    tickets = [f"ticket {n}" for n in range(1, jobs + 1)]
    steps = -(-jobs // JOBS_A_STEP)
    plan, flushed = schedule(seed, steps), 0
    await contestant.prepare()
    await contestant.start()
    for ticket in tickets[:JOBS_A_STEP]:
        await contestant.submit(ticket)
    await lab.until_asked(1)
    for step in range(1, steps):
        pace = asyncio.create_task(asyncio.sleep(STEP_S))
        for ticket in tickets[step * JOBS_A_STEP : (step + 1) * JOBS_A_STEP]:
            await contestant.submit(ticket)
        for fault in plan.get(step, []):
            flushed += await _waiting(lab) if fault == "flush" else 0
            await _befalls(lab, contestant, fault)
        await pace
    await _rest(contestant)
    return replace(await contestant.figures(tickets), left=await _waiting(lab), flushed=flushed)


async def _waiting(lab: Lab) -> int:
    """Messages in Redis that nobody has acknowledged."""
    queues = ["celery", *(queue_name(lane) for lane in Lane)]
    return sum([await lab.redis.llen(queue) for queue in queues]) + await lab.redis.hlen("unacked")


async def _befalls(lab: Lab, contestant: Contestant, fault: str) -> None:
    match fault.split():
        case ["kill", place]:
            await contestant.kill(int(place))
        case ["flush"]:
            await lab.redis.flushall()
        case ["restart"]:
            await lab.postgres.stop("immediate")
            await asyncio.sleep(1)
            await lab.postgres.start()


async def _rest(contestant: Contestant) -> None:
    clock = asyncio.get_running_loop().time
    seen, since_s = await contestant.progress(), clock()
    while seen is not None and clock() - since_s < QUIET_S:
        await asyncio.sleep(0.2)
        now = await contestant.progress()
        if now != seen:
            seen, since_s = now, clock()


@asynccontextmanager
async def _contestant(lab: Lab, name: str) -> AsyncIterator[Contestant]:
    pools = {"prefork": ["--pool", "prefork", "--concurrency", "8"], "threads": ["--pool", "threads", "--concurrency", "16"]}
    made = Plain(lab, pools[name]) if name in pools else Backstop(lab)
    try:
        yield made
    finally:
        await made.close()


async def _measured(servers: Servers, name: str, seed: int, jobs: int) -> Figures:
    with tempfile.TemporaryDirectory(prefix="backstop-baseline-", ignore_cleanup_errors=True) as place:
        opened = a_lab(Path(place), servers, script=SCRIPT, config=CONFIG)
        async with opened as lab, asyncio.timeout(600), _contestant(lab, name) as contestant:
            return await played(lab, contestant, seed, jobs)


def measured(servers: Servers, seed: int, jobs: int) -> bool:
    """Prints the table; whether Backstop lost nothing, answered nothing twice and kept the books."""
    rows, backstop = [], None
    for name, title in {"prefork": "Celery, prefork", "threads": "Celery, threads", "backstop": "Backstop"}.items():
        say(f"{title}: {jobs} jobs, {KILLS} SIGKILL, {FLUSHES} FLUSHALL, {RESTARTS} restart of Postgres, seed {seed}")
        backstop = asyncio.run(_measured(servers, name, seed, jobs))
        one = backstop
        rows.append((title, one.jobs, one.unanswered, one.flushed, one.left, one.twice, one.surplus, one.rows, one.unbooked))
    columns = [
        "worker",
        "jobs",
        "unanswered",
        "messages flushed",
        "still in Redis",
        "jobs asked twice",
        "answers paid twice",
        "results twice",
        "requests without a row",
    ]
    show_table(columns, rows)
    assert backstop is not None
    return not (backstop.unanswered or backstop.rows or backstop.unbooked)
