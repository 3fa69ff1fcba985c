"""Jobs in: one at a time, or a whole file. Inserted and committed first, published second; a crash in between is normal."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypedDict
from uuid import UUID

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.database import jsonb, run
from worker.dispatch import Publish, withdraw
from worker.errors import KeyReused, UsageError
from worker.job import ChatRequest, Lane, new_id
from worker.tally import CLOSE_BATCH

log = structlog.get_logger(__name__)

CHUNK = 5_000  # rows of a file in one transaction
BULK_DEADLINE_S = 86_400.0
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
IDEMPOTENCY_KEY_IS = "1 to 255 visible ASCII characters"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """One chat request with how to run it. `deadline_s` counts from its submission."""

    request: ChatRequest
    chain: str = "default"
    lane: Lane = Lane.INTERACTIVE
    deadline_s: float = 120
    tenant: str = "default"
    idempotency_key: str | None = None
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Submitted:
    """`replayed`: the idempotency key was known, this is the job of then."""

    job_id: UUID
    replayed: bool


class Parameters(TypedDict, total=False):
    """What a provider is asked with, as `batchlines` checks it; those of vendors besides OpenAI stand last."""

    temperature: float
    top_p: float
    max_tokens: int
    max_completion_tokens: int
    stop: str | list[str]
    seed: int
    frequency_penalty: float
    presence_penalty: float
    logit_bias: dict[str, float]
    logprobs: bool
    top_logprobs: int
    response_format: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    reasoning_effort: str
    verbosity: str
    modalities: list[str]
    prediction: dict[str, Any]
    service_tier: str
    user: str
    safety_identifier: str
    prompt_cache_key: str
    top_k: int
    min_p: float
    repetition_penalty: float
    reasoning: dict[str, Any]
    thinking: dict[str, Any]


_INSERT = text("""
WITH job AS (
    INSERT INTO jobs (id, tenant, idempotency_key, fingerprint, chain, lane, state, deadline_at, deadline_s, metadata, delivery_id,
        dispatched_at)
    VALUES (:id, :tenant, :key, :fingerprint, :chain, :lane, 'queued', now() + make_interval(secs => :deadline_s), :deadline_s,
        CAST(:metadata AS jsonb), :delivery, CASE WHEN CAST(:delivery AS uuid) IS NOT NULL THEN now() END)
    ON CONFLICT (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
    RETURNING id
)
INSERT INTO job_requests (job_id, request) SELECT id, CAST(:request AS jsonb) FROM job RETURNING job_id
""")

_EARLIER = text("SELECT id, fingerprint FROM jobs WHERE tenant = :tenant AND idempotency_key = :key")


async def submit(db: AsyncEngine, publish: Publish, job: NewJob) -> Submitted:
    """The job is in the ledger, whatever happens next; an interactive one is on its way to a worker.

    Raises KeyReused when its idempotency key was used for something else, DBAPIError when nothing was accepted.
    """
    job_id = new_id()
    direct = job.lane is Lane.INTERACTIVE  # bulk waits for its turn in the dispatcher's window
    inserted = await run(
        db,
        _INSERT,
        id=job_id,
        tenant=job.tenant,
        key=job.idempotency_key,
        fingerprint=_print_of(job),
        chain=job.chain,
        lane=job.lane.value,
        deadline_s=job.deadline_s,
        metadata=jsonb(job.metadata),
        delivery=job_id if direct else None,
        request=jsonb(job.request.to_json()),
    )
    if not inserted:
        return await replayed(db, job) or await submit(db, publish, job)  # anew when the earlier one was deleted since
    if direct:
        await _publish(db, publish, job_id)
    return Submitted(job_id, replayed=False)


async def replayed(db: AsyncEngine, job: NewJob) -> Submitted | None:
    """The job that its idempotency key stands for already. Raises KeyReused when that is one of another request."""
    if job.idempotency_key is None:
        return None
    for earlier in await run(db, _EARLIER, tenant=job.tenant, key=job.idempotency_key):
        if earlier.fingerprint != _print_of(job):
            raise KeyReused(f"the idempotency key was used for another request: job {earlier.id}; take a new key for a new request")
        return Submitted(earlier.id, replayed=True)
    return None


def _print_of(job: NewJob) -> str:
    return _fingerprint([job.request.to_json(), job.chain, job.lane, job.metadata])


async def _publish(db: AsyncEngine, publish: Publish, job_id: UUID) -> None:
    try:
        await asyncio.to_thread(publish, Lane.INTERACTIVE, job_id, [job_id])
    except Exception as error:
        log.warning("publish_failed", job_id=str(job_id), error=type(error).__name__)
        await withdraw(db, [job_id])  # the leader publishes it as soon as Redis is back


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a file. Without a request it stands in the batch as failed, with `problem` as its reason."""

    ordinal: int
    custom_id: str | None
    request: ChatRequest | None
    chain: str
    source: Mapping[str, Any] | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """An open batch. `resumed`: some of its rows are there already, and are not submitted again."""

    id: UUID
    name: str
    resumed: bool
    complete: bool


_OPEN_BATCH = text("""
INSERT INTO batches (id, tenant, name, state, fingerprint, columns, fields)
VALUES (:id, :tenant, :name, 'loading', :fingerprint, CAST(:columns AS jsonb), CAST(:fields AS jsonb))
ON CONFLICT (tenant, name) DO NOTHING
""")

_BATCH = text("SELECT id, state, fingerprint, total FROM batches WHERE tenant = :tenant AND name = :name")


async def open_batch(
    db: AsyncEngine,
    name: str,
    *,
    fingerprint: Sequence[Any],
    columns: Sequence[str] | None,
    fields: Sequence[str] = (),
    tenant: str = "default",
) -> Batch:
    """The batch of that name, new or resumed.

    Raises UsageError when the name cannot be one, or belongs to another file, template or chain.
    """
    if not 1 <= len(name) <= 200 or not name.isprintable():
        raise UsageError("the name of a batch has 1 to 200 printable characters: choose another name for the batch")
    print_ = _fingerprint(fingerprint)
    as_json: dict[str, Any] = {"columns": json.dumps(columns), "fields": json.dumps(list(fields))}
    await run(db, _OPEN_BATCH, id=new_id(), tenant=tenant, name=name, fingerprint=print_, **as_json)
    (row,) = await run(db, _BATCH, tenant=tenant, name=name)
    if row.fingerprint != print_:
        raise UsageError(f"batch {name!r} exists and was made from another file, template, chain or parameters: choose another name for it")
    return Batch(row.id, name, resumed=row.total > 0, complete=row.state != "loading")


_ADD_ROWS = text("""
WITH row AS (
    SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:ordinals AS bigint[]), CAST(:custom_ids AS text[]), CAST(:chains AS text[]),
        CAST(:requests AS jsonb[]), CAST(:sources AS jsonb[]), CAST(:errors AS jsonb[]))
        AS t(id, ordinal, custom_id, chain, request, source, error)
), loading AS (
    SELECT id FROM batches WHERE id = :batch AND state = 'loading' FOR NO KEY UPDATE
), job AS (
    INSERT INTO jobs (id, tenant, batch_id, ordinal, custom_id, chain, lane, state, deadline_at, deadline_s, error, finished_at)
    SELECT id, :tenant, :batch, ordinal, custom_id, chain, 'bulk', CASE WHEN error IS NULL THEN 'queued' ELSE 'failed' END,
        now() + make_interval(secs => :deadline_s), :deadline_s, error, CASE WHEN error IS NOT NULL THEN now() END
    FROM row WHERE EXISTS (SELECT FROM loading)
    ON CONFLICT (batch_id, ordinal) WHERE batch_id IS NOT NULL DO NOTHING
    RETURNING id, state
), request AS (
    INSERT INTO job_requests (job_id, request, row)
    SELECT row.id, row.request, row.source FROM row JOIN job ON job.id = row.id
), counted AS (
    UPDATE batches SET total = batches.total + n.total, failed = batches.failed + n.failed
    FROM (SELECT count(*) AS total, count(*) FILTER (WHERE state = 'failed') AS failed FROM job) n
    WHERE batches.id = :batch
)
SELECT count(*) AS added, EXISTS (SELECT FROM loading) AS loading FROM job
""")


async def add_rows(
    db: AsyncEngine, batch: Batch, rows: Iterable[Row], *, deadline_s: float = BULK_DEADLINE_S, tenant: str = "default"
) -> AsyncIterator[int]:
    """Streams rows into the batch, CHUNK at a time, each chunk whole or not at all; yields how many were new in each.

    A row that is there already (by ordinal) is left as it is, so a run that broke off is simply run again. Rows may be
    attempted while later ones are still being read.
    """
    source = iter(rows)
    while chunk := await asyncio.to_thread(_take, source):
        added = await run(
            db,
            _ADD_ROWS,
            tenant=tenant,
            batch=batch.id,
            deadline_s=deadline_s,
            ids=sorted(new_id() for _ in chunk),  # jobs of one moment are taken by id: in the order of the file
            ordinals=[row.ordinal for row in chunk],
            custom_ids=[row.custom_id for row in chunk],
            chains=[row.chain for row in chunk],
            requests=[jsonb(row.request.to_json() if row.request else None) for row in chunk],
            sources=[jsonb(row.source) for row in chunk],
            errors=[jsonb({"code": "unusable_row", "message": row.problem, "providers": []} if row.problem else None) for row in chunk],
        )
        if not added[0].loading:
            raise UsageError(f"batch {batch.name!r} was cancelled or completed meanwhile: no more rows are taken")
        yield added[0].added


def _take(source: Iterator[Row]) -> list[Row]:
    return list(islice(source, CHUNK))


async def close_batch(db: AsyncEngine, batch: Batch) -> None:
    """All rows are in: the batch is finished as soon as all of them have ended."""
    await run(db, CLOSE_BATCH, id=batch.id)


def _fingerprint(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
