"""What reads give back: jobs, calls, batches and figures as people see them.

Money is None where it is not known, never zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any
from uuid import UUID

from worker.job import TERMINAL, Answer, JobState, Lane


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A job as people see it. `cost_usd` sums its calls but for `unknown_calls` possibly billed at a cost not known."""

    id: UUID
    tenant: str
    state: JobState
    lane: Lane
    chain: str
    batch_id: UUID | None
    ordinal: int | None
    custom_id: str | None
    attempts: int
    metadata: dict[str, Any] | None
    created_at: datetime
    deadline_at: datetime
    finished_at: datetime | None
    answer: Answer | None
    error: dict[str, Any] | None
    calls: int
    unknown_calls: int
    cost_usd: Decimal | None

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL

    @property
    def lacking(self) -> bool:
        """Without a full answer, so far or for good."""
        return self.answer is None or self.answer.degraded is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a job is: `attempt` is its fence, 0 before the first; `code` that of its error, if it has one."""

    id: UUID
    state: JobState
    attempt: int
    code: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetters:
    """Jobs that ended without an answer in the same way: `providers` says why each gave none, `newest_id` is the one submitted last."""

    state: JobState
    code: str | None
    providers: str | None
    jobs: int
    newest_id: UUID
    last_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class CallView:
    """One HTTP request to a provider; `outcome` None is under way. `attempt` is the fence it was made under.

    `estimated`: the provider answered and counted no tokens, so they, and the cost, are an estimate.
    """

    id: UUID
    provider: str
    model: str
    attempt: int
    opened_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    latency_ms: int | None
    outcome: str | None
    http_status: int | None
    error_code: str | None
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    reasoning_tokens: int | None
    estimated: bool
    billing: str
    cost_usd: Decimal | None
    price_source: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchView:
    """A batch and how far it is: `total` grows while it is `loading`. `degraded`: of the succeeded, with less than a full answer."""

    id: UUID
    tenant: str
    name: str
    state: str
    columns: list[str] | None
    fields: list[str]
    total: int
    succeeded: int
    degraded: int
    failed: int
    cancelled: int
    expired: int
    created_at: datetime
    finished_at: datetime | None

    @property
    def unfinished(self) -> int:
        return self.total - self.succeeded - self.failed - self.cancelled - self.expired

    @property
    def lacking(self) -> int:
        """Jobs without a full answer, so far or for good."""
        return self.total - self.succeeded + self.degraded


class CostKey(StrEnum):
    PROVIDER = "provider"
    MODEL = "model"
    BATCH = "batch"
    DAY = "day"


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRow:
    """What the calls of one provider, model, batch (None: jobs without) or UTC day cost.

    `coverage`: share of the possibly billed calls whose cost is known, 0 to 1; 1 when there are none. `estimated_usd` is the
    part of `cost_usd`, of `estimated_calls` calls, that rests on estimated tokens.
    """

    key: str | None
    calls: int
    billed: int
    unknown: int
    input_tokens: int
    output_tokens: int
    cost_usd: Decimal | None
    coverage: float
    estimated_calls: int
    estimated_usd: Decimal | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderDay:
    """One provider's calls. `failed` ended without an answer, cancelled ones aside. Latencies are of answered calls."""

    provider: str
    calls: int
    answered: int
    failed: int
    p50_ms: int | None
    p95_ms: int | None
    unknown: int
    cost_usd: Decimal | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failover:
    """Time to switch: from the end of a provider's first failed call, its retries included, to the start of the next provider's.

    Both of one attempt: the wait of a job that is attempted again is not in it.
    """

    switches: int
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker process: `running` jobs it holds, `slots` for bulk jobs, `waiting` messages that wait for them."""

    id: UUID
    host: str
    pid: int
    lanes: str
    slots: int
    waiting: int
    running: int
    state: str
    started_at: datetime
    seen_at: datetime
