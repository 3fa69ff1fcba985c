"""Chat completions as OpenAI answers them, by way of the interactive lane.

A client that hangs up while it waits has its job cancelled, for nobody would read the answer. Not so with an
`Idempotency-Key`: the job goes on, and asking again under the key joins it, so it is paid once. Without a key each
request, and each retry of an SDK, is a new job.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool
from starlette.datastructures import Headers

from api.auth import Submits
from api.chat_schema import described
from api.chunks import COMMENT, EventStream, event, events
from api.follow import BEAT_S
from api.openai_errors import FINAL, OpenAIError, documented_openai
from api.parts import Opened, Parts
from api.spelling import IdempotencyKey, NoNul
from worker import intervene, reads, waiting
from worker.batchlines import LONGEST_MODEL, chat_request
from worker.cost import Usage
from worker.errors import KeyReused, UsageError
from worker.export import completion
from worker.job import Answer, ChatRequest, JobState
from worker.signals import Signal
from worker.submit import NewJob
from worker.views import JobView

MAX_WAIT_S = 600.0  # how long the SDK waits unless it is told otherwise

_Word = Annotated[str, Field(max_length=512), NoNul]

router = APIRouter(prefix="/v1", tags=["openai"])


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = Field(False, description="Taken and not needed: the answer comes in one piece.")


class ChatIn(BaseModel):
    """A chat request in OpenAI's words. Fields not named here go to the provider: `temperature`, `max_tokens`, `tools`, ..."""

    model_config = ConfigDict(extra="allow", json_schema_extra=lambda schema: described(schema, {"model": "default"}))

    model: str = Field(min_length=1, max_length=LONGEST_MODEL, description="A chain, a provider, or a provider's model.")
    messages: list[dict[str, Any]] = Field(min_length=1)
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[_Word, _Word] | None = Field(None, max_length=16, description="Kept with the job, sent to nobody.")

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def request(self) -> ChatRequest:
        """Raises OpenAIError naming the field that cannot be used."""
        try:
            return chat_request({"messages": self.messages, **(self.model_extra or {})})
        except ValueError as error:
            raise OpenAIError(400, str(error), param=str(error).partition(":")[0]) from None


_ANSWER = Answer(content="Hello! How can I help?", finish_reason="stop", provider="deepseek", model="deepseek-v3.2", usage=Usage(12, 5))
_COMPLETION = completion(UUID("0193e5c8-f0a6-7c9a-8d0f-6a1b2c3d4e5f"), _ANSWER, Decimal("0.00000546"))


class ChatOut(BaseModel):
    """OpenAI's chat completion, and under `backstop` the provider that answered, how degraded, at what cost."""

    model_config = ConfigDict(json_schema_extra={"example": _COMPLETION})

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any] | None
    backstop: dict[str, Any]


_HEADERS = {
    "x-backstop-job-id": "The job: GET /v1/jobs/{id} tells more of it.",
    "x-backstop-provider": "Who answered.",
    "x-backstop-cost-usd": "What its calls cost, as far as it is known.",
    "x-backstop-degraded": "How it falls short of a full answer, if it does.",
}
_DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ChatOut,
        "description": "The answer; with `stream` as server-sent events",
        "content": {"text/event-stream": {"example": "".join(events(_COMPLETION, usage=False))}},
        "headers": {name: {"description": said, "schema": {"type": "string"}} for name, said in _HEADERS.items()},
    },
    **documented_openai(400, 401, 403, 404, 409, 413, 429, 500, 503, 504),
}


