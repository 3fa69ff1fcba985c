"""Real Celery workers, real servers, simulated vendors: one worker for people, one for bulk, and what they know of each other."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import jsonschema_rs
import pytest
from celery import Celery
from redis import Redis
from sqlalchemy import text
from stage import own_database

from worker.dispatch import queue_name
from worker.embedded.servers import Endpoints
from worker.intervene import cancel
from worker.job import ChatRequest, Lane
from worker.loop import LoopThread
from worker.settings import Settings
from worker.simulator import script
from worker.simulator.server import Simulator
from worker.submit import NewJob, Row, add_rows, close_batch, open_batch, submit
from worker.transport import TASK
from worker.waiting import Endings
from worker.wiring import Connections, connections

LONG_S = 60.0  # never waited out by a test that passes
SLOTS = 10
SCRIPT = {
    "providers": {
        "ill": {"model": "m-ill", "faults": [{"kind": "status", "status": 500, "rate": 1}]},
        "locked": {"model": "m-locked", "faults": [{"kind": "status", "status": 401, "rate": 1}]},
        "silent": {"model": "m-silent", "faults": [{"kind": "hang", "seconds": 300, "rate": 1}]},
        "good": {"model": "m-good"},
        "narrow": {"model": "m-narrow", "concurrency": 3, "latency": {"ms": 20}},  # one more at once is a 429
    }
}
CHAINS = {
    "default": ["dead", "ill", "good"], "locked": ["locked", "good"], "silent": ["silent"], "good": ["good"], "narrow": ["narrow"],
    "race": ["silent", "ill", "good"], "poor": ["ill"],
}  # fmt: skip
SETTINGS = {"race": 'strategy = "race"', "poor": 'degrade = ["static"]\nstatic_text = "We will write to you."'}
LIMITS = {"narrow": "max_concurrency = 3"}


@dataclass
class Fleet:
    settings: Settings
    simulator: Simulator
    courier: Celery

    def publish(self, lane: Lane, delivery_id: UUID, job_ids: Sequence[UUID]) -> None:
        ids = [str(job_id) for job_id in job_ids]
        self.courier.send_task(TASK, kwargs={"job_ids": ids}, task_id=str(delivery_id), queue=queue_name(lane))

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Connections]:
        async with connections(self.settings) as opened:
            yield opened


@pytest.fixture(scope="module")
def fleet(servers: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two workers that have said they live."""
    home = tmp_path_factory.mktemp("fleet")
    loop, simulator = LoopThread(), Simulator(script.parse(SCRIPT, "script"))
    with ExitStack() as stack:
        stack.callback(loop.stop)
        loop.submit(simulator.__aenter__()).result()
        stack.callback(lambda: loop.submit(simulator.__aexit__()).result())
        settings = Settings(
            database_url=stack.enter_context(own_database(servers, "fleet")),
            redis_url=servers.redis_url,
            data=home,
            config=configured(home, simulator),
        )
        with Redis.from_url(servers.redis_url) as redis:
            redis.flushall()
        for lane, queue in (("interactive", "backstop.1.interactive"), ("bulk", "backstop.2.bulk")):
            stack.enter_context(worker(settings, lane, queue))
        courier = stack.enter_context(Celery("courier", broker=servers.redis_url, set_as_current=False))
        made = Fleet(settings, simulator, courier)
        asyncio.run(everybody_lives(made))
        yield made


def configured(home: Path, simulator: Simulator) -> Path:
    lines = [
        f'[providers.{name}]\nbase_url = "{url}"\nmodel = "m-{name}"\nprice = {{ input = "1", output = "2" }}\n{LIMITS.get(name, "")}\n'
        for name, url in [
            ("dead", "http://127.0.0.1:1/v1"),
            *((name, simulator.base_url(name)) for name in SCRIPT["providers"]),
        ]
    ]
    lines += [f"[chains.{name}]\nproviders = {json.dumps(providers)}\n{SETTINGS.get(name, '')}\n" for name, providers in CHAINS.items()]
    file = home / "backstop.toml"
    file.write_text("\n".join(lines))
    return file


def environment(settings: Settings) -> dict[str, str]:
    return os.environ | {
        "DATABASE_URL": str(settings.database_url),
        "REDIS_URL": str(settings.redis_url),
        "BACKSTOP_CONFIG": str(settings.config),
        "BACKSTOP_DATA": str(settings.data),
        "BACKSTOP_BULK_SLOTS": str(SLOTS),
        "BACKSTOP_PACK_SIZE": "5",
        "BACKSTOP_HEARTBEAT_S": "0.2",
    }


