"""The JSON that goes in and out. Money is a decimal string or null for not known; times are RFC 3339 in UTC."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Self
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from api import examples
from api.chat_schema import described
from api.metadata import Metadata
from worker.export import ExportRow
from worker.job import MAX_DEADLINE_S, Answer, JobState, Lane
from worker.views import BatchView, CallView, JobView

Usd = Annotated[Decimal, PlainSerializer(lambda value: format(value.normalize(), "f"), return_type=str)]
Moment = Annotated[datetime, AfterValidator(lambda value: value.astimezone(UTC))]


class JobIn(BaseModel):
    """One chat request. Fields not named here go to the provider: `temperature`, `max_tokens`, `tools`, ..."""

    model_config = ConfigDict(extra="allow", json_schema_extra=lambda schema: described(schema, {}))

    messages: list[dict[str, Any]] = Field(min_length=1)
    chain: str = Field("default", max_length=200, description="A chain, a provider, or a provider's model.")
    lane: Lane = Lane.INTERACTIVE
    deadline_s: float = Field(120, strict=True, gt=0, le=MAX_DEADLINE_S, allow_inf_nan=False, description="Seconds from now.")
    metadata: Metadata | None = Field(None, description="Kept with the job, sent to nobody; 16 KiB of JSON at most.")

    def chat_body(self) -> dict[str, Any]:
        """The part of it that is the chat request."""
        return {"messages": self.messages, **(self.model_extra or {})}


class UsageOut(BaseModel):
    """`estimated` is there, and true, where the provider counted no tokens."""

    model_config = ConfigDict(from_attributes=True)

    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    reasoning_tokens: int | None
    estimated: bool = Field(False, exclude_if=lambda value: not value)


class ResultOut(BaseModel):
    """`degraded` says how it falls short of a full answer, if it does. `age_s` is there where it was kept from an earlier job."""

    model_config = ConfigDict(from_attributes=True)

    content: str | None
    finish_reason: str
    provider: str
    model: str
    usage: UsageOut
    degraded: str | None
    age_s: float | None = Field(None, exclude_if=lambda value: value is None)
    tool_calls: list[dict[str, Any]] | None = Field(None, exclude_if=lambda value: value is None)

    @classmethod
    def of(cls, answer: Answer | None) -> Self | None:
        return None if answer is None else cls.model_validate(answer)


class JobOut(BaseModel):
    """A job. `cost_usd` sums its calls, but for `unknown_calls` of them whose cost is not known."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"example": examples.JOB})

    id: UUID
    state: JobState
    created_at: Moment
    finished_at: Moment | None
    result: ResultOut | None = Field(validation_alias="answer")
    cost_usd: Usd | None
    error: dict[str, Any] | None
    calls: int
    unknown_calls: int
    attempts: int = Field(description="Those that ended with nobody's answer and were not only waits: 0 where the first was answered.")
    chain: str
    lane: Lane
    deadline_at: Moment
    metadata: dict[str, Any] | None
    batch_id: UUID | None
    custom_id: str | None

    @classmethod
    def of(cls, job: JobView) -> Self:
        return cls.model_validate(job)


class JobPage(BaseModel):
    """Newest first. `next_cursor` asks for the page behind this one."""

    model_config = ConfigDict(json_schema_extra={"example": examples.JOB_PAGE})

    data: list[JobOut]
    has_more: bool
    next_cursor: str | None


class CallOut(BaseModel):
    """One HTTP request to a provider; `outcome` null is under way. `estimated`: it counted no tokens, so we did."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"example": examples.CALL})

    id: UUID
    provider: str
    model: str
    attempt: int
    opened_at: Moment
    started_at: Moment | None
    ended_at: Moment | None
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
    cost_usd: Usd | None
    price_source: str | None

    @classmethod
    def of(cls, call: CallView) -> Self:
        return cls.model_validate(call)


class CallList(BaseModel):
    """In the order they left."""

    model_config = ConfigDict(json_schema_extra={"example": {"data": [examples.CALL]}})

    data: list[CallOut]


class ResultLine(BaseModel):
    """One line of a batch's results: a job that has ended. `ordinal` is its row in the file, from 1.

    `cursor` asks for what had not been sent yet with this line.
    """

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"example": examples.LINE})

    id: UUID = Field(validation_alias="job_id")
    custom_id: str | None
    ordinal: int
    state: JobState
    result: ResultOut | None = Field(validation_alias="answer")
    cost_usd: Usd | None
    error: dict[str, Any] | None
    cursor: str = ""

    @classmethod
    def of(cls, row: ExportRow, cursor: str) -> Self:
        return cls.model_validate(row).model_copy(update={"cursor": cursor})


class JobProgress(BaseModel):
    """Where a job is. `code`: of a job attempted again, why its last attempt gave no answer."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"example": examples.PROGRESS})

    state: JobState
    attempt: int
    code: str | None


class BatchOut(BaseModel):
    """How far a batch is. `total` grows while it is `loading`; `degraded` of the succeeded have less than a full answer."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"example": examples.BATCH})

    id: UUID
    name: str
    state: str
    total: int
    succeeded: int
    degraded: int
    failed: int
    cancelled: int
    expired: int
    created_at: Moment
    finished_at: Moment | None

    @classmethod
    def of(cls, batch: BatchView) -> Self:
        return cls.model_validate(batch)


class CallsToday(BaseModel):
    """Since midnight UTC. Latencies are those of answered calls, in milliseconds."""

    model_config = ConfigDict(from_attributes=True)

    calls: int = 0
    answered: int = 0
    failed: int = 0
    p50_ms: int | None = None
    p95_ms: int | None = None
    unknown: int = 0
    cost_usd: Usd | None = Decimal(0)


class ProviderOut(BaseModel):
    """A provider, its breaker and limits as all workers see them, and this tenant's calls.

    `requests_left` and `tokens_left`: of the configured limits, now; null when there is none. `rate_multiplier`: 1, or
    what congestion has left of the configured rates.
    """

    model_config = ConfigDict(json_schema_extra={"example": examples.PROVIDER})

    name: str
    model: str
    state: str
    health: str
    retry_after_s: float
    reason: str | None
    in_flight: int
    requests_left: int | None
    tokens_left: int | None
    rate_multiplier: float
    today: CallsToday


class ProviderList(BaseModel):
    """In the order of the config."""

    model_config = ConfigDict(json_schema_extra={"example": {"data": [examples.PROVIDER]}})

    data: list[ProviderOut]


class CostOut(BaseModel):
    """`unknown` calls may have been billed at a cost not known; `coverage` is the share of known costs, 0 to 1.

    `estimated_usd` is the part of `cost_usd`, of `estimated_calls` calls, whose tokens the provider did not count.
    """

    model_config = ConfigDict(from_attributes=True)

    key: str | None
    calls: int
    billed: int
    unknown: int
    input_tokens: int
    output_tokens: int
    cost_usd: Usd | None
    coverage: float
    estimated_calls: int
    estimated_usd: Usd | None


class CostList(BaseModel):
    """The dearest first; days, the newest first."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"by": "provider", "since": "2026-02-22T09:30:00Z", "data": [examples.COST]}},
    )

    by: str
    since: Moment
    data: list[CostOut]
