"""The Celery application: broker, queues, delivery rules. `celery -A worker.app worker` finds it here.

Celery wakes workers and shows itself in Flower; it owns nothing. Messages are acknowledged when they are fetched and carry
ids only: the ledger knows what is ready, what is late and what was lost, so nothing here is retried, scheduled or stored.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from typing import Any

from celery import Celery
from kombu import Exchange, Queue

from worker.dispatch import queue_name
from worker.embedded.attach import attached
from worker.errors import BackstopError
from worker.job import Lane
from worker.settings import Settings, read_settings
from worker.transport import TIDY

# Messages only wake workers, so every rule here is for being woken soon and by few.
DELIVERY: dict[str, Any] = {
    "task_serializer": "json",
    "accept_content": ["json"],
    "task_ignore_result": True,
    "task_store_errors_even_if_ignored": False,
    # Late acknowledgement on Redis loses messages under SIGKILL and runs paid calls twice after a connection blip.
    "task_acks_late": False,
    "worker_disable_prefetch": True,
    "worker_prefetch_multiplier": 1,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "worker_soft_shutdown_timeout": 0,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "broker_channel_error_retry": True,  # without it a full or read-only Redis ends the worker
    "broker_connection_timeout": 4,
    "broker_pool_limit": 10,
    "broker_transport_options": {
        "visibility_timeout": 900,
        "socket_timeout": 3,  # whoever publishes to a Redis that is frozen goes on after that
        "socket_connect_timeout": 3,
        "socket_keepalive": True,
        "health_check_interval": 10,
        "queue_order_strategy": "sorted",  # names sort by rank: the interactive lane is served first
    },
    "task_queues": [Queue(name, Exchange(name), routing_key=name) for name in map(queue_name, Lane)],
    "task_default_queue": queue_name(Lane.BULK),
    "task_create_missing_queues": False,
}


def _configuration() -> dict[str, Any]:
    """Read when Celery first needs it, not at import. Ends a process that has no broker with one line."""
    try:
        settings = attached(read_settings())
    except BackstopError as error:
        print(f"backstop: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    return DELIVERY | {
        "broker_url": settings.redis_url,
        "imports": ["worker.tasks"],
        "worker_pool": "threads",
        "worker_concurrency": threads(settings),
        "worker_send_task_events": True,  # for Flower
        "task_send_sent_event": False,
        "worker_hijack_root_logger": False,
        "beat_schedule": {"tidy": {"task": TIDY, "schedule": 3600.0}},
        "beat_schedule_filename": str(settings.data / "beat-schedule"),
    }


def threads(settings: Settings, lanes: Collection[Lane] = tuple(Lane)) -> int:
    """A thread for each interactive job, and for each bulk message: those that run and as many that wait for slots."""
    bulk = 2 * math.ceil(settings.bulk_slots / settings.pack_size)
    return (settings.interactive_slots if Lane.INTERACTIVE in lanes else 0) + (bulk if Lane.BULK in lanes else 0)


app = Celery("backstop", set_as_current=False)  # who produces jobs may have a Celery of its own
app.add_defaults(_configuration)
