"""Producers in Python, against real servers: what they hand in, wait for and get back, and what they leave alone."""

import asyncio
import os
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from celery import Celery
from redis import Redis
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from stage import HELLO, Mailbox, answered, play, rows, take

from worker.batchlines import _PARAMETERS
from worker.dispatch import queue_name
from worker.errors import KeyReused, NotFound, Unreachable, UsageError, WaitTimedOut
from worker.following import Chatting, Enqueuing, EnqueuingMany
from worker.job import JobState, Lane, new_id
from worker.ledger import settle
from worker.loop import LoopThread
from worker.producer import AsyncBackstop, Backstop
from worker.simulator import script
from worker.simulator.server import Simulator
from worker.submit import _EARLIER, NewJob, Parameters, submit
from worker.transport import screened

SCRIPT = {"providers": {"good": {}, "bad": {"faults": [{"kind": "status", "status": 500, "rate": 1}]}}}
LONG_S = 60.0  # never waited out by a test that passes
NOWHERE = "postgresql://nobody@127.0.0.1:1/none"
NO_FILE = "/nowhere/backstop.toml"


@pytest.fixture
def client(database_url, redis_url):
    with Backstop(database_url=database_url, redis_url=redis_url, config=NO_FILE) as made:
        yield made


def answer(database_url, *job_ids):
    async def story(db):
        await settle(db, [answered(claim, f"to {claim.job_id}") for claim in await take(db, job_ids)])

    play(database_url, story)


def ids_of(database_url, batch):
    found = []

    async def story(db):
        found.extend(row.id for row in await rows(db, "SELECT id FROM jobs WHERE batch_id = :id ORDER BY ordinal", id=batch.id))

    play(database_url, story)
    return found


def test_a_text_becomes_a_job_that_workers_are_woken_for(client, redis_url):
    job = client.enqueue("hello", temperature=0, metadata={"ticket": 7})
    queue = queue_name(Lane.INTERACTIVE)
    with Redis.from_url(redis_url) as redis:
        (message,) = redis.lrange(queue, 0, -1)
    assert screened((queue.encode(), message)) is not None
    assert str(job.job_id).encode() in message
    assert b"hello" not in message
    view = client.result(job)
    assert (view.state, view.lane, view.metadata) == (JobState.QUEUED, Lane.INTERACTIVE, {"ticket": 7})


def test_a_job_is_waited_for_and_its_answer_read(client, database_url):
    job = client.enqueue([{"role": "user", "content": "hello"}])
    answer(database_url, job.job_id)
    view = client.wait(job, LONG_S)
    assert view.answer is not None
    assert view.answer.content == f"to {job.job_id}"
    assert client.wait(str(job.job_id), 0) == view


def test_a_wait_that_is_too_short_says_so_and_the_job_goes_on(client):
    job = client.enqueue("hello")
    with pytest.raises(WaitTimedOut, match=str(job.job_id)):
        client.wait(job, 0)
    with pytest.raises(WaitTimedOut, match="1 jobs"):
        list(client.as_completed([job], 0))
    assert client.result(job).state is JobState.QUEUED


def test_an_idempotency_key_gives_the_job_of_then_or_refuses(client):
    first = client.enqueue("hello", idempotency_key="k")
    again = client.enqueue("hello", idempotency_key="k")
    assert (again.job_id, again.replayed) == (first.job_id, True)
    with pytest.raises(KeyReused):
        client.enqueue("good bye", idempotency_key="k")


