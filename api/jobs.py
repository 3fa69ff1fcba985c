"""Jobs: submit, wait, list, cancel, and what was called for them."""

from __future__ import annotations

import re
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response
from sqlalchemy.ext.asyncio import AsyncEngine

from api.auth import Reads, Submits
from api.batches import known_batch
from api.parts import Opened, Parts
from api.problems import documented
from api.schemas import CallList, CallOut, JobIn, JobOut, JobPage
from worker import intervene, reads, waiting
from worker.batchlines import chat_request
from worker.errors import NotFound, UsageError
from worker.job import ChatRequest, JobState
from worker.selection import Selection
from worker.submit import NewJob, submit
from worker.views import JobView

MAX_WAIT_S = 60.0

router = APIRouter(prefix="/v1", responses=documented(401, 422, 503))

Wait = Annotated[float, Query(ge=0, allow_inf_nan=False, description="Seconds to wait for its end, 60 at most.")]
IdempotencyKey = Annotated[str | None, Header(pattern=r"^[\x21-\x7e]{1,255}$")]


@router.post("/jobs", status_code=202, tags=["jobs"], responses={200: {"model": JobOut}, **documented(413)})
async def submit_job(
    body: JobIn,
    request: Request,
    response: Response,
    caller: Submits,
    parts: Opened,
    wait: Wait = 0,
    prefer: Annotated[str, Header(description="`wait=N` as in RFC 7240")] = "",
    idempotency_key: IdempotencyKey = None,
) -> JobOut:
    """Accepted is kept: 202 means that the job will end. 200 when it was waited for and has ended.

    The same `Idempotency-Key` with the same request gives the same job; with another request it is a 422.
    """
    parts.config.chain(body.chain)
    new = NewJob(
        request=_checked(body),
        chain=body.chain,
        lane=body.lane,
        deadline_s=body.deadline_s,
        tenant=caller.tenant,
        idempotency_key=idempotency_key,
        metadata=body.metadata,
    )
    submitted = await submit(parts.db, parts.publish, new)
    preferred_s = _preferred_wait_s(prefer)
    wait_s = preferred_s if preferred_s is not None else wait
    job = await _awaited(parts, submitted.job_id, caller.tenant, wait_s)
    response.status_code = 200 if wait_s and job.ended else 202
    response.headers.update(_submitted_headers(job, preferred_s, submitted.replayed, again=response.status_code == 202))
    return JobOut.of(job)


def _checked(body: JobIn) -> ChatRequest:
    try:
        return chat_request(body.chat_body())
    except ValueError as error:
        raise UsageError(str(error)) from None


def _submitted_headers(job: JobView, preferred_s: float | None, replayed: bool, *, again: bool) -> dict[str, str]:
    headers = {"Location": f"/v1/jobs/{job.id}"}
    if again:
        headers["Retry-After"] = "1"
    if preferred_s is not None:
        headers["Preference-Applied"] = f"wait={preferred_s:g}"
    if replayed:
        headers["Idempotent-Replayed"] = "true"
    return headers


@router.get("/jobs", tags=["jobs"], responses=documented(404))
async def list_jobs(
    request: Request,
    response: Response,
    caller: Reads,
    parts: Opened,
    cursor: UUID | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    state: JobState | None = None,
    batch: Annotated[str | None, Query(description="Name or id of a batch.")] = None,
) -> JobPage:
    """Jobs, newest first. `cursor` is the `next_cursor` of the page before; `Link: rel="next"` says the same."""
    batch_id = (await known_batch(parts.db, batch, caller.tenant)).id if batch is not None else None
    which = Selection(state=state)
    found = await reads.jobs(parts.db, which=which, tenant=caller.tenant, batch_id=batch_id, before=cursor, limit=limit + 1)
    page, has_more = found[:limit], len(found) > limit
    next_cursor = str(page[-1].id) if has_more else None
    if next_cursor is not None:
        response.headers["Link"] = f'<{request.url.include_query_params(cursor=next_cursor)}>; rel="next"'
    return JobPage(data=[JobOut.of(job) for job in page], has_more=has_more, next_cursor=next_cursor)


@router.get("/jobs/{job_id}", tags=["jobs"], responses=documented(404))
async def get_job(job_id: str, response: Response, caller: Reads, parts: Opened, wait: Wait = 0) -> JobOut:
    """The job as it stands; with `wait`, as soon as it has ended or the time is over."""
    job = await _job(parts.db, job_id, caller.tenant)
    if wait and not job.ended:
        job = await _awaited(parts, job.id, caller.tenant, wait)
    if not job.ended:
        response.headers["Retry-After"] = "1"
    return JobOut.of(job)


@router.post("/jobs/{job_id}/cancel", tags=["jobs"], responses={202: {"model": JobOut}, **documented(404)})
async def cancel_job(job_id: str, response: Response, caller: Submits, parts: Opened) -> JobOut:
    """200: it has ended, cancelled now or otherwise before. 202: it runs, and is stopped unless it succeeds first."""
    job = await _job(parts.db, job_id, caller.tenant)
    cancelled = await intervene.cancel(parts.db, job_ids=[job.id], tenant=caller.tenant)
    if cancelled.cancelled:
        await waiting.announce(parts.redis, [job.id])
    job = await _job(parts.db, job_id, caller.tenant)
    response.status_code = 200 if job.ended else 202
    return JobOut.of(job)


@router.get("/jobs/{job_id}/calls", tags=["jobs"], responses=documented(404))
async def list_calls(job_id: str, caller: Reads, parts: Opened) -> CallList:
    """Every HTTP request sent to a provider for this job: whom it asked, how it ended, how long it took, its cost."""
    job = await _job(parts.db, job_id, caller.tenant)
    return CallList(data=[CallOut.of(call) for call in await reads.calls(parts.db, job.id)])


async def _awaited(parts: Parts, job_id: UUID, tenant: str, wait_s: float) -> JobView:
    """The job once it has ended or the time is over; no database connection is held meanwhile."""
    if wait_s:
        await parts.endings.wait([job_id], min(wait_s, MAX_WAIT_S))
    return await _job(parts.db, job_id, tenant)


async def _job(db: AsyncEngine, job_id: UUID | str, tenant: str) -> JobView:
    known = job_id if isinstance(job_id, UUID) else reads.uuid_or_none(job_id)
    job = await reads.job(db, known, tenant) if known else None
    if job is None:
        raise NotFound("there is no job of that id")
    return job


_PREFERENCE = re.compile(r"(?:^|[,;])\s*(respond-async|wait\s*=\s*\"?(\d{1,9})\"?)\s*(?=$|[,;])", re.IGNORECASE)


def _preferred_wait_s(prefer: str) -> float | None:
    """The seconds of `wait=N` (RFC 7240), 60 at most; 0 for respond-async, None when neither is asked for."""
    wait_s = None
    for match in _PREFERENCE.finditer(prefer):
        if match[2] is None:
            return 0
        wait_s = min(float(match[2]), MAX_WAIT_S)
    return wait_s