@router.post("/chat/completions", response_model=None, responses=_DOCUMENTED)
async def create_chat_completion(
    body: ChatIn,
    request: Request,
    caller: Submits,
    parts: Opened,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """The answer to a chat request, after as many providers as it takes. It is a job; `x-backstop-job-id` names it.

    It has as long as the client says it waits (`x-stainless-read-timeout`, seconds), 600 s at most. The same
    `Idempotency-Key` with the same request joins the earlier job. With `stream` the whole answer comes in one piece
    once it is there; after 15 s of waiting the stream begins with comments, and an error then stands in it.
    """
    asked = await _asked(body, request, caller.tenant, parts, idempotency_key)
    beats = _beats(asked)
    if body.stream and await anext(beats, _OVER) is not _OVER:
        return EventStream(_late_events(asked, beats, body.wants_usage), headers={"x-backstop-job-id": str(asked.job_id)})
    async for _ in beats:
        pass
    job = await _answered(asked)
    if body.stream:
        return EventStream(events(_completion(job), usage=body.wants_usage), headers=_headers(job))
    return JSONResponse(_completion(job), headers=_headers(job))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A job whose client waits for it. `kept`: it goes on without the client."""

    parts: Parts
    request: Request
    tenant: str
    job_id: UUID
    wait_s: float
    kept: bool


async def _asked(body: ChatIn, request: Request, tenant: str, parts: Parts, key: str | None) -> _Asked:
    try:
        parts.config.chain(body.model)
    except UsageError as error:
        raise OpenAIError(404, str(error), code="model_not_found", param="model") from None
    patience_s = _patience_s(request.headers)
    way_back_s = min(1.0, patience_s / 10)
    new = NewJob(
        request=body.request(),
        chain=body.model,
        deadline_s=patience_s - way_back_s,
        tenant=tenant,
        idempotency_key=key,
        metadata=body.metadata,
    )
    try:
        submitted = await parts.admission.submit(parts.publish, new)
    except KeyReused as error:
        raise OpenAIError(409, str(error), code="idempotency_key_reused", headers=FINAL) from None
    wait_s = patience_s - way_back_s / 2  # the job is given time to say why it expired
    return _Asked(parts=parts, request=request, tenant=tenant, job_id=submitted.job_id, wait_s=wait_s, kept=key is not None)


def _patience_s(headers: Headers) -> float:
    """How long the client waits, as the SDKs of Python and of JavaScript say it."""
    for name in ("x-stainless-read-timeout", "x-stainless-timeout"):
        try:
            patience_s = float(headers.get(name, ""))
        except ValueError:
            continue
        if 0 < patience_s < math.inf:
            return min(patience_s, MAX_WAIT_S)
    return MAX_WAIT_S


_OVER = object()


async def _beats(asked: _Asked) -> AsyncIterator[None]:
    """One every `BEAT_S` until the job has ended or its time is over.

    Raises OpenAIError when the client hangs up first; its job is cancelled then, unless it is kept.
    """
    over = asyncio.create_task(asked.parts.endings.wait([asked.job_id], asked.wait_s))
    gone = asyncio.create_task(_hung_up(asked.request))
    try:
        while not (await asyncio.wait({over, gone}, timeout=BEAT_S, return_when=asyncio.FIRST_COMPLETED))[0]:
            yield
        if over.done():
            await over
            return
    finally:
        over.cancel()
        gone.cancel()
    if not asked.kept:
        await _cancel(asked)
    raise OpenAIError(499, "the client hung up")


async def _late_events(asked: _Asked, beats: AsyncIterator[None], usage: bool) -> AsyncIterator[str]:
    """The stream of an answer that is not there yet: the status is sent, so an error becomes its last event."""
    yield COMMENT  # that it waits is why there is a stream already
    try:
        async for _ in beats:
            yield COMMENT
        job = await _answered(asked)
    except OpenAIError as error:
        yield event(error.body())
        return
    for said in events(_completion(job), usage=usage):
        yield said


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _cancel(asked: _Asked) -> None:
    if (await intervene.cancel(asked.parts.db, job_ids=[asked.job_id], tenant=asked.tenant)).cancelled:
        await waiting.announce(asked.parts.redis, [asked.job_id])


async def _answered(asked: _Asked) -> JobView:
    """The job with its answer. Raises OpenAIError for one that has none."""
    job = await reads.job(asked.parts.db, asked.job_id, asked.tenant)
    assert job is not None
    if job.answer is not None:
        return job
    if job.ended:
        raise _failure(job)
    if asked.kept:
        message = "the job goes on: ask again with the same Idempotency-Key"
        raise OpenAIError(504, message, code="still_running", headers=_headers(job))
    await _cancel(asked)
    message = f"no answer within {asked.wait_s:.3g} s, the job is cancelled"
    raise OpenAIError(504, message, code="deadline_exceeded", headers=FINAL | _headers(job))


# How a job ended: by its state, else by the code of its error. What is not here is a 503.
_FAILURES: Mapping[str, tuple[int, str]] = {
    JobState.CANCELLED: (409, "job_cancelled"),
    JobState.EXPIRED: (504, "deadline_exceeded"),
    Signal.INVALID_REQUEST: (400, "invalid_request"),
    Signal.UNSUPPORTED: (400, "unsupported"),
    Signal.CONTENT_POLICY: (400, "content_filter"),
    Signal.CONTEXT_TOO_LONG: (400, "context_length_exceeded"),
    "unreadable_request": (500, "unreadable_request"),
    "unreadable_answer": (500, "unreadable_answer"),
    "unstorable": (500, "unstorable"),
}


def _failure(job: JobView) -> OpenAIError:
    """A client that tried again would buy what the job has tried already, so it is told not to."""
    error = job.error or {}
    code = str(error.get("code", job.state))
    status, code = _FAILURES.get(job.state) or _FAILURES.get(code) or (503, code)
    reasons = ", ".join(_reason(reason) for reason in error.get("providers", []))
    message = error.get("message", f"the job was {job.state}") + (f" ({reasons})" if reasons else "")
    return OpenAIError(status, message, code=code, headers=FINAL | _headers(job))


def _reason(reason: Mapping[str, Any]) -> str:
    status = f" {reason['http_status']}" if "http_status" in reason else ""
    return f"{reason['provider']}: {reason['reason']}{status}"


def _headers(job: JobView) -> dict[str, str]:
    """What a client may want to know beside the answer."""
    headers = {"x-backstop-job-id": str(job.id)}
    if job.cost_usd is not None:
        headers["x-backstop-cost-usd"] = format(job.cost_usd.normalize(), "f")
    if job.answer is not None:
        headers["x-backstop-provider"] = job.answer.provider
        if job.answer.degraded is not None:
            headers["x-backstop-degraded"] = job.answer.degraded
    return headers


def _completion(job: JobView) -> dict[str, Any]:
    assert job.answer is not None
    return completion(job.id, job.answer, job.cost_usd)
