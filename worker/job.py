"""A job as a value: its request, its states with the legal moves between them, and its answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import UUID

from worker.cost import Usage
from worker.errors import Unreadable


class JobState(StrEnum):
    QUEUED = "queued"  # submitted, or to be attempted again from `run_at` on
    RUNNING = "running"  # claimed by one worker process under one fence
    SUCCEEDED = "succeeded"  # exactly one result row
    FAILED = "failed"  # no provider can or may answer it; an operator may requeue it
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # its deadline passed first


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.EXPIRED}),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED}),
    # What ended stays as it is, but for an operator's requeue.
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.CANCELLED: frozenset({JobState.QUEUED}),
    JobState.EXPIRED: frozenset({JobState.QUEUED}),
}
TERMINAL = frozenset(JobState) - {JobState.QUEUED, JobState.RUNNING}
MAX_DEADLINE_S = 7 * 86_400.0


class Lane(StrEnum):
    """One Celery queue each. People wait on `interactive`; `bulk` takes what is left."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What is asked, in OpenAI's words; immutable once submitted.

    `parameters` are passed to every provider as they are (`temperature`, `max_tokens`, `response_format`, ...).
    """

    messages: list[dict[str, Any]]
    parameters: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"messages": self.messages, "parameters": self.parameters}

    @classmethod
    def from_json(cls, body: Any) -> ChatRequest:
        """What `to_json` wrote. Raises Unreadable for all else: a part that is not known here may change what is asked."""
        if isinstance(body, dict) and body.keys() <= {"messages", "parameters"}:
            messages, parameters = body.get("messages"), body.get("parameters", {})
            if _objects(messages) and messages and isinstance(parameters, dict):
                return cls(messages, parameters)
        raise Unreadable("the request of this job is not one this version wrote: submit it again, or let newer workers have it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a provider said. `degraded` names how an answer fell short of a full one, else None: `smaller`, `cache`, `static`.

    `age_s`: of one that was kept from an earlier job, with what it used and cost then; None for a new one.
    """

    content: str | None
    finish_reason: str
    provider: str
    model: str
    usage: Usage
    tool_calls: list[dict[str, Any]] | None = None
    degraded: str | None = None
    age_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__} | {"usage": self.usage.to_json()}

    @classmethod
    def from_json(cls, body: Any) -> Answer:
        """What `to_json` wrote, without what a newer version added. Raises Unreadable where something is missing or another type."""
        if isinstance(body, dict) and all(fits(body.get(name)) for name, fits in _ANSWER.items()):
            estimated = body["usage"].get("estimated", False)
            counts = {name: body["usage"].get(name) for name in Usage.__slots__ if name != "estimated"}
            if isinstance(estimated, bool) and all(count is None or type(count) is int for count in counts.values()):
                said: dict[str, Any] = {name: body.get(name) for name in _ANSWER} | {"usage": Usage(**counts, estimated=estimated)}
                return cls(**said)
        raise Unreadable("the answer of this job is not one this version wrote: read it with the version that did")


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number_or_none(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


_ANSWER: Mapping[str, Callable[[Any], bool]] = {
    "content": _text_or_none,
    "finish_reason": _text,
    "provider": _text,
    "model": _text,
    "usage": lambda value: isinstance(value, dict),
    "tool_calls": lambda value: value is None or _objects(value),
    "degraded": _text_or_none,
    "age_s": _number_or_none,
}


def new_id() -> UUID:
    """A UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then 74 random bits, so that ids sort by creation."""
    random = int.from_bytes(os.urandom(10), "big")
    value = (time.time_ns() // 1_000_000) << 80 | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62 | (random & (1 << 62) - 1)
    return UUID(int=value)
