"""Packs of jobs on a real ledger: claimed, asked of scripted providers, settled, whatever gets in between."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import psycopg
import pytest
import structlog
from fakeredis import FakeAsyncRedis as FakeRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from worker import attempt as attempt_module
from worker.attempt import Attempts
from worker.calls import open_calls
from worker.chain import Chain
from worker.config import Config
from worker.cost import Pricing, Usage
from worker.database import driver_url, engine
from worker.grouping import Group
from worker.job import Answer, ChatRequest, Lane, new_id
from worker.providers.provider import Reply
from worker.resilience.cache import AnswerCache
from worker.resilience.gate import Gates
from worker.schema import upgrade
from worker.settlement import Cancelled, Released
from worker.signals import Signal
from worker.slots import Slots
from worker.step import Station, Steps
from worker.submit import NewJob, submit

USAGE = Usage(1_000, 100)
CONFIG = Config.model_validate(
    {
        "providers": {
            name: {
                "base_url": "http://127.0.0.1:1/v1",
                "model": f"m-{name}",
                "max_retries": 0,
                "price": {"input": "1", "output": "2"},
            }
            for name in ("one", "two")
        },
        "chains": {"default": {"providers": ["one", "two"]}},
    }
)

Play = Callable[[ChatRequest], Awaitable[Reply]]


def said(content: str = "hello", **more: Any) -> Reply:
    answer = Answer(content=content, finish_reason="stop", provider="one", model="m", usage=USAGE, **more)
    return Reply(signal=Signal.ANSWERED, answer=answer, usage=USAGE, http_status=200)


def always(reply: Reply) -> Play:
    async def play(request: ChatRequest) -> Reply:
        return reply

    return play


class Scripted:
    """A provider that does as `play` says; `asked` is set when its first request arrived."""

    def __init__(self, name: str, play: Play) -> None:
        self.name, self.model, self.play = name, f"m-{name}", play
        self.requests: list[ChatRequest] = []
        self.asked = asyncio.Event()

    async def complete(self, request: ChatRequest, *, timeout_s: float, call_id: str) -> Reply:
        self.requests.append(request)
        self.asked.set()
        return await self.play(request)


@dataclasses.dataclass
class Bench:
    """One worker process in miniature, without Celery, Redis and heartbeat."""

    db: AsyncEngine
    providers: dict[str, Scripted]
    attempts: Attempts
    slots: Slots
    announced: list[UUID]
    fresh: asyncio.Event

    async def jobs(self, count: int = 1, **more: Any) -> list[UUID]:
        made = [
            await submit(self.db, lambda *_: None, NewJob(request=ChatRequest([{"role": "user", "content": str(i)}]), **more))
            for i in range(count)
        ]
        return [job.job_id for job in made]

    async def run(self, ids: list[UUID], lane: Lane = Lane.INTERACTIVE) -> Mapping[str, int]:
        return await self.attempts.run_pack(new_id(), ids, lane)

    async def rows(self, table: str, order: str = "1") -> list[Any]:
        async with self.db.connect() as connection:
            return list(await connection.execute(text(f"SELECT * FROM {table} ORDER BY {order}")))

    async def do(self, sql: str) -> None:
        async with self.db.connect() as connection:
            await connection.execute(text(sql))

    def free_slots(self) -> int:
        return self.slots._free


@asynccontextmanager
async def bench(
    database_url: str, one: Play, two: Play | None = None, *, slots: int = 10, db: AsyncEngine | None = None, cut_off: bool = False
) -> AsyncIterator[Bench]:
    db = db or engine(database_url)
    providers = {name: Scripted(name, play or always(said())) for name, play in (("one", one), ("two", two))}
    stations = {
        name: Station(provider=providers[name], config=config, pricing=Pricing.of(config)) for name, config in CONFIG.providers.items()
    }
    announced: list[UUID] = []
    fresh = asyncio.Event()
    if not cut_off:
        fresh.set()
    worker_id = new_id()
    registering = engine(database_url)
    async with registering.connect() as connection:
        sql = "INSERT INTO workers (id, host, pid, lanes, slots, state) VALUES (:id, 'here', 1, 'bulk', :slots, 'live')"
        await connection.execute(text(sql), {"id": worker_id, "slots": slots})
    await registering.dispose()

    async def announce(ids: Any) -> None:
        announced.extend(ids)

    shared = Slots(slots)
    attempts = Attempts(
        db,
        CONFIG,
        Chain(stations, Steps(Gates(None), Group(partial(open_calls, db)), lambda _: True), AnswerCache(FakeRedis())),
        worker_id=lambda: worker_id,
        fresh=lambda: fresh.is_set(),
        seems_closed=lambda provider: True,
        announce=announce,
        slots=dict.fromkeys(Lane, shared),
    )
    try:
        yield Bench(db, providers, attempts, shared, announced, fresh)
    finally:
        await db.dispose()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


class Gate:
    """A provider that is waiting for `open` before it answers."""

    def __init__(self, reply: Reply | None = None) -> None:
        self.open = asyncio.Event()
        self.reply = reply or said()

    async def __call__(self, request: ChatRequest) -> Reply:
        await self.open.wait()
        return self.reply


@pytest.fixture(scope="module")
def _shared_database(servers):
    with psycopg.connect(servers.database_url, autocommit=True) as administrator:
        administrator.execute("CREATE DATABASE attempts")
        url = urlunsplit(urlsplit(servers.database_url)._replace(path="/attempts"))
        asyncio.run(upgrade(url))
        yield url
        administrator.execute("DROP DATABASE attempts WITH (FORCE)")


@pytest.fixture
def database_url(_shared_database):
    """One for all tests here, emptied for each: a new one costs more than the test."""
    with psycopg.connect(_shared_database, autocommit=True) as connection:
        connection.execute("TRUNCATE jobs, job_requests, results, provider_calls CASCADE")
    return _shared_database


@pytest.fixture
def postgres(servers, database_url):
    """Shuts the test's database to everybody, and opens it again."""

    class Door:
        name = urlsplit(database_url).path[1:]

        def shut(self) -> None:
            administrator.execute(f"ALTER DATABASE {self.name} ALLOW_CONNECTIONS false".encode())
            administrator.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [self.name])

        def open(self) -> None:
            administrator.execute(f"ALTER DATABASE {self.name} ALLOW_CONNECTIONS true".encode())

    with psycopg.connect(servers.database_url, autocommit=True) as administrator:
        yield Door()
        Door().open()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(attempt_module, "SETTLE_AGAIN_S", 0.01)