def test_a_key_whose_job_is_deleted_at_that_moment_gives_a_new_job(database_url):
    async def story(db):
        new = NewJob(request=HELLO, idempotency_key="k")
        first = await submit(db, Mailbox().publish, new)
        looked = []

        def deleted(_connection, statement, *_):
            if statement is _EARLIER:
                looked.append(statement)
                with psycopg.connect(database_url) as other:
                    other.execute("DELETE FROM job_requests")
                    other.execute("DELETE FROM jobs")

        event.listen(db.sync_engine, "before_execute", deleted)
        second = await submit(db, Mailbox().publish, new)
        assert len(looked) == 1
        assert second.job_id != first.job_id
        assert not second.replayed
        assert [row.id for row in await rows(db, "SELECT id FROM jobs")] == [second.job_id]

    play(database_url, story)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, r"messages\[0\].role"),
        ({"messages": None}, "messages"),
        ({"messages": "x", "temprature": 1}, "temprature: unknown parameter, did you mean 'temperature'"),
        ({"messages": "x", "temperature": 9}, "temperature"),
        ({"messages": "x", "lane": "fast"}, "lane"),
        ({"messages": "x", "deadline_s": 0}, "deadline_s"),
        ({"messages": "x", "deadline_s": float("nan")}, "deadline_s"),
        ({"messages": "x", "idempotency_key": ""}, "idempotency_key"),
        ({"messages": "x", "idempotency_key": "a\x00"}, "idempotency_key: expected 1 to 255 visible ASCII characters"),
        ({"messages": "x", "idempotency_key": "\ud800"}, "idempotency_key"),
        ({"messages": "x", "idempotency_key": "a b\n"}, "idempotency_key"),
        ({"messages": "x", "metadata": {"a": "x" * 16_400}}, "metadata: .*16384"),
        ({"messages": "x", "model": "m"}, "model: .*chain"),
        ({"messages": "x", "metadata": {"when": object()}}, "metadata"),
        ({"messages": "x", "metadata": ["a"]}, "metadata"),
        ({"messages": "x", "chain": ""}, "chain"),
    ],
)
def test_bad_input_is_told_at_the_call_and_names_the_field(given, named):
    with (
        Backstop(database_url=NOWHERE, redis_url="redis://127.0.0.1:1/0", config=NO_FILE) as client,
        pytest.raises(UsageError, match=named),
    ):
        client.enqueue(**given)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda client: client.chat("x", timeout_s=0), "^timeout_s: expected seconds"),
        (lambda client: client.enqueue_many(["x"], deadline_s=-1), "^deadline_s: expected seconds"),
        (lambda client: client.cancel("monday"), "^job: expected .*not a name"),
        (lambda client: client.wait(7), "^job: expected"),
        (lambda client: Backstop(tennant="a"), "^tennant: no such setting, there are database_url, "),
        (lambda client: AsyncBackstop(queue="a"), "^queue: no such setting"),
        (lambda client: Backstop(tenant=""), "^tenant: give it 1 to 100 printable"),
        (lambda client: Backstop(tenant=7), "^tenant: give it 1 to 100 printable"),
        (lambda client: Backstop(tenant="a\x00"), "^tenant: give it 1 to 100 printable"),
        (lambda client: Backstop(redis_url="nothing", database_url=NOWHERE, config=NO_FILE).enqueue("x"), "^redis_url "),
    ],
)
def test_a_mistake_is_told_in_the_words_of_the_call(client, call, words):
    with pytest.raises(UsageError, match=words):
        call(client)


def test_every_parameter_that_is_taken_is_known_to_a_type_checker():
    assert set(Parameters.__annotations__) == set(_PARAMETERS) - {"n", "stream", "store"}
    for method, keywords in (("enqueue", Enqueuing), ("enqueue_many", EnqueuingMany), ("chat", Chatting)):
        named = signature(getattr(AsyncBackstop, method)).parameters.values()
        assert {one.name for one in named if one.kind is one.KEYWORD_ONLY} == set(keywords.__annotations__) - set(
            Parameters.__annotations__
        )


def test_an_unknown_chain_is_told_where_the_configuration_is_there(tmp_path):
    file = tmp_path / "backstop.toml"
    file.write_text('[providers.a]\nbase_url = "http://127.0.0.1:1/v1"\nmodel = "m"\n[chains.default]\nproviders = ["a"]\n')
    with (
        Backstop(database_url=NOWHERE, redis_url="redis://127.0.0.1:1/0", config=file) as client,
        pytest.raises(UsageError, match="elsewhere"),
    ):
        client.enqueue("x", chain="elsewhere")


