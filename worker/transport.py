"""What goes into the queues, by a `Bell`, and what comes out of them.

Whoever reaches Redis can put anything there, so our own words are read out of a message and made into a new one; all else
stays outside of Celery, which would log it whole, or end the worker over it.

A message that is refused is lost and costs nothing but time: the ledger knows its jobs and publishes them again.
"""

from __future__ import annotations

import binascii
import json
import re
import time
from base64 import b64decode
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID, uuid4

import redis
import structlog
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport.redis import Channel, Transport
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.dispatch import queue_name
from worker.job import Lane

TASK = "backstop.run_jobs"
TIDY = "backstop.tidy"
MOST_BYTES = 64 * 1024  # of a message; the largest of ours has an eighth of that
MOST_JOBS = 100  # in one message, as `Settings.pack_size`

QUIET_S = 1.0  # for so long a Redis that failed is not rung
PROBE_S = 4.0  # longer than one attempt takes, to connect and to wait

log = structlog.get_logger(__name__)
_QUEUES = frozenset(map(queue_name, Lane))
_NAME = re.compile(r"[A-Za-z0-9_.]{1,80}")


class Bell:
    """Puts messages on the queues, from any thread. Connects when first rung, anew in a child after a fork, answers or fails fast, and
    never tries again by itself. Raises ValueError when the URL is none of a Redis.

    A Redis that failed is left alone for a second, and then rung by one at a time until it answers: to wait for a silent one costs
    each who waits 2 s of a thread, and the leader publishes what was not rung for.
    """

    def __init__(self, url: str) -> None:
        self._redis = redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0))
        self._failed = False
        self._quiet_until = 0.0

    def publish(self, lane: Lane, delivery_id: UUID, job_ids: Sequence[UUID]) -> None:
        """One message is on the lane's queue, in a single command. Raises RedisError when it is not known to have arrived."""
        # Not by Celery's own producer: its application has one broker in a process, that of the environment, while a host may give
        # several in code. A worker makes every message anew in these words anyway, and one so written costs a third of the time.
        now, queue = time.monotonic(), queue_name(lane)
        if now < self._quiet_until:
            raise redis.ConnectionError("Redis did not answer a moment ago")
        if self._failed:
            self._quiet_until = now + PROBE_S
        try:
            self._redis.lpush(queue, message_of(queue, TASK, str(delivery_id), {"job_ids": [str(job_id) for job_id in job_ids]}))
        except BaseException:
            self._failed, self._quiet_until = True, time.monotonic() + QUIET_S
            raise
        self._failed, self._quiet_until = False, 0.0

    def close(self) -> None:
        self._redis.close()


def install() -> None:
    """Whoever in this process opens a redis:// or rediss:// broker gets only messages of ours out of our queues."""
    TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:GuardedTransport"))


class GuardedChannel(Channel):
    """Screens what BRPOP brings, before kombu reads it."""

    # A message is a hint, and the ledger publishes again what was in it. To give it back over a connection that broke, kombu asks a
    # transport that may be gone, and the worker ends over it.
    do_restore = False

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        """A message whose connection was lost since is gone with it; Celery would end the worker over its ack."""
        if not self.closed:
            super().basic_ack(delivery_tag, multiple=multiple)

    def _create_client(self, asynchronous: bool = False) -> Any:
        client = super()._create_client(asynchronous)  # type: ignore[misc] # kombu-stubs leave it out
        client.set_response_callback("BRPOP", screened)
        return client


class GuardedTransport(Transport):
    Channel = GuardedChannel


def screened(popped: tuple[bytes, bytes] | None, **_: Any) -> tuple[bytes, bytes] | None:
    """Queue and message, or None as when nothing came: then the log says in one line why, and nothing of what it held."""
    if not popped:
        return None
    key, raw = popped
    queue = key.split(b"\x06\x16")[0].decode("utf-8", "replace")  # what follows is kombu's priority
    if queue not in _QUEUES:
        return key, raw
    try:
        return key, _ours(queue, raw)
    except ValueError as error:
        log.warning("message_refused", queue=queue, bytes=len(raw), why=str(error))
        return None


def _ours(queue: str, raw: bytes) -> bytes:
    """The message anew, from the words in it that are ours. Raises ValueError, which shows nothing of it."""
    if len(raw) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES} bytes")
    message = _object(_decoded(raw, "message"), "message")
    headers, properties = _object(message.get("headers"), "headers"), _object(message.get("properties"), "properties")
    task = headers.get("task")
    if task not in (TASK, TIDY):
        named = isinstance(task, str) and _NAME.fullmatch(task)
        raise ValueError(f"task {task} is not known to this version" if named else "no name of a task")
    if message.get("content-type") != "application/json" or headers.get("compression"):
        raise ValueError("body: expected plain JSON")
    delivery_id = _uuid(headers.get("id"), "id")
    kwargs = _kwargs(task, _body(message.get("body"), properties.get("body_encoding")))
    return message_of(queue, task, delivery_id, kwargs)


def _body(body: Any, encoding: Any) -> Any:
    if not isinstance(body, str):
        raise ValueError("body: expected a text")
    try:
        return _decoded(b64decode(body, validate=True) if encoding == "base64" else body, "body")
    except binascii.Error:
        raise ValueError("body: not base64") from None


def _kwargs(task: str, body: Any) -> dict[str, list[str]]:
    """The arguments of the task. Other ones are another version's, and not guessed at."""
    if not isinstance(body, list) or len(body) != 3 or body[0] != [] or not isinstance(body[1], dict):
        raise ValueError("body: expected keyword arguments")
    if body[1].keys() != ({"job_ids"} if task == TASK else set()):
        raise ValueError(f"{task} is called with arguments that this version does not know")
    if task == TIDY:
        return {}
    job_ids = body[1]["job_ids"]
    if not isinstance(job_ids, list) or not 1 <= len(job_ids) <= MOST_JOBS:
        raise ValueError(f"job_ids: expected 1 to {MOST_JOBS} ids")
    return {"job_ids": [_uuid(job_id, "job_ids") for job_id in job_ids]}


def message_of(queue: str, task: str, delivery_id: str, kwargs: Mapping[str, Any]) -> bytes:
    """As Celery's own producer writes it (protocol 2), without anything that schedules, limits, chains or compresses."""
    message = {
        "body": json.dumps([[], kwargs, {}]),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": task, "id": delivery_id, "argsrepr": "()", "kwargsrepr": repr(kwargs)[:1024]},
        "properties": {
            "correlation_id": delivery_id,
            "delivery_info": {"exchange": queue, "routing_key": queue},
            "delivery_tag": str(uuid4()),
            "priority": 0,
        },
    }
    return json.dumps(message).encode()


def _decoded(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: not JSON") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object")
    return value


def _uuid(value: Any, where: str) -> str:
    try:
        return str(UUID(value))
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{where}: expected UUIDs") from None