def celery(settings: Settings, name: str, queue: str, log: Any, **environ: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-n", f"{name}@test", "-Q", queue]
    return subprocess.Popen(
        [*command, "--without-gossip", "--without-mingle", "--without-heartbeat"],
        env=environment(settings) | environ,
        stdout=log,
        stderr=log,
    )


@contextmanager
def worker(settings: Settings, name: str, queue: str) -> Iterator[None]:
    with (settings.data / f"{name}.log").open("wb") as log:
        process = celery(settings, name, queue, log)
        try:
            yield
            process.send_signal(signal.SIGTERM)
            assert process.wait(LONG_S) == 0
        finally:
            process.kill()
            process.wait()


async def everybody_lives(fleet: Fleet) -> None:
    async with fleet.connected() as opened:

        async def two() -> bool:
            rows = await select(opened, "SELECT lanes FROM workers WHERE state = 'live'")
            return {row.lanes for row in rows} == {"interactive", "bulk"}

        await until(two)


async def select(opened: Connections, sql: str, **values: Any) -> list[Any]:
    async with opened.db.connect() as connection:
        return list(await connection.execute(text(sql), values))


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    deadline_s = time.monotonic() + LONG_S
    while not await condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.02)


async def ended(fleet: Fleet, opened: Connections, chain: str, request: ChatRequest | None = None, count: int = 1) -> list[UUID]:
    """So many interactive jobs have ended, one after the other."""
    ids = []
    async with Endings(opened.db, opened.redis) as endings:
        for _ in range(count):
            asked = request or ChatRequest([{"role": "user", "content": "hello"}])
            job = await submit(opened.db, fleet.publish, NewJob(request=asked, chain=chain))
            assert not await endings.wait([job.job_id], LONG_S)
            ids.append(job.job_id)
    return ids


async def batch(opened: Connections, name: str, chain: str, count: int) -> UUID:
    """A batch of so many jobs has ended."""
    made = await open_batch(opened.db, name, fingerprint=[name], columns=None)
    rows = (
        Row(ordinal=i, custom_id=None, request=ChatRequest([{"role": "user", "content": f"ticket {i}"}]), chain=chain)
        for i in range(1, count + 1)
    )
    async for _ in add_rows(opened.db, made, rows):
        pass
    await close_batch(opened.db, made)

    async def finished() -> bool:
        (row,) = await select(opened, "SELECT state FROM batches WHERE id = :id", id=made.id)
        return bool(row.state == "finished")

    await until(finished)
    return made.id


def test_a_batch_is_answered_with_one_provider_dead_and_the_next_one_ill(fleet):
    async def main() -> None:
        async with fleet.connected() as opened:
            made = await batch(opened, "fallback", "default", 200)
            (row,) = await select(opened, "SELECT * FROM batches WHERE id = :id", id=made)
            assert (row.succeeded, row.failed, row.total) == (200, 0, 200)
            sql = "SELECT c.* FROM provider_calls c JOIN jobs j ON j.id = c.job_id WHERE j.batch_id = :id"
            calls = await select(opened, sql, id=made)
            by = {name: [call for call in calls if call.provider == name] for name in CHAINS["default"]}
            assert {call.outcome for call in by["dead"]} == {"unreachable"}
            assert {call.outcome for call in by["ill"]} == {"server_error"}
            assert [call.outcome for call in by["good"]] == ["answered"] * 200
            # On the books exactly what the vendors saw, and each call with the time it took.
            assert [len(by["ill"]), len(by["good"])] == [fleet.simulator.requests(name) for name in ("ill", "good")]
            assert all(call.latency_ms is not None and call.started_at <= call.ended_at for call in calls)
            assert all(call.cost_usd > 0 for call in by["good"])
            assert {call.cost_usd for call in by["dead"] + by["ill"]} == {0}
            # 8 failures in a row open a breaker; what was in flight by then still goes through, each call tried twice.
            for name in ("dead", "ill"):
                assert len(by[name]) <= 2 * (8 + 2 * SLOTS)

    asyncio.run(main())


