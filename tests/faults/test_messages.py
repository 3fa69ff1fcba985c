"""Anything may be put into the queues: a real worker refuses it in one line and goes on, and who asked is answered."""

import base64
import json
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager
from uuid import uuid4

import pytest
from celery import Celery
from redis import Redis
from stage import HELLO, a_job, job, play, rows, until

from worker.dispatch import queue_name
from worker.job import Lane
from worker.simulator.script import parse
from worker.simulator.server import Simulator
from worker.submit import NewJob, submit
from worker.transport import MOST_JOBS, TASK, TIDY

PROMPT = "my secret prompt"
CONFIG = """
[providers.first]
base_url = "{url}"
model = "sim"
[chains.default]
providers = ["first"]
"""


def an_envelope(**changes):
    """A message as Celery's producer writes it, but for what is changed in it: parts by their names, `None` leaves one out."""
    body = changes.pop("body", [[], {"job_ids": [str(uuid4())]}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    headers = {"lang": "py", "task": TASK, "id": str(uuid4()), "eta": None, "expires": None, "retries": 0, "timelimit": [None, None],
               "argsrepr": "()", "kwargsrepr": PROMPT, "origin": "here", "ignore_result": True, "stamps": {}}  # fmt: skip
    tag, info = str(uuid4()), {"exchange": "anywhere", "routing_key": "anywhere"}
    properties = {"correlation_id": str(uuid4()), "delivery_mode": 2, "delivery_info": info, "priority": 0, "body_encoding": "base64",
                  "delivery_tag": tag}  # fmt: skip
    encoded = body if isinstance(body, str) else base64.b64encode(json.dumps(body).encode()).decode()
    message = {"body": encoded, "content-encoding": "utf-8", "content-type": "application/json", "headers": headers,
               "properties": properties} | changes.pop("outer", {})  # fmt: skip
    if isinstance(message["headers"], dict):
        message["headers"] |= changes
    return json.dumps({name: value for name, value in message.items() if value is not None})


def called(*args, **kwargs):
    return an_envelope(body=[list(args), kwargs, {}])


PICKLED = base64.b64encode(pickle.dumps(([], {"job_ids": [PROMPT]}, {}))).decode()
UNKNOWN = "is called with arguments that this version does not know"
# Why it is refused, and the message.
REFUSED = [
    ("message: not JSON", f"{{{PROMPT}"),  # no JSON
    ("message: not JSON", b"\xff\xfe\x00\x80"),  # no text
    ("message: not JSON", b""),  # nothing
    ("message: not JSON", "7" * 10_000),  # a number of 10,000 digits
    ("message: not JSON", "[" * 20_000 + "]" * 20_000),  # nested 20,000 levels deep
    ("message: expected an object", "7"),  # a number
    ("message: expected an object", "[1, 2]"),  # a list
    ("headers: expected an object", json.dumps({"__type__": "datetime", "__value__": 7})),  # a type that kombu would make
    ("headers: expected an object", json.dumps({"prompt": PROMPT})),  # no Celery envelope
    ("headers: expected an object", an_envelope(outer={"headers": None})),  # no headers
    ("headers: expected an object", an_envelope(outer={"headers": PROMPT})),  # headers that are a text
    ("headers: expected an object", an_envelope(outer={"headers": [PROMPT]})),  # headers that are a list
    ("properties: expected an object", an_envelope(outer={"properties": None})),  # no properties
    ("body: expected a text", an_envelope(outer={"body": None})),  # no body
    ("no name of a task", an_envelope(outer={"headers": {}}, body={"task": TASK, "id": "7", "kwargs": {}})),  # an older protocol
    ("no name of a task", an_envelope(task=PROMPT)),  # a task with no name
    ("no name of a task", an_envelope(task=[PROMPT])),  # a task that is a list
    ("task backstop.run_jobs_v9 is not known to this version", an_envelope(task="backstop.run_jobs_v9")),  # an unknown task
    ("task celery.group is not known to this version", an_envelope(task="celery.group")),  # one of Celery's own
    ("id: expected UUIDs", an_envelope(id=PROMPT)),  # an id that is no UUID
    ("id: expected UUIDs", an_envelope(id=[PROMPT])),  # an id that is a list
    ("id: expected UUIDs", an_envelope(id=None)),  # no id
    ("body: expected plain JSON", an_envelope(compression="bzip2")),  # compressed
    ("body: expected plain JSON", an_envelope(body=PICKLED, outer={"content-type": "application/x-python-serialize"})),  # pickle
    ("body: not JSON", an_envelope(body=PICKLED)),  # pickle that says it is JSON
    ("body: not JSON", an_envelope(body=base64.b64encode(PROMPT.encode()).decode())),  # a body that is no JSON
    ("body: not base64", an_envelope(body="%%%" + PROMPT)),  # base64 that is none
    ("body: expected keyword arguments", an_envelope(body=base64.b64encode(json.dumps(PROMPT).encode()).decode())),  # a body that is a text
    ("body: expected keyword arguments", called([str(uuid4())])),  # positional arguments
    (f"{TASK} {UNKNOWN}", called()),  # no arguments
    (f"{TASK} {UNKNOWN}", called(job_ids=[str(uuid4())], priority=PROMPT)),  # arguments of a newer version
    ("job_ids: expected UUIDs", called(job_ids=[PROMPT])),  # ids that are no UUIDs
    ("job_ids: expected UUIDs", called(job_ids=[7])),  # ids that are numbers
    ("job_ids: expected 1 to 100 ids", called(job_ids=PROMPT)),  # ids that are one text
    ("job_ids: expected 1 to 100 ids", called(job_ids=[])),  # no ids
    ("job_ids: expected 1 to 100 ids", called(job_ids=[str(uuid4()) for _ in range(MOST_JOBS + 1)])),  # more ids than a pack
    ("more than 65536 bytes", called(job_ids=[str(uuid4())] * 100_000)),  # 100,000 ids
    ("more than 65536 bytes", PROMPT * (50 * 2**20 // len(PROMPT))),  # 50 MB
    (f"{TIDY} {UNKNOWN}", an_envelope(task=TIDY, body=[[], {"prompt": PROMPT}, {}])),
]
HARMLESS = {
    "ids of jobs that do not exist": an_envelope(),
    "as many as a pack": called(job_ids=[str(uuid4()) for _ in range(MOST_JOBS)]),
    "one that Celery would put off for years": an_envelope(eta="2999-01-01T00:00:00+00:00"),
    "one with times, stamps and callbacks that are none": an_envelope(
        expires=[PROMPT], timelimit=PROMPT, shadow=[PROMPT], stamps=7, group={}, body=[[], {"job_ids": [str(uuid4())]}, {"chord": PROMPT}]
    ),
    "tidy": an_envelope(task=TIDY, body=[[], {}, {}]),
}


@pytest.fixture
def environment(database_url, redis_url, tmp_path):
    return os.environ | {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "BACKSTOP_CONFIG": str(tmp_path / "backstop.toml"),
        "BACKSTOP_DATA": str(tmp_path),
        "BACKSTOP_HEARTBEAT_S": "0.2",
        "BACKSTOP_HEARTBEAT_TTL_S": "3",
        "BACKSTOP_BULK_SLOTS": "30",
    }


@contextmanager
def a_worker(environment, log):
    with log.open("wb") as out:
        command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "--without-gossip", "--without-mingle"]
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def test_a_worker_refuses_what_is_no_message_of_ours_in_one_line_and_answers_who_asked(database_url, redis_url, environment, tmp_path):
    log = tmp_path / "worker.log"

    async def answered(db, courier, lane):
        def publish(lane, delivery_id, job_ids):
            ids = {"job_ids": [str(job_id) for job_id in job_ids]}
            courier.send_task(TASK, kwargs=ids, task_id=str(delivery_id), queue=queue_name(lane))

        if lane is Lane.INTERACTIVE:
            job_id = (await submit(db, publish, NewJob(request=HELLO, lane=lane))).job_id
        else:
            job_id = await a_job(db, lane=lane)  # the leader publishes it
        await until(db, "SELECT FROM jobs WHERE id = :id AND state = 'succeeded'", id=job_id)
        assert (await job(db, job_id)).fence == 1

    async def story(db):
        async with Simulator(parse({"providers": {"first": {"model": "sim"}}}, "test")) as simulator:
            (tmp_path / "backstop.toml").write_text(CONFIG.format(url=simulator.base_url("first")))
            with (
                a_worker(environment, log) as worker,
                Redis.from_url(redis_url) as redis,
                Celery("courier", broker=redis_url, set_as_current=False) as courier,
            ):
                await until(db, "SELECT FROM workers WHERE state = 'live'")
                for lane in Lane:
                    await answered(db, courier, lane)
                    for message in [*(message for _, message in REFUSED), *HARMLESS.values()]:
                        redis.lpush(queue_name(lane), message)
                    await answered(db, courier, lane)
                # The interactive lane goes first: what was put into the other one is read to its end before this one is.
                for lane in reversed(Lane):
                    await answered(db, courier, lane)
                assert worker.poll() is None
                assert [row.pid for row in await rows(db, "SELECT pid FROM workers")] == [worker.pid]
                assert [redis.llen(queue_name(lane)) for lane in Lane] == [0, 0]
            assert len(simulator.bill) == 6

    play(database_url, story)
    words = log.read_text()
    refusals = [json.loads(line) for line in words.splitlines() if "message_refused" in line]
    assert [(line["queue"], line["why"]) for line in refusals] == [(queue_name(lane), why) for lane in Lane for why, _ in REFUSED]
    assert "Traceback" not in words
    assert PROMPT not in words
