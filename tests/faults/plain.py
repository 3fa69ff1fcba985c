"""A Celery worker as tutorials write it, with all that they advise against lost tasks: `celery -A plain worker`.

It acknowledges late, gives back what a lost child held, fetches one message for each slot, and tries again after any error.
"""

from __future__ import annotations

import os
from functools import cache

import httpx
from celery import Celery
from sqlalchemy import Engine, create_engine, text

VISIBILITY_S = 8

app = Celery("plain", broker=os.environ.get("PLAIN_REDIS_URL", ""))
app.conf.update(
    task_ignore_result=True,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    broker_transport_options={"visibility_timeout": VISIBILITY_S},
    broker_connection_retry_on_startup=True,
    worker_cancel_long_running_tasks_on_connection_loss=True,
)

TABLE = "CREATE TABLE plain_results (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, ticket text NOT NULL, answer text NOT NULL)"


@cache  # after the fork: one for each process
def engine() -> Engine:
    url = os.environ["PLAIN_DATABASE_URL"].replace("postgresql:", "postgresql+psycopg:")
    return create_engine(url, pool_pre_ping=True, pool_size=20)


@app.task(name="plain.answer", autoretry_for=(Exception,), retry_backoff=True, max_retries=3)
def answer(ticket: str) -> None:
    body = {"model": "sim", "messages": [{"role": "user", "content": ticket}]}
    reply = httpx.post(f"{os.environ['PLAIN_VENDOR']}/chat/completions", json=body, timeout=30)
    reply.raise_for_status()
    row = {"ticket": ticket, "answer": reply.json()["choices"][0]["message"]["content"]}
    with engine().begin() as connection:
        connection.execute(text("INSERT INTO plain_results (ticket, answer) VALUES (:ticket, :answer)"), row)
