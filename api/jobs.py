"""Jobs: submit, wait, follow, list, cancel, requeue, and what was called for them."""

from __future__ import annotations

import re
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from api import follow
from api.auth import Reads, Submits
from api.batches import known_batch
from api.examples import JOB_EVENTS
from api.paging import cut_page
from api.parts import Opened, Parts
from api.paths import outer
from api.problems import KnownParameters, documented
from api.schemas import CallList, CallOut, JobIn, JobOut, JobPage, JobProgress
from api.spelling import IdempotencyKey, NoNul, Span
from api.streams import documented_events
from worker import intervene, reads, waiting
from worker.batchlines import chat_request
from worker.config import Config
from worker.errors import NotFound, UsageError
from worker.job import ChatRequest, JobState, Lane
from worker.selection import Selection
from worker.submit import NewJob
from worker.views import JobView

MAX_WAIT_S = 60.0

router = APIRouter(prefix="/v1", tags=["jobs"], responses=documented(401, 403, 422, 503), dependencies=[KnownParameters])

Wait = Annotated[float, Query(ge=0, allow_inf_nan=False, description="Seconds to wait for its end, 60 at most.")]
Prefer = Annotated[str, Header(description="`wait=N` in seconds, or `respond-async`, as in RFC 7240.")]
_Word = Annotated[Annotated[str, Field(max_length=512), NoNul] | None, Field()]

_WAITED: dict[int | str, dict[str, Any]] = {200: {"model": JobOut, "description": "It was waited for, and has ended"}}
_STOPPING: dict[int | str, dict[str, Any]] = {202: {"model": JobOut, "description": "It runs, and is stopped unless it succeeds first"}}


@router.post("/jobs", status_code=202, responses={**_WAITED, **documented(400, 413, 429)})
async def submit_job(
    body: JobIn,
    request: Request,
    response: Response,
    caller: Submits,
    parts: Opened,
    wait: Wait = 0,
    prefer: Prefer = "",
    idempotency_key: IdempotencyKey = None,
) -> JobOut:
    """Accepted is kept: 202 means that the job will end. 200 when it was waited for and has ended.

    The same `Idempotency-Key` with the same request gives the same job, `Idempotent-Replayed: true`; with another
    request it is a 422. Two at once are one job as well: the second waits in Postgres for the first one's commit, so
    that there is no 409. 429: too many interactive jobs of the tenant are queued (`BACKSTOP_MAX_QUEUED`).
    """
    new = NewJob(
        request=_checked(body, parts.config),
        chain=body.chain,
        lane=body.lane,
        deadline_s=body.deadline_s,
        tenant=caller.tenant,
        idempotency_key=idempotency_key,
        metadata=body.metadata,
    )
    submitted = await parts.admission.submit(parts.publish, new)
    wait_s = _wait_s(response, prefer, wait)
    job = await _awaited(parts, submitted.job_id, caller.tenant, wait_s)
    response.status_code = 200 if wait_s and job.ended else 202
    response.headers["Location"] = outer(request, f"/v1/jobs/{job.id}")
    if response.status_code == 202:
        response.headers["Retry-After"] = "1"
    if submitted.replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return JobOut.of(job)


def _checked(body: JobIn, config: Config) -> ChatRequest:
    """What is to be asked. Raises RequestValidationError naming the field that cannot be used."""
    try:
        config.chain(body.chain)
        return chat_request(body.chat_body())
    except UsageError as error:
        field, why = "chain", str(error)
    except ValueError as error:
        field, _, why = str(error).partition(": ")
    raise RequestValidationError([{"type": "value_error", "loc": ("body", field), "msg": why}])


class Wanted(BaseModel):
    """Jobs for which everything holds that is given."""

    cursor: UUID | None = None
    limit: int = Field(50, ge=1, le=100)
    state: JobState | None = None
    lane: Lane | None = None
    batch: _Word = Field(None, description="Name or id of a batch.")
    chain: _Word = None
    code: _Word = Field(None, description="The code of its error.")
    custom_id: _Word = None
    since: Span | None = Field(None, description="Ended, or submitted if it has not ended, so long ago or less: a number and m, h, d or w.")

    def selection(self) -> Selection:
        """Raises UsageError when `since` is no span of time."""
        since = None if self.since is None else reads.ago(self.since)
        return Selection(state=self.state, code=self.code, chain=self.chain, since=since)


@router.get("/jobs", responses=documented(404))
async def list_jobs(
    request: Request,
    response: Response,
    caller: Reads,
    parts: Opened,
    which: Annotated[Wanted, Query()],
) -> JobPage:
    """Jobs, newest first. `cursor` is the `next_cursor` of the page before; `Link: rel="next"` says the same."""
    batch_id = (await known_batch(parts.db, which.batch, caller.tenant)).id if which.batch is not None else None
    found = await reads.jobs(
        parts.reports,
        which=which.selection(),
        tenant=caller.tenant,
        batch_id=batch_id,
        lane=which.lane,
        custom_id=which.custom_id,
        before=which.cursor,
        limit=which.limit + 1,
    )
    page, next_cursor = cut_page(request, response, found, which.limit)
    return JobPage(data=[JobOut.of(job) for job in page], has_more=next_cursor is not None, next_cursor=next_cursor)


