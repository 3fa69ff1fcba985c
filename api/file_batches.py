"""Batches as OpenAI's Batch API has them."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from pydantic import BaseModel, ConfigDict, Field, field_validator

from api import examples
from api.auth import Reads, Submits
from api.files import ExpiresAfter, known_file, no_file
from api.openai_errors import FINAL, OpenAIError, documented_openai
from api.parts import Opened
from api.spelling import IdempotencyKey, NoNul, Spelled
from worker import file_batches, files, new_file_batch
from worker.batchlines import URL
from worker.errors import KeyReused, TooMany
from worker.file_batches import FileBatch
from worker.new_file_batch import NewFileBatch

AGAIN_S = "60"
_UNITS_S = {"m": 60, "h": 3_600, "d": 86_400}
BAD_LINES = "backstop-bad-lines"

_Key = Annotated[str, Field(max_length=64), NoNul]
_Value = Annotated[str, Field(max_length=512), NoNul]
_SEVEN_DAYS = "^([1-7]d|([1-9][0-9]?|1[0-5][0-9]|16[0-8])h|([1-9][0-9]{0,3}|100[0-7][0-9]|10080)m)$"
_Window = Spelled(_SEVEN_DAYS, "minutes, hours or days, 7 days at most: 30m, 24h, 7d")
_After = Spelled("^(batch_[0-9a-f]{32})?$", "the id of a batch")

router = APIRouter(prefix="/v1", tags=["openai"], responses=documented_openai(401, 403, 503))


class BatchIn(BaseModel):
    """A batch of the requests in a file. OpenAI knows the window `24h`; here it may be any time up to 7 days."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {"input_file_id": "file-0193e5c8f0a67c9a8d0f6a1b2c3d4e5f", "endpoint": URL, "completion_window": "24h"},
        },
    )

    input_file_id: str = Field(max_length=200)
    endpoint: Literal["/v1/chat/completions"]
    completion_window: Annotated[str, _Window] = Field(description="Minutes, hours or days: `30m`, `24h`, `7d`.")
    metadata: dict[_Key, _Value] | None = Field(
        None, max_length=16, description=f"`{BAD_LINES}: skip` makes lines that cannot be used errors of their own."
    )
    output_expires_after: ExpiresAfter | None = None

    @field_validator("metadata")
    @classmethod
    def _known_way(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        if metadata and metadata.get(BAD_LINES, "skip") != "skip":
            raise ValueError(f"{BAD_LINES}: expected `skip`, or leave it out")
        return metadata


def _seconds(window: str) -> int:
    return int(window[:-1]) * _UNITS_S[window[-1]]


class BatchError(BaseModel):
    code: str | None
    line: int | None
    message: str | None
    param: str | None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """`failed` are all that ended without an answer, `total` the lines that are jobs by now."""

    total: int
    completed: int
    failed: int


class BatchOut(BaseModel):
    """OpenAI's batch object; times are Unix seconds."""

    model_config = ConfigDict(json_schema_extra={"example": examples.FILE_BATCH})

    id: str
    object: Literal["batch"] = "batch"
    endpoint: Literal["/v1/chat/completions"] = "/v1/chat/completions"
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: dict[str, Any] | None
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, batch: FileBatch) -> BatchOut:
        times = {name: _unix(getattr(batch, name)) for name in cls.model_fields if name.endswith("_at")}
        file_ids = {name: files.wire_id(found) if (found := getattr(batch, name)) else None for name in ("output_file_id", "error_file_id")}
        unanswered = batch.failed + batch.cancelled + batch.expired
        return cls.model_validate(
            {
                "id": batch.wire_id,
                "status": batch.state,
                "input_file_id": files.wire_id(batch.input_file_id),
                "completion_window": batch.completion_window,
                "errors": {"data": batch.errors} if batch.errors else None,
                "request_counts": {"total": batch.total, "completed": batch.succeeded, "failed": unanswered},
                "usage": batch.usage,
                "metadata": batch.metadata,
                **times,
                **file_ids,
            }
        )


def _unix(moment: datetime | None) -> int | None:
    return int(moment.timestamp()) if moment else None