# --- the story ---


def test_a_pack_is_claimed_answered_and_settled(database_url):
    async def main() -> None:
        async with bench(database_url, always(said())) as it:
            ids = await it.jobs(3)
            assert await it.run(ids) == {"succeeded": 3}
            assert [row.state for row in await it.rows("jobs")] == ["succeeded"] * 3
            assert [row.job_id for row in await it.rows("results", "job_id")] == ids
            calls = await it.rows("provider_calls")
            assert [(c.provider, c.outcome, c.billing, str(c.cost_usd)) for c in calls] == [
                ("one", "answered", "billed", "0.001200000000")
            ] * 3
            assert it.announced == ids
            assert it.attempts.held == {}
            assert it.free_slots() == 10

    asyncio.run(main())


def test_bulk_jobs_are_not_announced(database_url):
    async def main() -> None:
        async with bench(database_url, always(said())) as it:
            await it.run(await it.jobs(1, lane=Lane.BULK), Lane.BULK)
            assert it.announced == []

    asyncio.run(main())


def test_a_job_nobody_answered_waits_for_another_attempt_with_a_reason_per_provider(database_url):
    async def main() -> None:
        reply = Reply(signal=Signal.OVERLOADED, http_status=503, error_code="busy")
        async with bench(database_url, always(reply), always(Reply(signal=Signal.UNREACHABLE))) as it:
            assert await it.run(await it.jobs()) == {"queued": 1}
            (job,) = await it.rows("jobs")
            assert (job.state, job.attempts, job.worker_id, job.walk_fence) == ("queued", 1, None, 2)
            assert job.error["code"] == "all_providers_failed"
            assert job.error["providers"] == [
                {"provider": "one", "reason": "overloaded", "http_status": 503, "error_code": "busy"},
                {"provider": "two", "reason": "unreachable"},
            ]

    asyncio.run(main())


def test_a_job_without_an_answer_to_the_last_fails_with_a_reason_per_provider(database_url):
    async def main() -> None:
        down = always(Reply(signal=Signal.DROPPED))
        async with bench(database_url, down, down) as it:
            ids = await it.jobs()
            await it.do("UPDATE jobs SET attempts = 9")
            assert await it.run(ids) == {"failed": 1}
            (job,) = await it.rows("jobs")
            assert (job.error["code"], job.attempts) == ("all_providers_failed", 10)
            assert [reason["provider"] for reason in job.error["providers"]] == ["one", "two"]

    asyncio.run(main())