@router.get("/jobs/{job_id}", responses=documented(404))
async def get_job(job_id: str, response: Response, caller: Reads, parts: Opened, wait: Wait = 0, prefer: Prefer = "") -> JobOut:
    """The job as it stands; with `wait` or `Prefer: wait=N`, as soon as it has ended or the time is over."""
    job = await _job(parts, job_id, caller.tenant)
    wait_s = _wait_s(response, prefer, wait)
    if wait_s and not job.ended:
        job = await _awaited(parts, job.id, caller.tenant, wait_s)
    if not job.ended:
        response.headers["Retry-After"] = "1"
    return JobOut.of(job)


@router.get(
    "/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses={**documented_events(JOB_EVENTS, JobProgress, JobOut), **documented(404)},
)
async def job_events(
    job_id: str,
    caller: Reads,
    parts: Opened,
    last_event_id: Annotated[str, follow.JobEventId, Header(description="What was seen last.")] = "",
) -> Response:
    """Server-sent events, named by the state the job is in, the last by how it ended, with the whole job.

    It is looked at once a second: a state that was over sooner may not be told.
    """
    job = await _job(parts, job_id, caller.tenant)

    async def pause() -> None:
        await parts.endings.wait([job.id], follow.until_next_look_s())

    return await follow.followed(lambda: parts.looks.job(job.id), pause, last_event_id)


@router.post("/jobs/{job_id}/cancel", responses={**_STOPPING, **documented(404)})
async def cancel_job(job_id: str, response: Response, caller: Submits, parts: Opened) -> JobOut:
    """200: it has ended, cancelled now or otherwise before. 202: it runs, and is stopped unless it succeeds first."""
    job = await _job(parts, job_id, caller.tenant)
    cancelled = await intervene.cancel(parts.db, job_ids=[job.id], tenant=caller.tenant)
    if cancelled.cancelled:
        await waiting.announce(parts.redis, [job.id])
    job = await _job(parts, job_id, caller.tenant)
    response.status_code = 200 if job.ended else 202
    return JobOut.of(job)


@router.post("/jobs/{job_id}/requeue", status_code=202, responses=documented(404, 409))
async def requeue_job(job_id: str, request: Request, response: Response, caller: Submits, parts: Opened) -> JobOut:
    """A job that ended without an answer is queued once more, with its full time. What its calls have cost stays spent.

    409: it has not ended, it was answered, it never was a request that could be sent, or the batch of a file it is in is over.
    """
    job = await _job(parts, job_id, caller.tenant)
    try:
        requeued = await intervene.requeue(parts.db, job_ids=[job.id])
    except UsageError as error:
        raise HTTPException(409, str(error)) from None
    if not requeued:
        raise HTTPException(409, f"the job is {job.state}: only one that ended without an answer, and can be sent, is queued again")
    response.headers.update({"Location": outer(request, f"/v1/jobs/{job.id}"), "Retry-After": "1"})
    return JobOut.of(await _job(parts, job_id, caller.tenant))


@router.get("/jobs/{job_id}/calls", responses=documented(404))
async def list_calls(job_id: str, caller: Reads, parts: Opened) -> CallList:
    """Every HTTP request sent to a provider for this job: whom it asked, how it ended, how long it took, its cost."""
    job = await _job(parts, job_id, caller.tenant)
    return CallList(data=[CallOut.of(call) for call in await reads.calls(parts.db, job.id)])


async def _awaited(parts: Parts, job_id: UUID, tenant: str, wait_s: float) -> JobView:
    """The job once it has ended or the time is over; no database connection is held meanwhile."""
    if wait_s:
        await parts.endings.wait([job_id], min(wait_s, MAX_WAIT_S))
    return await _job(parts, job_id, tenant)


async def _job(parts: Parts, job_id: UUID | str, tenant: str) -> JobView:
    known = job_id if isinstance(job_id, UUID) else reads.uuid_or_none(job_id)
    job = await parts.jobs.ask(known) if known else None
    if job is None or job.tenant != tenant:
        raise NotFound("there is no job of that id")
    return job


_PREFERENCE = re.compile(r"(?:^|[,;])\s*(respond-async|wait\s*=\s*\"?(\d{1,9})\"?)\s*(?=$|[,;])", re.IGNORECASE)


def _wait_s(response: Response, prefer: str, wait_s: float) -> float:
    """The seconds of `wait=N` (RFC 7240), 60 at most, 0 for respond-async, and says that it was heard; else `wait_s`.

    What else stands in the header is ignored, as that RFC wants it.
    """
    for match in _PREFERENCE.finditer(prefer):
        wait_s = 0 if match[2] is None else min(float(match[2]), MAX_WAIT_S)
        response.headers["Preference-Applied"] = "respond-async" if match[2] is None else f"wait={wait_s:g}"
        if match[2] is None:
            break
    return wait_s
