"""The Celery tasks, and the bootstep that gives every worker process its loop. Thin: Celery ends here."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any
from uuid import UUID

import structlog
from celery import Task, bootsteps
from celery.signals import setup_logging
from celery.worker.control import control_command
from sqlalchemy.exc import DBAPIError

from worker import events
from worker.app import app
from worker.database import unreachable
from worker.dispatch import queue_name
from worker.errors import BackstopError
from worker.job import Lane
from worker.loop import LoopThread
from worker.settings import read_settings
from worker.transport import TASK, TIDY, install
from worker.wiring import WorkerProcess

install()  # in workers alone: who produces jobs may have a broker of its own

log = structlog.get_logger(__name__)
_LANES = {queue_name(lane): lane for lane in Lane}
BLOCKED_S = 30.0  # its jobs are long with others: a loop that is held up for so long is not waited for
BULK_NICENESS = 10  # where cores are short, a worker of the bulk lane alone leaves them to those that people wait for


class Process(bootsteps.StartStopStep):
    """Starts after the pool and before the consumer, there when the first message comes; drains before the pool stops."""

    requires = ("celery.worker.components:Pool",)
    loop: LoopThread
    process: WorkerProcess

    def start(self, parent: Any) -> None:
        lanes = [_LANES[name] for name in parent.app.amqp.queues.consume_from if name in _LANES]
        if lanes == [Lane.BULK]:
            os.nice(BULK_NICENESS)  # threads started from here on inherit it
        Process.loop = LoopThread()
        try:
            Process.process = Process.loop.submit(WorkerProcess.open(read_settings(), lanes)).result()
        except (BackstopError, DBAPIError) as error:
            fault = unreachable(error) if isinstance(error, DBAPIError) else error
            log.critical("not_started", why=str(fault))
            raise SystemExit(fault.exit_code) from None  # Celery would show a trace of anything else
        Process.loop.watch(BLOCKED_S, _give_up)
        gc.freeze()  # what is there now stays: each full collection went through it, a pause of 80 ms

    def stop(self, parent: Any) -> None:
        if hasattr(Process, "process"):  # it did start
            Process.loop.submit(Process.process.drain()).result()
        Process.loop.stop()


def _give_up(place: str) -> None:
    """At once, as if it had been killed: what holds up the loop would hold up every orderly end. Whoever runs it starts it again."""
    log.critical("loop_blocked", seconds=BLOCKED_S, at=place)
    os._exit(70)


app.steps["worker"].add(Process)


@app.task(name=TASK, bind=True)
def run_jobs(self: Task[Any, Any], job_ids: Sequence[str]) -> Mapping[str, int]:
    """Attempts all jobs of the message once; Flower shows how many ended in which state."""
    lane = _LANES[str((self.request.delivery_info or {}).get("routing_key"))]
    pack = Process.process.attempts.run_pack(UUID(self.request.id), [UUID(job_id) for job_id in job_ids], lane)
    try:
        return Process.loop.submit(pack).result()
    except CancelledError:  # the process ends; what became of the jobs is spooled, or rescued
        return {}


@app.task(name=TIDY)
def tidy() -> int:
    """Beat's: rows of workers that ended long ago are gone."""
    return Process.loop.submit(Process.process.tidy()).result()


@control_command(variadic="task_id", signature="[id1 [id2 [... [idN]]]]")
def revoke(state: Any, task_id: str | Sequence[str], **_: Any) -> Mapping[str, str]:
    """Cancels the jobs of these messages, running or not: only forgotten by Celery, the ledger would publish them again."""
    try:
        deliveries = [UUID(name) for name in ([task_id] if isinstance(task_id, str) else task_id)]
    except ValueError:
        return {"error": "expected ids as Flower shows them"}
    for delivery in deliveries:
        Process.loop.submit(Process.process.cancel_delivery(delivery)).result(10)
    return {"ok": f"jobs of {len(deliveries)} messages cancelled"}


@setup_logging.connect
def _logging(**_: Any) -> None:
    events.configure(read_settings())