def test_a_job_of_a_chain_that_left_the_configuration_takes_the_default_one(database_url):
    async def main() -> None:
        async with bench(database_url, always(said())) as it:
            assert await it.run(await it.jobs(1, chain="long-gone")) == {"succeeded": 1}
            assert [row.outcome for row in await it.rows("provider_calls")] == ["answered"]

    asyncio.run(main())


def test_a_message_that_comes_twice_is_attempted_once(database_url):
    async def main() -> None:
        async with bench(database_url, always(said())) as it:
            ids = await it.jobs(2)
            counts = await asyncio.gather(it.run(ids), it.run(ids))
            assert sum(count.get("succeeded", 0) for count in counts) == 2
            assert len(it.providers["one"].requests) == 2
            assert it.free_slots() == 10

    asyncio.run(main())


# --- faults of ours ---


def test_a_bug_in_the_chain_loses_neither_the_job_nor_a_prompt_to_the_log(database_url, monkeypatch):
    async def broken(*_: Any) -> None:
        raise RuntimeError("the secret prompt")

    async def main() -> None:
        async with bench(database_url, always(said())) as it:
            monkeypatch.setattr(it.attempts._chain, "answer", broken)
            with structlog.testing.capture_logs() as logs:
                assert await it.run(await it.jobs()) == {"queued": 1}
            assert [entry["event"] for entry in logs] == ["attempt_broke"]
            assert "broken" in logs[0]["origin"]
            assert "secret" not in str(logs)
            assert await it.rows("provider_calls") == []
            assert it.free_slots() == 10

    asyncio.run(main())


def test_a_bug_after_a_paid_answer_does_not_lose_the_answer(database_url, monkeypatch):
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError

    async def main() -> None:
        async with bench(database_url, always(said())) as it:
            monkeypatch.setattr(it.attempts._chain._steps.gates, "report", broken)
            assert await it.run(await it.jobs()) == {"succeeded": 1}

    asyncio.run(main())


def deep(levels: int) -> list[dict[str, Any]]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return [value]


HUGE = Reply(signal=Signal.MALFORMED, usage=Usage(2**40, 1))


@pytest.mark.parametrize(
    ("poison", "state", "code", "billing"),
    [
        (said(tool_calls=deep(2_000)), "failed", "unstorable", "billed"),
        (said(degraded=b"bytes"), "failed", "unstorable", "billed"),
        (HUGE, "queued", "all_providers_failed", "unknown"),
    ],
    ids=["too deep", "no JSON", "figures past their column"],
)
def test_what_cannot_be_stored_costs_its_own_job_only(database_url, poison, state, code, billing, impatient):
    async def one(request: ChatRequest) -> Reply:
        return poison if request.messages[0]["content"] == "1" else said()

    async def main() -> None:
        async with bench(database_url, one, always(Reply(signal=Signal.UNREACHABLE))) as it:
            await it.run(await it.jobs(3))
            good, bad, well = await it.rows("jobs")
            assert [good.state, well.state] == ["succeeded"] * 2
            assert (bad.state, bad.error["code"]) == (state, code)
            calls = [row for row in await it.rows("provider_calls") if row.job_id == bad.id and row.provider == "one"]
            assert [(row.billing, row.ended_at is None) for row in calls] == [(billing, False)]

    asyncio.run(main())


# --- Postgres away ---


def test_a_paid_answer_waits_for_postgres_and_is_settled_once(database_url, postgres, impatient):
    async def main() -> None:
        gate = Gate()
        async with bench(database_url, gate) as it:
            pack = asyncio.create_task(it.run(await it.jobs(2)))
            await it.providers["one"].asked.wait()
            postgres.shut()
            with structlog.testing.capture_logs() as logs:
                gate.open.set()
                await until(lambda: [entry for entry in logs if entry["event"] == "settle_waits"])
            assert not pack.done()
            postgres.open()
            assert await pack == {"succeeded": 2}
            assert len(await it.rows("results")) == 2
            assert [row.outcome for row in await it.rows("provider_calls")] == ["answered"] * 2

    asyncio.run(main())


