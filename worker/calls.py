"""One HTTP request to a provider, as the books keep it: opened before it leaves, booked when it has ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.exc import DataError
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.cost import Pricing, Usage
from worker.database import jsonb, run
from worker.job import Answer
from worker.providers.provider import Reply
from worker.signals import POLICIES, Billing, Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A finished call: who was asked, how it ended, what it used. `cost_usd` None is unknown, never zero."""

    id: UUID
    provider: str
    model: str
    started_at: datetime
    ended_at: datetime
    latency_ms: int
    signal: Signal
    http_status: int | None
    error_code: str | None
    usage: Usage
    billing: Billing
    cost_usd: Decimal | None
    price_source: str | None
    answer: Answer | None

    def to_json(self) -> dict[str, Any]:
        """By the columns of `provider_calls`, without the answer."""
        return {
            "id": str(self.id),
            "started_at": self.started_at.isoformat(),
            "ended_at": self.ended_at.isoformat(),
            "latency_ms": self.latency_ms,
            "outcome": self.signal.value,
            "http_status": self.http_status,
            "error_code": self.error_code,
            **self.usage.to_json(),
            "billing": self.billing.value,
            "cost_usd": None if self.cost_usd is None else str(self.cost_usd),
            "price_source": self.price_source,
        }


class Stopwatch:
    """Started before a request leaves; `book` makes the finished call of it."""

    def __init__(self, call_id: UUID, provider: str, model: str) -> None:
        self.call_id = call_id
        self._provider = provider
        self._model = model
        self._started_at = datetime.now(UTC)
        self._started_s = time.monotonic()

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def book(self, reply: Reply, pricing: Pricing) -> Call:
        billing = POLICIES[reply.signal].billing
        if reply.usage is not None and reply.usage.output_tokens:
            billing = Billing.BILLED
        return Call(
            id=self.call_id,
            provider=self._provider,
            model=self._model,
            started_at=self._started_at,
            ended_at=datetime.now(UTC),
            latency_ms=round(self.elapsed_s() * 1000),
            signal=reply.signal,
            http_status=reply.http_status,
            error_code=reply.error_code,
            usage=reply.usage or Usage(),
            billing=billing,
            cost_usd=_cost(billing, reply, pricing),
            price_source=pricing.source if billing is Billing.BILLED else None,
            answer=reply.answer,
        )


def _cost(billing: Billing, reply: Reply, pricing: Pricing) -> Decimal | None:
    match billing:
        case Billing.FREE:
            return Decimal(0)
        case Billing.BILLED:
            return pricing.cost(reply.usage)
        case Billing.UNKNOWN:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCall:
    """A call about to be made, and those before it in the same attempt, which have `ended`."""

    id: UUID
    job_id: UUID
    fence: int
    provider: str
    model: str
    ended: tuple[Call, ...] = ()


# How a call ended, as a record of JSON and as what is written to its row.
ENDED = """
    id uuid, job_id uuid, fence bigint, started_at timestamptz, ended_at timestamptz, latency_ms int, outcome text, http_status int,
    error_code text, input_tokens int, output_tokens int, cached_tokens int, reasoning_tokens int, estimated bool, billing text,
    cost_usd numeric, price_source text, answer jsonb, settled bool"""
BOOK = """
    started_at = c.started_at, ended_at = c.ended_at, latency_ms = c.latency_ms, outcome = c.outcome, http_status = c.http_status,
    error_code = c.error_code, input_tokens = c.input_tokens, output_tokens = c.output_tokens, cached_tokens = c.cached_tokens,
    reasoning_tokens = c.reasoning_tokens, estimated = coalesce(c.estimated, false), billing = c.billing, cost_usd = c.cost_usd,
    price_source = c.price_source"""


_OPEN = text(f"""
WITH call AS (
    SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:job_ids AS uuid[]), CAST(:fences AS bigint[]),
        CAST(:providers AS text[]), CAST(:models AS text[])) AS t(id, job_id, fence, provider, model)
), ours AS (  -- what is locked is being settled, rescued or cancelled
    SELECT j.id FROM jobs j JOIN call c ON c.job_id = j.id AND c.fence = j.fence
    WHERE j.id = ANY(CAST(:job_ids AS uuid[])) AND j.state = 'running' ORDER BY j.id FOR SHARE OF j SKIP LOCKED
), opened AS (
    INSERT INTO provider_calls (id, job_id, fence, provider, model)
    SELECT c.id, c.job_id, c.fence, c.provider, c.model FROM call c JOIN ours o ON o.id = c.job_id
    ON CONFLICT (id) DO NOTHING
), booked AS (
    UPDATE provider_calls p SET {BOOK} FROM json_to_recordset(CAST(:ended AS json)) AS c({ENDED})
    WHERE p.id = ANY(CAST(:ended_ids AS uuid[])) AND p.id = c.id AND p.outcome IS NULL
)
SELECT c.id FROM call c JOIN ours o ON o.id = c.job_id
""")


async def open_calls(db: AsyncEngine, calls: Sequence[NewCall]) -> Sequence[bool]:
    """The calls are on the books, billing unknown, before their requests leave. False for each whose fence holds no more.

    On the way those are booked that ended before: who goes on from here after a crash knows what the others said.
    """
    ended = [(new, call) for new in calls for call in new.ended]
    try:
        return await _open_calls(db, calls, ended)
    except DataError:
        return await _open_calls(db, calls, [])  # figures that do not fit are settled with their job


async def _open_calls(db: AsyncEngine, calls: Sequence[NewCall], ended: Sequence[tuple[NewCall, Call]]) -> list[bool]:
    rows = await run(
        db,
        _OPEN,
        ids=[call.id for call in calls],
        job_ids=[call.job_id for call in calls],
        fences=[call.fence for call in calls],
        providers=[call.provider for call in calls],
        models=[call.model for call in calls],
        ended=jsonb([{**call.to_json(), "job_id": str(new.job_id), "fence": new.fence} for new, call in ended]),
        ended_ids=[call.id for _, call in ended],
    )
    opened = {row.id for row in rows}
    return [call.id in opened for call in calls]
