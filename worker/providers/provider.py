"""The contract of a provider: one method, which never raises for what a vendor does wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from worker.cost import Usage
from worker.job import Answer, ChatRequest
from worker.signals import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """How one call ended. `error_code` is the vendor's short code, cleaned to `[a-z0-9_.-]`, never its message.

    `retry_after_s` is the wait the vendor asked for, 0 to 3600. `usage` may be known although there is no answer.
    `remaining_requests`, `remaining_tokens`: what it says is left of its rate limits.
    `first_token_s`: of a streamed answer, from the request on until its first token was here.
    """

    signal: Signal
    answer: Answer | None = None
    usage: Usage | None = None
    http_status: int | None = None
    error_code: str | None = None
    retry_after_s: float | None = None
    first_token_s: float | None = None
    remaining_requests: int | None = None
    remaining_tokens: int | None = None


Read = Callable[[int, Mapping[str, str], bytes], Reply]  # of HTTP status, headers and body


class Provider(Protocol):
    """One callable endpoint: base URL, key and model. Unit of breaker, limits and price."""

    name: str
    model: str

    async def complete(self, request: ChatRequest, *, timeout_s: float, call_id: str) -> Reply:
        """Sends one HTTP request and reads the whole answer, within `timeout_s` seconds from now; no hidden retry.

        `call_id` goes out as `X-Client-Request-Id`, so that a vendor's log can be held against `provider_calls`.
        Raises nothing but `asyncio.CancelledError`.
        """
        ...