def test_a_paid_answer_waits_for_a_free_connection(database_url, impatient):
    async def main() -> None:
        narrow = create_async_engine(driver_url(database_url), isolation_level="AUTOCOMMIT", pool_size=1, max_overflow=0, pool_timeout=0.05)
        gate = Gate()
        async with bench(database_url, gate, db=narrow) as it:
            pack = asyncio.create_task(it.run(await it.jobs()))
            await it.providers["one"].asked.wait()
            with structlog.testing.capture_logs() as logs:
                async with narrow.connect():
                    gate.open.set()
                    await until(lambda: [entry for entry in logs if entry["event"] == "settle_waits"])
            assert await pack == {"succeeded": 1}

    asyncio.run(main())


def test_a_job_whose_next_call_cannot_be_put_on_the_books_goes_on_from_there_later(database_url, postgres, impatient):
    async def main() -> None:
        gate = Gate(Reply(signal=Signal.OVERLOADED))
        async with bench(database_url, gate) as it:
            ids = await it.jobs()
            pack = asyncio.create_task(it.run(ids))
            await it.providers["one"].asked.wait()
            postgres.shut()
            with structlog.testing.capture_logs() as logs:
                gate.open.set()
                await until(lambda: [entry for entry in logs if entry["event"] == "settle_waits"])
            assert it.providers["two"].requests == []
            postgres.open()
            assert await pack == {"queued": 1}
            await it.do("UPDATE jobs SET run_at = now()")
            assert await it.run(ids) == {"succeeded": 1}
            assert [len(it.providers[name].requests) for name in ("one", "two")] == [1, 1]
            assert [row.outcome for row in await it.rows("provider_calls")] == ["overloaded", "answered"]

    asyncio.run(main())


def test_a_claim_without_postgres_gives_its_slots_back(database_url, postgres):
    async def main() -> None:
        async with bench(database_url, always(said())) as it:
            ids = await it.jobs(4)
            postgres.shut()
            assert await it.run(ids) == {}
            assert it.free_slots() == 10
            assert not it.attempts.holds(ids[0])
            postgres.open()
            assert await it.run(ids) == {"succeeded": 4}

    asyncio.run(main())


def test_a_claim_that_found_no_free_connection_gives_its_slots_back(database_url):
    async def main() -> None:
        narrow = create_async_engine(driver_url(database_url), pool_size=1, max_overflow=0, pool_timeout=0.05)
        async with bench(database_url, always(said()), db=narrow) as it:
            async with narrow.connect():
                assert await it.run([new_id()]) == {}
            assert it.free_slots() == 10

    asyncio.run(main())


# --- somebody else was faster ---


def test_a_late_answer_is_kept_with_its_call_and_used_by_the_next_attempt(database_url):
    async def main() -> None:
        gate = Gate(said("bought once"))
        async with bench(database_url, gate) as it:
            ids = await it.jobs()
            pack = asyncio.create_task(it.run(ids))
            await it.providers["one"].asked.wait()
            await it.do("UPDATE jobs SET fence = fence + 1, state = 'queued', worker_id = NULL")  # rescued meanwhile
            gate.open.set()
            assert await pack == {"queued": 1}
            assert await it.run(ids) == {"succeeded": 1}
            (result,) = await it.rows("results")
            assert result.answer["content"] == "bought once"
            assert len(await it.rows("provider_calls")) == 1
            assert it.announced == ids

    asyncio.run(main())


# --- stopping ---


@pytest.mark.parametrize(("why", "state"), [(Cancelled(), "cancelled"), (Released(), "queued")])
def test_stopped_during_a_call_the_job_is_settled_and_the_call_booked_as_unknown(database_url, why, state):
    async def main() -> None:
        async with bench(database_url, Gate()) as it:
            ids = await it.jobs()
            pack = asyncio.create_task(it.run(ids))
            await it.providers["one"].asked.wait()
            it.attempts.held[ids[0]].stop(why)
            assert await pack == {state: 1}
            (call,) = await it.rows("provider_calls")
            assert (call.outcome, call.billing, call.cost_usd) == ("cancelled", "unknown", None)
            (job,) = await it.rows("jobs")
            assert (job.state, job.attempts) == (state, 0)
            assert it.free_slots() == 10

    asyncio.run(main())