def test_what_one_worker_learnt_of_a_provider_the_other_obeys(fleet):
    async def main() -> None:
        async with fleet.connected() as opened:
            (job_id,) = await ended(fleet, opened, "locked")
            (told,) = await select(opened, "SELECT outcome FROM provider_calls WHERE job_id = :id AND provider = 'locked'", id=job_id)
            assert told.outcome == "unauthorized"
            made = await batch(opened, "obeys", "locked", 30)
            (row,) = await select(opened, "SELECT succeeded FROM batches WHERE id = :id", id=made)
            assert row.succeeded == 30
            assert fleet.simulator.requests("locked") == 1
            (status,) = await opened.gates.status(["locked"])
            assert status.state == "isolated"

    asyncio.run(main())


def test_a_batch_keeps_within_what_its_provider_takes_at_once_and_meets_no_refusal(fleet):
    async def main() -> None:
        async with fleet.connected() as opened:
            made = await batch(opened, "narrow", "narrow", 60)
            sql = "SELECT c.outcome FROM provider_calls c JOIN jobs j ON j.id = c.job_id WHERE j.batch_id = :id"
            assert [call.outcome for call in await select(opened, sql, id=made)] == ["answered"] * 60

    asyncio.run(main())


def test_a_race_is_won_by_the_first_answer_and_who_lost_is_on_the_books(fleet):
    async def main() -> None:
        async with fleet.connected() as opened:
            (job_id,) = await ended(fleet, opened, "race")
            calls = await select(opened, "SELECT * FROM provider_calls WHERE job_id = :id", id=job_id)
            told = {call.provider: (call.outcome, call.error_code, call.billing) for call in calls}
            assert told["good"] == ("answered", None, "billed")
            assert told["silent"] == ("cancelled", "overtaken", "unknown")

    asyncio.run(main())


def test_a_person_gets_the_text_of_the_ladder_when_nobody_answers(fleet):
    async def main() -> None:
        async with fleet.connected() as opened:
            (job_id,) = await ended(fleet, opened, "poor")
            (row,) = await select(opened, "SELECT answer FROM results WHERE job_id = :id", id=job_id)
            assert (row.answer["content"], row.answer["degraded"]) == ("We will write to you.", "static")

    asyncio.run(main())


def test_a_running_job_is_cancelled_and_its_call_stays_on_the_books(fleet):
    async def main() -> None:
        async with fleet.connected() as opened, Endings(opened.db, opened.redis) as endings:
            request = ChatRequest([{"role": "user", "content": "hello"}])
            before = fleet.simulator.requests("silent")
            job = await submit(opened.db, fleet.publish, NewJob(request=request, chain="silent"))

            async def asked() -> bool:
                return fleet.simulator.requests("silent") > before

            await until(asked)
            outcome = await cancel(opened.db, job_ids=[job.job_id])
            assert (outcome.cancelled, outcome.flagged) == (0, 1)
            assert not await endings.wait([job.job_id], LONG_S)
            (row,) = await select(opened, "SELECT * FROM jobs WHERE id = :id", id=job.job_id)
            assert (row.state, row.worker_id) == ("cancelled", None)
            (call,) = await select(opened, "SELECT * FROM provider_calls WHERE job_id = :id", id=job.job_id)
            assert (call.outcome, call.billing, call.cost_usd) == ("cancelled", "unknown", None)

    asyncio.run(main())


def test_an_answer_asked_for_in_a_schema_has_it(fleet):
    schema = {
        "type": "object",
        "required": ["category", "urgent"],
        "additionalProperties": False,
        "properties": {"category": {"enum": ["billing", "technical"]}, "urgent": {"type": "boolean"}},
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "triage", "schema": schema, "strict": True}}

    async def main() -> None:
        async with fleet.connected() as opened:
            request = ChatRequest([{"role": "user", "content": "My invoice is wrong"}], {"response_format": wanted})
            for job_id in await ended(fleet, opened, "good", request, count=3):
                (row,) = await select(opened, "SELECT answer FROM results WHERE job_id = :id", id=job_id)
                jsonschema_rs.validate(schema, json.loads(row.answer["content"]))

    asyncio.run(main())


def test_a_worker_with_a_faulty_configuration_says_so_and_ends(fleet, tmp_path):
    file = tmp_path / "backstop.toml"
    file.write_text(fleet.settings.config.read_text().replace('model = "m-ill"', 'modle = "m-ill"'))
    with (tmp_path / "log").open("wb") as log:
        process = celery(fleet.settings, "faulty", "backstop.2.bulk", log, BACKSTOP_CONFIG=str(file))
        try:
            assert process.wait(LONG_S) != 0
        finally:
            process.kill()
            process.wait()
    said = (tmp_path / "log").read_text()
    assert "unknown key providers.ill.modle, did you mean 'model'?" in said
    assert "AttributeError" not in said