def test_a_server_that_is_not_there_is_unreachable():
    with Backstop(database_url=NOWHERE, redis_url="redis://127.0.0.1:1/0", config=NO_FILE) as client, pytest.raises(Unreachable):
        client.enqueue("x")


def test_without_redis_a_job_is_taken_all_the_same(database_url):
    with Backstop(database_url=database_url, redis_url="redis://127.0.0.1:1/0", config=NO_FILE) as client:
        assert client.result(client.enqueue("x")).state is JobState.QUEUED


def test_jobs_of_others_are_not_there(client, database_url, redis_url):
    job = client.enqueue("hello")
    with Backstop(database_url=database_url, redis_url=redis_url, config=NO_FILE, tenant="other") as other:
        for ask in (other.result, other.wait, other.cancel, lambda one: list(other.as_completed([one]))):
            with pytest.raises(NotFound):
                ask(job)
    with pytest.raises(NotFound):
        client.result(new_id())


def test_no_tenant_given_is_the_default_one_and_never_all(database_url, redis_url):
    servers = {"database_url": database_url, "redis_url": redis_url, "config": NO_FILE}
    with Backstop(**servers, tenant="other") as other, Backstop(**servers, tenant=None) as unnamed, Backstop(**servers) as default:
        theirs, batch, ours = other.enqueue("x"), other.enqueue_many(["a"], batch="theirs"), unnamed.enqueue("y")
        for ask in (unnamed.result, unnamed.cancel, unnamed.wait, lambda one: list(unnamed.as_completed([one]))):
            with pytest.raises(NotFound):
                ask(theirs)
        for named in (batch, batch.id, "theirs"):
            with pytest.raises(NotFound):
                list(unnamed.results(named))
        assert unnamed.cancel(batch).cancelled == 0
        assert default.result(ours).tenant == "default"