@pytest.mark.parametrize(("why", "state"), [(Cancelled(), "cancelled"), (Released(), "queued")])
def test_stopped_before_its_first_step_a_job_is_settled_all_the_same(database_url, why, state, monkeypatch):
    async def main() -> None:
        async with bench(database_url, always(said())) as it:
            started = it.attempts._start

            def start_and_stop(*arguments: Any) -> Any:
                held = started(*arguments)
                held.stop(why)  # its task has not run yet
                return held

            monkeypatch.setattr(it.attempts, "_start", start_and_stop)
            assert await it.run(await it.jobs(2)) == {state: 2}
            assert it.attempts.held == {}
            assert await it.rows("provider_calls") == []
            assert it.providers["one"].requests == []
            assert it.free_slots() == 10

    asyncio.run(main())


@pytest.mark.parametrize("why", [Cancelled(), Released()])
def test_stopped_while_the_breaker_hears_of_a_paid_answer_the_answer_wins(database_url, why, monkeypatch):
    async def main() -> None:
        telling = asyncio.Event()

        async def report(*_: Any, **__: Any) -> None:
            telling.set()
            await asyncio.Event().wait()

        async with bench(database_url, always(said())) as it:
            monkeypatch.setattr(it.attempts._chain._steps.gates, "report", report)
            ids = await it.jobs()
            pack = asyncio.create_task(it.run(ids))
            await telling.wait()
            it.attempts.held[ids[0]].stop(why)
            assert await pack == {"succeeded": 1}

    asyncio.run(main())


@pytest.mark.parametrize("why", [Cancelled(), Released()])
def test_stopped_while_it_settles_the_answer_wins(database_url, why, postgres, impatient):
    async def main() -> None:
        gate = Gate()
        async with bench(database_url, gate) as it:
            ids = await it.jobs()
            pack = asyncio.create_task(it.run(ids))
            await it.providers["one"].asked.wait()
            postgres.shut()
            with structlog.testing.capture_logs() as logs:
                gate.open.set()
                await until(lambda: [entry for entry in logs if entry["event"] == "settle_waits"])
            it.attempts.held[ids[0]].stop(why)
            postgres.open()
            assert await pack == {"succeeded": 1}

    asyncio.run(main())


def test_a_second_stop_changes_nothing(database_url):
    async def main() -> None:
        async with bench(database_url, Gate()) as it:
            ids = await it.jobs()
            pack = asyncio.create_task(it.run(ids))
            await it.providers["one"].asked.wait()
            held = it.attempts.held[ids[0]]
            held.stop(Cancelled())
            held.stop(Released())
            assert await pack == {"cancelled": 1}

    asyncio.run(main())


# --- slots and draining ---


def test_no_more_jobs_run_at_once_than_there_are_slots(database_url):
    async def main() -> None:
        running, most, gate = 0, 0, Gate()

        async def one(request: ChatRequest) -> Reply:
            nonlocal running, most
            running += 1
            most = max(most, running)
            reply = await gate(request)
            running -= 1
            return reply

        async with bench(database_url, one, slots=3) as it:
            ids = await it.jobs(9)
            packs = [asyncio.create_task(it.run(ids[i : i + 3])) for i in (0, 3, 6)]
            await until(lambda: running == 3 and len(it.attempts.waiting) == 2)
            gate.open.set()
            await asyncio.gather(*packs)
            assert most == 3
            assert it.attempts.waiting == set()
            assert it.free_slots() == 3

    asyncio.run(main())


def test_a_pack_cancelled_while_it_waits_for_slots_leaves_none_taken(database_url):
    async def main() -> None:
        gate = Gate()
        async with bench(database_url, gate, slots=3) as it:
            ids = await it.jobs(4)
            first = asyncio.create_task(it.run(ids[:2]))
            await it.providers["one"].asked.wait()
            second = asyncio.create_task(it.run(ids[2:]))
            await until(lambda: it.attempts.waiting)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            gate.open.set()
            await first
            assert it.free_slots() == 3
            assert it.attempts.waiting == set()

    asyncio.run(main())


def test_a_draining_worker_claims_nothing_and_withdraws_what_it_was_sent(database_url):
    async def main() -> None:
        async with bench(database_url, always(said())) as it:
            ids = await it.jobs(2)
            delivery = new_id()
            await it.do(f"UPDATE jobs SET delivery_id = '{delivery}', dispatched_at = now()")
            await it.attempts.drain(0)
            assert await it.attempts.run_pack(delivery, ids, Lane.BULK) == {}
            assert [(row.state, row.fence, row.dispatched_at) for row in await it.rows("jobs")] == [("queued", 0, None)] * 2
            assert it.free_slots() == 10

    asyncio.run(main())


