"""The fault laboratory: own servers behind a network that can be cut, real workers, simulated vendors with an independent bill.

    def test_a_claim_in_that_sentence(laboratory):
        async def story(lab):
            one, two = await lab.workers("one", "two")
            await lab.submit_batch(200)
            await one.kill()
            await lab.assert_sound()

        laboratory(story)

What the lab does and sees is noted in `lab.history`; the checker holds ledger, bill and history against each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import checker
import stage
from celery import Celery
from fleet import PATIENCE_S, Api, Worker, start
from history import History
from ports import free_port
from proxy import Proxy
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from server import Server, Servers, named
from sqlalchemy.exc import DBAPIError
from vendors import SCRIPT, configuration

from worker import database, keys
from worker.app import DELIVERY
from worker.dispatch import queue_name
from worker.job import ChatRequest, Lane, new_id
from worker.loop import cancel_surely
from worker.simulator.bill import Bill
from worker.simulator.script import parse
from worker.simulator.server import Simulator
from worker.submit import Batch, NewJob, Row, add_rows, close_batch, open_batch, submit
from worker.transport import TASK

# Short times and small packs: a death is noticed in 3 s, and a kill meets many messages.
TIMES = {
    "BACKSTOP_HEARTBEAT_S": "0.2",
    "BACKSTOP_HEARTBEAT_TTL_S": "3",
    "BACKSTOP_DISPATCH_TTL_S": "10",
    "BACKSTOP_DRAIN_S": "10",
    "BACKSTOP_BULK_SLOTS": "30",
    "BACKSTOP_INTERACTIVE_SLOTS": "10",
    "BACKSTOP_PACK_SIZE": "10",
    "BACKSTOP_LOG_FORMAT": "json",
}
DEADLINE_S = 3600.0
SAMPLE_S = 0.5


class Lab:
    """Made by `a_lab`. `db` and `redis` go straight to the servers, `environment` is the workers': through the proxies."""

    def __init__(self, directory: Path, servers: Servers, database_name: str, simulator: Simulator) -> None:
        self.directory = directory
        self.postgres: Server = servers.postgres
        self.valkey: Server = servers.valkey
        self.simulator = simulator
        self.history = History(directory / "history.jsonl")
        self._database_name = database_name
        self.db = database.engine(named(self.postgres.url(), database_name), pooled=False)  # outlives a restart
        self.redis = Redis.from_url(self.valkey.url(), socket_timeout=2, retry=Retry(NoBackoff(), 1))  # this too
        self.environment = {
            **self._ways(self.postgres.proxy, self.valkey.proxy),
            "BACKSTOP_CONFIG": str(directory / "backstop.toml"),
            "BACKSTOP_DATA": str(directory / "data"),
            **TIMES,
        }
        self.processes: list[Worker | Api] = []
        self._courier = Celery("courier", broker=self.environment["REDIS_URL"], set_as_current=False)
        self._courier.conf.update(DELIVERY)
        self._batches = 0
        self._open = AsyncExitStack()

    @property
    def bill(self) -> Bill:
        return self.simulator.bill

    async def worker(
        self,
        name: str,
        *,
        failing: str = "",
        broken: str = "",
        poison: str = "",
        environment: Mapping[str, str] | None = None,
        lanes: Iterable[Lane] = (),
    ) -> Worker:
        """Its process has been started; `await live()`. See `failing` for what `failing`, `broken` and `poison` mean."""
        seams = {"BACKSTOP_FAILPOINT": failing, "BACKSTOP_SABOTAGE": broken, "BACKSTOP_POISON": poison}
        app = "failing" if any(seams.values()) else "worker.app"
        arguments = ["-m", "celery", "-A", app, "worker", "--without-gossip", "--without-mingle", "-n", f"{name}@lab"]
        if chosen := [queue_name(lane) for lane in lanes]:
            arguments += ["-Q", ",".join(chosen)]
        log = self.directory / f"{name}.log"
        process = await start(arguments, {**self.environment, **seams, **(environment or {})}, log)
        made = Worker(name, process, log, self.db, self.history, self.until)
        self.processes.append(made)
        return made

    async def workers(self, *names: str, **how: Any) -> list[Worker]:
        """All of them were started at once and are live."""
        made = [await self.worker(name, **how) for name in names]
        await asyncio.gather(*(one.live() for one in made))
        return made

    async def own_network(self) -> tuple[dict[str, str], Proxy, Proxy]:
        """Ways to Postgres and Valkey for one process alone: the environment that makes it take them, and their proxies."""
        postgres = await self._open.enter_async_context(Proxy(self.postgres.port))
        valkey = await self._open.enter_async_context(Proxy(self.valkey.port))
        return self._ways(postgres, valkey), postgres, valkey

    def _ways(self, postgres: Proxy, valkey: Proxy) -> dict[str, str]:
        return {"DATABASE_URL": named(self.postgres.url(postgres), self._database_name), "REDIS_URL": self.valkey.url(valkey)}

    async def api(self, **environment: str) -> Api:
        """A live API process and a key for it."""
        port = free_port()
        log = self.directory / "api.log"
        process = await start(["-m", "worker", "api", "--port", str(port)], {**self.environment, **environment}, log)
        key = await keys.create(self.db, name=f"lab {port}")
        made = Api(process, log, f"http://127.0.0.1:{port}", key.secret)
        self.processes.append(made)
        await made.live()
        return made

    async def submit_batch(self, count: int, name: str | None = None, *, chain: str = "default") -> tuple[Batch, list[UUID]]:
        """A whole batch was accepted: it and the ids of its jobs. With Postgres away it is sent again, as people do."""
        self._batches += 1
        name = name or f"batch {self._batches}"
        while True:
            with suppress(DBAPIError):
                opened = await open_batch(self.db, name, fingerprint=[name], columns=None)
                asked = (_ask(f"{name}: ticket {n}") for n in range(1, count + 1))
                wanted = (Row(ordinal=n, custom_id=None, request=request, chain=chain) for n, request in enumerate(asked, 1))
                if not opened.complete:
                    async for _ in add_rows(self.db, opened, wanted, deadline_s=DEADLINE_S):
                        pass
                    await close_batch(self.db, opened)
                found = await self.rows("SELECT id FROM jobs WHERE batch_id = :id ORDER BY ordinal", id=opened.id)
                ids = [row.id for row in found]
                self.history.note("accepted", job_ids=[str(job_id) for job_id in ids])
                return opened, ids
            await asyncio.sleep(0.2)

    async def submit_one(self, content: str = "hello", *, lane: Lane = Lane.INTERACTIVE, chain: str = "default") -> UUID:
        """One job was accepted, whatever its message met. With Postgres away it is sent again, under the same key."""
        job = NewJob(request=_ask(content), chain=chain, lane=lane, deadline_s=DEADLINE_S, idempotency_key=str(uuid4()))
        while True:
            with suppress(DBAPIError):
                submitted = await submit(self.db, self.publish, job)
                self.history.note("accepted", job_ids=[str(submitted.job_id)])
                return submitted.job_id
            await asyncio.sleep(0.2)

    def publish(self, lane: Lane, delivery_id: UUID, job_ids: Sequence[UUID]) -> None:
        """The producers' way to Redis. Never on the loop, where the proxy on that way lives: see `deliver`."""
        ids = [str(job_id) for job_id in job_ids]
        self._courier.send_task(TASK, kwargs={"job_ids": ids}, task_id=str(delivery_id), queue=queue_name(lane), retry=False)

    async def deliver(self, job_ids: Sequence[UUID], lane: Lane = Lane.BULK) -> None:
        """A message that nobody had to send: these jobs may be ready."""
        await asyncio.to_thread(self.publish, lane, new_id(), job_ids)

    @asynccontextmanager
    async def fault(self, name: str, **fields: Any) -> AsyncIterator[None]:
        """The history says that this fault began, and at the end that it was healed."""
        self.history.note("fault", name=name, **fields)
        yield
        self.history.note("healed", name=name)

    async def rows(self, sql: str, **values: Any) -> list[Any]:
        return await stage.rows(self.db, sql, **values)

    async def until(self, sql: str, **values: Any) -> list[Any]:
        """The rows of the query, as soon as there are any; a Postgres that is away is waited for."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with suppress(DBAPIError):
                    return await stage.until(self.db, sql, **values)
                await asyncio.sleep(0.05)

    async def until_ended(self, count: int) -> None:
        """So many jobs have ended, in whatever way."""
        await self.until("SELECT FROM jobs WHERE finished_at IS NOT NULL HAVING count(*) >= :count", count=count)

    async def until_asked(self, count: int) -> None:
        """The vendors have seen so many requests."""
        await self.until_true(lambda: len(self.bill) >= count)

    async def until_true(self, condition: Callable[[], object]) -> None:
        """For what no event tells of: the condition holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - the event is another process's
                await asyncio.sleep(0.005)

    async def all_ended(self, timeout_s: float = 90.0) -> None:
        """Every job is terminal, nothing is under way any more. Raises AssertionError with states and last words of the workers."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.until("SELECT WHERE NOT EXISTS (SELECT FROM jobs WHERE state IN ('queued', 'running'))")
        except TimeoutError:
            raise AssertionError(await self._what_hangs()) from None
        with suppress(TimeoutError):  # what is left open then is for the checker to say
            async with asyncio.timeout(5):
                await self.until("SELECT WHERE NOT EXISTS (SELECT FROM provider_calls WHERE outcome IS NULL)")
                await self.until_true(lambda: not any(totals.unfinished for totals in self.bill.totals().values()))
        await self._sample()

    async def verdicts(self, **limits: Any) -> list[checker.Verdict]:
        """What the checker says of ledger, bill and history; `limits` are its own."""
        return await checker.check(self.db, self.bill.lines(), self.history, **limits)

    async def assert_sound(self, timeout_s: float = 90.0, **limits: Any) -> None:
        """All jobs have ended and every invariant holds. Raises AssertionError naming those that do not."""
        await self.all_ended(timeout_s)
        violated = [verdict for verdict in await self.verdicts(**limits) if not verdict.ok]
        assert not violated, "\n".join(f"{verdict.name}: {verdict.detail} ({verdict.figure})" for verdict in violated)

    async def watch(self) -> None:
        """For ever: how many jobs have ended, and what the processes and Redis hold, go into the history."""
        while True:
            with suppress(DBAPIError, RedisError, TimeoutError, OSError):
                async with asyncio.timeout(2):
                    await self._sample()
            await asyncio.sleep(SAMPLE_S)

    async def _sample(self) -> None:
        (ended,) = await self.rows("SELECT count(*) AS n FROM jobs WHERE finished_at IS NOT NULL")
        self.history.note("finished", count=ended.n)
        with suppress(RedisError, OSError):
            depths = {lane.value: await self.redis.llen(queue_name(lane)) for lane in Lane}
            memory = await self.redis.info("memory")
            rss = {one.name: one.rss_bytes() for one in self.processes if isinstance(one, Worker) and one.alive()}
            self.history.note("sample", redis_depth=sum(depths.values()), redis_bytes=memory["used_memory"], rss=rss)

    async def _what_hangs(self) -> str:
        states = {row.state: row.n for row in await self.rows("SELECT state, count(*) AS n FROM jobs GROUP BY state")}
        fleet = [f"{row.pid} {row.state}" for row in await self.rows("SELECT pid, state FROM workers ORDER BY started_at")]
        words = [f"--- {one.log.stem}\n{one.log.read_text('utf-8', 'replace')[-1500:]}" for one in self.processes]
        return "\n".join([f"jobs have not ended: {states}; workers: {', '.join(fleet) or 'none'}", *words])

    async def close(self) -> None:
        """Everything it started is gone."""
        for process in self.processes:
            await process.gone()
        await self._open.aclose()
        await self.redis.aclose()
        await self.db.dispose()
        self._courier.close()


@asynccontextmanager
async def a_lab(
    directory: Path,
    servers: Servers,
    *,
    script: Mapping[str, Any] | None = None,
    config: Mapping[str, Mapping[str, Any]] | None = None,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[Lab]:
    """An open lab over empty servers. `script` is the vendors' (see worker.simulator.script), `config` adds to backstop.toml by section,
    as in {"providers.first": {"timeout_s": 2}}; the default chain asks all vendors in the order of the script.
    """
    database_name = await servers.fresh()
    checked = parse(script or SCRIPT, "script")
    async with AsyncExitStack() as stack:
        servers.postgres.proxy = await stack.enter_async_context(Proxy(servers.postgres.port))
        servers.valkey.proxy = await stack.enter_async_context(Proxy(servers.valkey.port))
        simulator = await stack.enter_async_context(Simulator(checked, bill_file=directory / "bill.jsonl", fsync=True))
        (directory / "backstop.toml").write_text(configuration(checked, simulator, config or {}))
        lab = Lab(directory, servers, database_name, simulator)
        lab.environment.update(environment or {})
        stack.push_async_callback(lab.close)
        watching = asyncio.create_task(lab.watch())
        try:
            yield lab
        finally:
            await cancel_surely([watching])


def _ask(content: str) -> ChatRequest:
    return ChatRequest([{"role": "user", "content": content}])