@contextmanager
def postgres_away(database_url):
    """Nobody can connect, and who was connected is not any more."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE pg_database SET datallowconn = false WHERE datname = current_database()")
        try:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            yield
        finally:
            connection.execute("UPDATE pg_database SET datallowconn = true WHERE datname = current_database()")


@pytest.mark.parametrize(
    "ask",
    [
        lambda client, job: client.result(job),
        lambda client, job: client.wait(job, 1),
        lambda client, job: client.cancel(job),
        lambda client, job: client.enqueue("x"),
        lambda client, job: client.enqueue_many(["x"]),
        lambda client, job: next(client.as_completed([job], LONG_S)),
        lambda client, job: next(client.results("some")),
        lambda client, job: client.chat("x"),
    ],
    ids=["result", "wait", "cancel", "enqueue", "enqueue_many", "as_completed", "results", "chat"],
)
def test_a_postgres_that_goes_is_unreachable_whatever_is_asked(database_url, redis_url, vendors, tmp_path, ask):
    config = configured(vendors, tmp_path)
    with Backstop(database_url=database_url, redis_url=redis_url, config=config, data=tmp_path) as client:
        job = client.enqueue("x")
        with postgres_away(database_url), pytest.raises(Unreachable):
            ask(client, job)


def test_a_postgres_that_goes_between_two_completed_jobs_is_unreachable(client, database_url, monkeypatch):
    jobs = [client.enqueue("a"), client.enqueue("b")]
    answer(database_url, jobs[0].job_id)
    arriving = client.as_completed(jobs, LONG_S)
    assert next(arriving).id == jobs[0].job_id
    with postgres_away(database_url), pytest.raises(Unreachable):
        next(arriving)


def test_jobs_come_as_they_are_completed(client, database_url):
    jobs = [client.enqueue(f"ticket {n}") for n in range(3)]
    answer(database_url, jobs[2].job_id)
    arriving = client.as_completed(jobs, LONG_S)
    assert next(arriving).id == jobs[2].job_id
    answer(database_url, jobs[0].job_id)
    assert next(arriving).id == jobs[0].job_id
    answer(database_url, jobs[1].job_id)
    assert [view.id for view in arriving] == [jobs[1].job_id]


def test_any_number_of_jobs_is_read_a_page_at_a_time(client, database_url, monkeypatch):
    monkeypatch.setattr("worker.following.PAGE", 2)
    ids = ids_of(database_url, client.enqueue_many(f"ticket {n}" for n in range(8)))
    answer(database_url, *ids[:3])
    arriving = client.as_completed(ids, LONG_S)
    seen = {next(arriving).id for _ in range(3)}
    assert seen == set(ids[:3])
    answer(database_url, *ids[3:])
    assert {view.id for view in arriving} == set(ids[3:])


def test_a_batch_comes_back_in_the_order_it_was_given(client, database_url):
    batch = client.enqueue_many(
        ["a", [{"role": "user", "content": "b"}], {"messages": "c", "custom_id": "third", "seed": 1}], batch="monday"
    )
    ids = ids_of(database_url, batch)
    answer(database_url, *reversed(ids))
    found = list(client.results(batch, LONG_S))
    assert [row.job_id for row in found] == ids
    assert [row.custom_id for row in found] == [None, None, "third"]
    assert {row.state for row in found} == {"succeeded"}
    assert list(client.results("monday", 0)) == found


def test_results_wait_for_the_row_whose_turn_it_is(database_url, redis_url):
    async def story():
        async with AsyncBackstop(database_url=database_url, redis_url=redis_url, config=NO_FILE) as client:
            batch = await client.enqueue_many(["a", "b"])
            first, second = await asyncio.to_thread(ids_of, database_url, batch)
            await asyncio.to_thread(answer, database_url, second)
            results = client.results(batch, LONG_S)
            next_one = asyncio.create_task(anext(results))
            await (await client._opened()).endings._waited_for.wait()
            assert not next_one.done()
            await asyncio.to_thread(answer, database_url, first)
            return [(row.job_id, row.state) for row in [await next_one, *[row async for row in results]]], [first, second]

    found, ids = asyncio.run(story())
    assert found == [(job_id, "succeeded") for job_id in ids]


def test_a_bad_row_is_named_and_the_mended_batch_is_resumed(client, database_url, monkeypatch):
    monkeypatch.setattr("worker.submit.CHUNK", 2)
    with pytest.raises(UsageError, match=r"row 4: messages\[0\]"):
        client.enqueue_many(["a", "b", "c", [{}]], batch="monday")
    batch = client.enqueue_many(["a", "b", "c", "d"], batch="monday")
    assert batch.resumed
    assert len(ids_of(database_url, batch)) == 4
    assert client.enqueue_many(["a", "b", "c", "d"], batch="monday").complete
    with pytest.raises(UsageError, match="monday"):
        client.enqueue_many(["a"], batch="monday", temperature=1)


@pytest.mark.parametrize("error", [OperationalError("SELECT 1", {}, Exception("theirs")), KeyError("theirs"), UsageError("theirs")])
def test_what_the_callers_own_rows_raise_is_left_as_it_is(client, error):
    def source():
        yield "a"
        raise error

    with pytest.raises(type(error)) as caught:
        client.enqueue_many(source(), batch="monday")
    assert caught.value is error


def test_rows_are_never_held_at_once(client, monkeypatch):
    monkeypatch.setattr("worker.submit.CHUNK", 10)
    seen = []

    def source():
        for n in range(35):
            if n and n % 10 == 0:
                with Redis.from_url(client._where["redis_url"]):
                    seen.append(client_total())
            yield f"ticket {n}"

    def client_total():
        with Backstop(**client._where) as other:
            return sum(1 for _ in other._run(lambda producer: _batch_total(producer)))

    client.enqueue_many(source(), batch="stream")
    assert seen == [10, 20, 30]


async def _batch_total(producer):
    links = await producer._opened()
    return await rows(links.db, "SELECT id FROM jobs")


def test_a_cancelled_job_and_a_cancelled_batch_end(client):
    job = client.enqueue("x")
    assert client.cancel(job).cancelled == 1
    assert client.result(job).state is JobState.CANCELLED
    batch = client.enqueue_many(["a", "b"])
    assert client.cancel(batch).cancelled == 2
    assert {row.state for row in client.results(batch, 0)} == {"cancelled"}


def test_threads_share_one_client(client):
    jobs = []
    threads = [threading.Thread(target=lambda: jobs.append(client.enqueue("x").job_id)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(jobs)) == 20


def test_it_works_where_an_event_loop_runs(client):
    async def story():
        return client.enqueue("x")

    assert client.result(asyncio.run(story())).state is JobState.QUEUED


def test_a_closed_client_may_be_closed_again_and_used_again(client):
    before = set(threading.enumerate())
    job = client.enqueue("x")
    client.close()
    client.close()
    assert client.result(job).id == job.job_id
    client.close()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "backstop-loop"]


def test_what_is_read_from_a_client_that_is_closed_meanwhile_ends_in_words_and_leaves_nothing_behind(client, database_url):
    before = set(threading.enumerate())
    jobs = [client.enqueue("a"), client.enqueue("b")]
    answer(database_url, jobs[0].job_id)
    arriving, abandoned = client.as_completed(jobs, LONG_S), client.as_completed(jobs, LONG_S)
    assert next(arriving).id == next(abandoned).id == jobs[0].job_id
    client.close()
    abandoned.close()
    with pytest.raises(UsageError, match="closed while its results were being read"):
        next(arriving)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "backstop-loop"]


def test_a_wait_that_runs_out_names_the_time_it_was_given(client):
    client.enqueue_many(["a"], batch="never")
    with pytest.raises(WaitTimedOut, match=r"after 0\.25 s"):
        list(client.results("never", timeout_s=0.25))


def test_the_asynchronous_one_does_the_same(database_url, redis_url):
    async def story():
        async with AsyncBackstop(database_url=database_url, redis_url=redis_url, config=NO_FILE) as client:
            job = await client.enqueue("x")
            with suppress(WaitTimedOut):
                await client.wait(job, 0)
            await client.cancel(job)
            return [view.state async for view in client.as_completed([job])]

    assert asyncio.run(story()) == [JobState.CANCELLED]


def test_another_event_loop_is_refused_until_it_is_closed(database_url, redis_url):
    client = AsyncBackstop(database_url=database_url, redis_url=redis_url, config=NO_FILE)
    loop = asyncio.new_event_loop()
    job = loop.run_until_complete(client.enqueue("x"))
    with pytest.raises(UsageError, match="another event loop"):
        asyncio.run(client.result(job))
    loop.run_until_complete(client.aclose())
    loop.close()

    async def again():
        async with client:
            return await client.result(job)

    assert asyncio.run(again()).id == job.job_id


def python(source, database_url, redis_url):
    environ = os.environ | {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "BACKSTOP_CONFIG": NO_FILE}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], env=environ, capture_output=True, text=True, timeout=LONG_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_a_child_after_a_fork_and_its_parent_both_go_on(database_url, redis_url):
    source = """if True:
    import os, warnings
    from worker.producer import Backstop
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # Python's own, of forking where threads run
    client = Backstop()
    first = client.enqueue("before")
    child = os.fork()
    if child == 0:
        print(client.enqueue("child").job_id, flush=True)
        client.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print(client.enqueue("parent").job_id, client.result(first).id)
    """
    assert len(set(python(source, database_url, redis_url))) == 3


def test_one_that_a_child_used_first_is_used_by_its_parent_and_its_own_child(database_url, redis_url):
    source = """if True:
    import os, warnings
    from worker.producer import Backstop
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # Python's own, of forking where threads run
    client = Backstop()
    def forked(work):
        child = os.fork()
        if child == 0:
            work()
            client.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    def hand_in():
        print(client.enqueue("x").job_id, flush=True)
    def hand_in_twice():
        hand_in()
        forked(hand_in)
        hand_in()
    forked(hand_in_twice)
    hand_in()
    """
    assert len(set(python(source, database_url, redis_url))) == 4


def test_an_asynchronous_one_goes_on_in_a_child_after_a_fork_and_in_its_parent(database_url, redis_url):
    source = """if True:
    import asyncio, os
    from worker.producer import AsyncBackstop
    client = AsyncBackstop()
    async def hand_in():
        print((await client.enqueue("x")).job_id, flush=True)
    async def in_child():
        async with client:
            await hand_in()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(hand_in())
    child = os.fork()
    if child == 0:
        asyncio.run(in_child())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    loop.run_until_complete(hand_in())
    loop.run_until_complete(client.aclose())
    loop.close()
    """
    assert len(set(python(source, database_url, redis_url))) == 3


HOST = """
import os
from celery import Celery
from worker.producer import Backstop

