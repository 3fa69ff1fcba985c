"""The worker beside which Backstop is measured: Celery prefork as most teams write it.

One task a job, the prompt in the message, `httpx.post`, one ORM session, one result row and one cost row; Celery's
defaults. No fence, no breaker, no second provider: it does less than Backstop. With `USUAL_SHARED_CLIENT=1` each
process keeps one httpx client, which is what a team finds out after its first profile.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from typing import Any

import httpx
from celery import Celery
from sqlalchemy import Engine, Numeric, create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

app = Celery("usual", broker=os.environ["USUAL_REDIS_URL"])
app.conf.task_ignore_result = True
URL = f"{os.environ['STUB_URL']}/chat/completions"


class Table(DeclarativeBase):
    pass


class Result(Table):
    __tablename__ = "usual_results"
    id: Mapped[int] = mapped_column(primary_key=True)
    ticket: Mapped[int]
    answer: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC).replace(tzinfo=None))


class Cost(Table):
    __tablename__ = "usual_costs"
    id: Mapped[int] = mapped_column(primary_key=True)
    ticket: Mapped[int]
    model: Mapped[str]
    input_tokens: Mapped[int]
    output_tokens: Mapped[int]
    cost_usd: Mapped[Decimal] = mapped_column(Numeric(20, 12))


@cache  # after the fork: one for each process
def engine() -> Engine:
    return create_engine(os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+psycopg:"))


@cache
def _client() -> httpx.Client:
    return httpx.Client(timeout=30)


def _post(body: dict[str, Any]) -> httpx.Response:
    headers = {"Authorization": "Bearer stub"}
    if os.environ.get("USUAL_SHARED_CLIENT"):
        return _client().post(URL, json=body, headers=headers)
    return httpx.post(URL, json=body, headers=headers, timeout=30)


@app.task(autoretry_for=(httpx.HTTPError,), retry_backoff=True, max_retries=3)
def answer(ticket: int, prompt: str) -> None:
    response = _post({"model": "stub", "messages": [{"role": "user", "content": prompt}]})
    response.raise_for_status()
    reply = response.json()
    usage = reply["usage"]
    used = usage["prompt_tokens"], usage["completion_tokens"]
    cost = (used[0] * Decimal("0.28") + used[1] * Decimal("0.42")) / 1_000_000
    with Session(engine()) as session:
        session.add(Result(ticket=ticket, answer=reply["choices"][0]["message"]["content"]))
        session.add(Cost(ticket=ticket, model=reply["model"], input_tokens=used[0], output_tokens=used[1], cost_usd=cost))
        session.commit()


def create_tables() -> None:
    Table.metadata.create_all(engine())


def answered() -> int:
    """How many tickets have a result and a cost."""
    with Session(engine()) as session:
        return min(session.scalar(select(func.count()).select_from(table)) or 0 for table in (Result, Cost))
