"""A job as a value: its request, its states with the legal moves between them, and its answer."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import UUID

from worker.cost import Usage


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
    def from_json(cls, body: Mapping[str, Any]) -> ChatRequest:
        return cls(messages=body["messages"], parameters=body.get("parameters", {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a provider said. `degraded` names how an answer fell short of a full one (`cache`, `static`, ...), else None."""

    content: str | None
    finish_reason: str
    provider: str
    model: str
    usage: Usage
    tool_calls: list[dict[str, Any]] | None = None
    degraded: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__} | {"usage": self.usage.to_json()}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Answer:
        return cls(**{**body, "usage": Usage(**body["usage"])})


def new_id() -> UUID:
    """A UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then 74 random bits, so that ids sort by creation."""
    random = int.from_bytes(os.urandom(10), "big")
    value = (time.time_ns() // 1_000_000) << 80 | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62 | (random & (1 << 62) - 1)
    return UUID(int=value)