app = Celery("host", broker=os.environ["HOST_BROKER"], backend=os.environ["HOST_BROKER"], broker_connection_retry_on_startup=True)
backstop = Backstop(database_url=os.environ["HOST_LEDGER"], redis_url=os.environ["HOST_QUEUES"], config="/nowhere/backstop.toml")
backstop.enqueue("before the fork")


@app.task(name="host.hand_in")
def hand_in(words):
    job = backstop.enqueue(words)
    return str(job.job_id), backstop.result(job).state
"""


@contextmanager
def host_worker(place, environ):
    """A prefork worker of an application that is not ours."""
    (place / "host.py").write_text(HOST)
    command = [sys.executable, "-m", "celery", "-A", "host", "worker", "-P", "prefork", "-c", "2", "--without-gossip", "--without-mingle"]
    with (place / "log").open("wb") as log, subprocess.Popen(command, cwd=place, env=environ, stdout=log, stderr=log) as process:
        try:
            yield
        finally:
            process.terminate()
            assert process.wait(LONG_S) == 0


def test_it_works_in_a_prefork_worker_of_another_celery_application(database_url, redis_url, tmp_path):
    broker = urlsplit(redis_url)._replace(path="/1").geturl()
    root = str(Path(__file__).parents[1])
    theirs = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "REDIS_URL")}
    environ = theirs | {"HOST_BROKER": broker, "HOST_LEDGER": database_url, "HOST_QUEUES": redis_url, "PYTHONPATH": root}
    with Celery("caller", broker=broker, backend=broker, set_as_current=False) as caller, host_worker(tmp_path, environ):
        sent = [caller.send_task("host.hand_in", [f"ticket {n}"]) for n in range(10)]
        found = [one.get(timeout=LONG_S) for one in sent]
    assert {state for _, state in found} == {"queued"}
    with Redis.from_url(redis_url) as redis:
        messages = b"".join(redis.lrange(queue_name(Lane.INTERACTIVE), 0, -1))
    assert len({job_id for job_id, _ in found}) == 10
    assert all(job_id.encode() in messages for job_id, _ in found)


def test_an_interpreter_that_ends_with_a_client_open_neither_hangs_nor_warns(database_url, redis_url):
    assert len(python("from worker.producer import Backstop; c = Backstop(); print(c.enqueue('x').job_id)", database_url, redis_url)) == 1


def test_importing_it_leaves_the_host_as_it_is(database_url, redis_url):
    source = """if True:
    import logging, signal, sys, threading
    from celery import Celery, current_app
    from kombu.transport import TRANSPORT_ALIASES
    host = Celery("host", broker="memory://")
    host.set_current()
    before = dict(TRANSPORT_ALIASES), signal.getsignal(signal.SIGTERM), logging.root.handlers[:], threading.active_count()
    from worker.producer import Backstop
    Backstop()
    after = dict(TRANSPORT_ALIASES), signal.getsignal(signal.SIGTERM), logging.root.handlers[:], threading.active_count()
    assert before == after
    with Backstop() as client:
        client.enqueue("x")
    assert current_app.main == "host" and "worker.app" not in sys.modules
    print("ok")
    """
    assert python(source, database_url, redis_url) == ["ok"]


@pytest.fixture
def vendors():
    """One that answers and one that never does, as a configuration file would name them."""
    loop, simulator = LoopThread(), Simulator(script.parse(SCRIPT, "script"))
    loop.submit(simulator.__aenter__()).result()
    yield simulator
    loop.submit(simulator.__aexit__()).result()
    loop.stop()


def configured(simulator, place):
    lines = [
        f'[providers.{name}]\nbase_url = "{simulator.base_url(name)}"\nmodel = "{name}"\nmax_retries = 0\n' for name in ("good", "bad")
    ]
    file = place / "backstop.toml"
    file.write_text("".join(lines) + '[chains.default]\nproviders = ["bad", "good"]\n')
    return file


def test_a_chat_is_answered_in_this_process_and_is_on_the_books(database_url, redis_url, vendors, tmp_path):
    with Backstop(database_url=database_url, redis_url=redis_url, config=configured(vendors, tmp_path), data=tmp_path) as here:
        view = here.chat("hello", max_tokens=5, timeout_s=LONG_S)
        assert (view.state, view.answer.provider, view.calls) == (JobState.SUCCEEDED, "good", 2)
        with Redis.from_url(redis_url) as redis:
            assert redis.llen(queue_name(Lane.INTERACTIVE)) == 0

        async def story(db):
            assert [row.lanes for row in await rows(db, "SELECT lanes FROM workers WHERE state = 'live'")] == [""]
            assert [row.outcome for row in await rows(db, "SELECT outcome FROM provider_calls ORDER BY id")] == ["server_error", "answered"]

        play(database_url, story)

    async def gone(db):
        assert [row.state for row in await rows(db, "SELECT state FROM workers")] == ["gone"]

    play(database_url, gone)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_interpreter_that_ends_after_a_chat_is_no_worker_any_more(database_url, redis_url, vendors, tmp_path, host):
    source = f"""if True:
    from worker.producer import Backstop
    print(Backstop(config={str(configured(vendors, tmp_path))!r}, data={str(tmp_path)!r}).chat("hello").state)
    """
    named = database_url.replace("127.0.0.1", host)
    assert python(source, named, redis_url)[-1] == "succeeded"

    async def gone(db):
        assert [row.state for row in await rows(db, "SELECT state FROM workers")] == ["gone"]

    play(database_url, gone)


def test_a_chat_that_nobody_answers_in_time_is_an_expired_job(database_url, redis_url, vendors, tmp_path):
    with Backstop(database_url=database_url, redis_url=redis_url, config=configured(vendors, tmp_path), data=tmp_path) as here:
        assert here.chat("hello", chain="bad", timeout_s=0.5).state is JobState.EXPIRED


def test_results_of_a_batch_that_is_still_being_submitted_wait_for_its_rows(client, database_url):
    begun, go_on = threading.Event(), threading.Event()

    def requests():
        begun.set()
        assert go_on.wait(LONG_S)
        yield "late"

    loader = threading.Thread(target=lambda: client.enqueue_many(requests(), batch="slow"))
    loader.start()
    assert begun.wait(LONG_S)
    results = client.results("slow", timeout_s=LONG_S)
    with pytest.raises(WaitTimedOut, match="still being submitted"):
        next(client.results("slow", timeout_s=0))
    go_on.set()
    loader.join(LONG_S)
    (job_id,) = ids_of(database_url, client.enqueue_many(["late"], batch="slow"))
    answer(database_url, job_id)
    assert [row.job_id for row in results] == [job_id]


@pytest.mark.parametrize("rows", ["abc", {"messages": []}, 7, None])
def test_one_request_is_no_iterable_of_requests(client, rows):
    with pytest.raises(UsageError, match="rows: expected an iterable"):
        client.enqueue_many(rows)