class BatchList(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.page_of(examples.FILE_BATCH)})

    object: Literal["list"] = "list"
    data: list[BatchOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.post("/batches", responses=documented_openai(400, 404, 409, 429))
async def create_batch(
    body: BatchIn,
    caller: Submits,
    parts: Opened,
    bad_lines: Annotated[Literal["skip", ""], Header(alias=BAD_LINES)] = "",
    idempotency_key: IdempotencyKey = None,
    retry_count: Annotated[str, Header(alias="x-stainless-retry-count", description="Set by OpenAI's SDKs.")] = "0",
) -> BatchOut:
    """Starts in `validating`; GET it to see how it goes on. Sent again by an SDK, or under its Idempotency-Key, it stays one."""
    input_file_id = files.from_wire(body.input_file_id)
    if input_file_id is None:
        raise no_file(body.input_file_id, "input_file_id")
    skips = bad_lines == "skip" or BAD_LINES in (body.metadata or {})
    new = NewFileBatch(
        tenant=caller.tenant,
        input_file_id=input_file_id,
        completion_window=body.completion_window,
        window_s=_seconds(body.completion_window),
        fingerprint=hashlib.sha256(json.dumps([body.model_dump(), skips], sort_keys=True).encode()).hexdigest(),
        output_expires_s=body.output_expires_after.seconds if body.output_expires_after else None,
        skips_bad_lines=skips,
        metadata=body.metadata,
        idempotency_key=idempotency_key,
        is_retry=re.fullmatch("0*", retry_count) is None,
    )
    try:
        return BatchOut.of(await new_file_batch.earlier(parts.db, new) or await _created(parts, new, body.input_file_id))
    except KeyReused as error:
        raise OpenAIError(409, str(error), code="idempotency_key_reused", headers=FINAL) from None
    except TooMany as error:
        raise OpenAIError(429, str(error), code="too_many_batches", headers={"Retry-After": AGAIN_S, **FINAL}) from None


async def _created(parts: Opened, new: NewFileBatch, input_file_id: str) -> FileBatch:
    file = await known_file(parts, input_file_id, new.tenant, "input_file_id")
    if file.purpose != "batch":
        raise OpenAIError(400, f"input_file_id: the purpose of that file is {file.purpose}, not batch", param="input_file_id")
    return await new_file_batch.create(parts.db, new)


@router.get("/batches", responses=documented_openai(400))
async def list_batches(
    caller: Reads,
    parts: Opened,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str, _After, Query(description="The id of the last batch of the page before.")] = "",
) -> BatchList:
    """The batches made here, newest first."""
    page = await file_batches.listed(parts.db, caller.tenant, limit=limit + 1, after=file_batches.from_wire(after))
    data = [BatchOut.of(batch) for batch in page[:limit]]
    return BatchList(data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=len(page) > limit)


@router.get("/batches/{batch_id}", responses=documented_openai(404))
async def retrieve_batch(batch_id: str, caller: Reads, parts: Opened) -> BatchOut:
    """How far it is. Batches that were not made of a file here have their results at /v1/batches/{name_or_id}/results."""
    return BatchOut.of(await _known(parts, batch_id, caller.tenant))


@router.post("/batches/{batch_id}/cancel", responses=documented_openai(404, 409))
async def cancel_batch(batch_id: str, caller: Submits, parts: Opened) -> BatchOut:
    """No further request is sent; what was answered until then is in the output file once it is `cancelled`."""
    batch = await _known(parts, batch_id, caller.tenant)
    cancelled = await file_batches.cancel(parts.db, batch.batch_id)
    batch = await _known(parts, batch_id, caller.tenant)
    if not cancelled and batch.state != "cancelling":
        raise OpenAIError(409, f"the batch is {batch.state}: it cannot be cancelled any more", headers=FINAL)
    return BatchOut.of(batch)


async def _known(parts: Opened, batch_id: str, tenant: str) -> FileBatch:
    """The tenant's batch of that id. Raises OpenAIError, a 404."""
    found = file_batches.from_wire(batch_id)
    batch = await file_batches.one(parts.db, found, tenant) if found else None
    if batch is None:
        message = f"there is no batch {batch_id[:50]!r} made of a file; other batches have their results at /v1/batches/NAME/results"
        raise OpenAIError(404, message, param="batch_id")
    return batch
