"""One HTTP request to a provider, as the books keep it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from worker.cost import Pricing, Usage
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