def test_a_worker_that_is_cut_off_claims_nothing_until_it_is_heard_of_again(database_url):
    async def main() -> None:
        async with bench(database_url, always(said()), cut_off=True) as it:
            pack = asyncio.create_task(it.run(await it.jobs(2)))
            await until(lambda: it.attempts.waiting)
            assert [row.state for row in await it.rows("jobs")] == ["queued", "queued"]
            assert it.free_slots() == 10
            it.fresh.set()
            assert await pack == {"succeeded": 2}

    asyncio.run(main())


def test_draining_lets_running_jobs_finish(database_url):
    async def main() -> None:
        gate = Gate()
        async with bench(database_url, gate) as it:
            pack = asyncio.create_task(it.run(await it.jobs()))
            await it.providers["one"].asked.wait()
            drain = asyncio.create_task(it.attempts.drain(30))
            await until(lambda: it.attempts.draining)
            gate.open.set()
            await drain
            assert pack.done() or await pack
            assert [row.state for row in await it.rows("jobs")] == ["succeeded"]

    asyncio.run(main())


def test_draining_past_its_grace_releases_what_runs_and_what_waits(database_url):
    async def main() -> None:
        async with bench(database_url, Gate(), slots=2) as it:
            ids = await it.jobs(4)
            packs = [asyncio.create_task(it.run(ids[:2])), asyncio.create_task(it.run(ids[2:]))]
            await it.providers["one"].asked.wait()
            await until(lambda: it.attempts.waiting)
            await it.attempts.drain(0)
            assert await asyncio.gather(*packs) == [{"queued": 2}, {}]
            assert [(row.state, row.worker_id, row.attempts) for row in await it.rows("jobs")] == [("queued", None, 0)] * 4
            assert it.attempts.held == {}
            assert it.free_slots() == 2

    asyncio.run(main())


def test_what_was_being_claimed_when_the_drain_began_is_released_without_a_call(database_url, monkeypatch):
    async def main() -> None:
        async with bench(database_url, always(said())) as it:
            ids = await it.jobs(2)
            claiming, claim = asyncio.Event(), attempt_module.claim

            async def slow_claim(*arguments: Any) -> Any:
                claims = await claim(*arguments)
                claiming.set()
                await until(lambda: it.attempts.draining)
                return claims

            monkeypatch.setattr(attempt_module, "claim", slow_claim)
            pack = asyncio.create_task(it.run(ids))
            await claiming.wait()
            assert it.attempts.holds(ids[0])
            await it.attempts.drain(30)
            assert await pack == {"queued": 2}
            assert it.providers["one"].requests == []
            assert [(row.state, row.worker_id) for row in await it.rows("jobs")] == [("queued", None)] * 2

    asyncio.run(main())


def test_what_postgres_would_not_take_until_the_end_of_a_drain_comes_back_to_be_kept(database_url, postgres, impatient, monkeypatch):
    monkeypatch.setattr(attempt_module, "LAST_SETTLE_S", 0.2)

    async def main() -> None:
        gate = Gate()
        async with bench(database_url, gate) as it:
            (job_id,) = await it.jobs()
            pack = asyncio.create_task(it.run([job_id]))
            await it.providers["one"].asked.wait()
            postgres.shut()
            with structlog.testing.capture_logs() as logs:
                gate.open.set()
                await until(lambda: [entry for entry in logs if entry["event"] == "settle_waits"])
                (left,) = await it.attempts.drain(0)
            assert (left.job_id, left.state, left.answer.content) == (job_id, "succeeded", "hello")
            postgres.open()
            assert await pack == {"succeeded": 1}
            assert await it.attempts.drain(0) == []

    asyncio.run(main())


def test_an_outcome_is_never_lost_between_chain_and_settlement(database_url):
    """The pack's states are those in the ledger, for every way a walk can end."""

    async def one(request: ChatRequest) -> Reply:
        signals = [Signal.ANSWERED, Signal.INVALID_REQUEST, Signal.DROPPED, Signal.CONTENT_POLICY]
        signal = signals[int(request.messages[0]["content"])]
        return said() if signal is Signal.ANSWERED else Reply(signal=signal)

    async def main() -> None:
        async with bench(database_url, one, always(Reply(signal=Signal.DROPPED))) as it:
            counts = await it.run(await it.jobs(4))
            assert counts == {"succeeded": 1, "failed": 2, "queued": 1}
            rows = [row.state for row in await it.rows("jobs")]
            assert {state: rows.count(state) for state in rows} == counts

    asyncio.run(main())
