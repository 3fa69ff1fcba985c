"""Reads an answer of Anthropic's Messages API: pure, bounded, and never surprised by what comes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from worker.cost import Usage
from worker.job import Answer
from worker.providers.headroom import reset_s, with_headroom
from worker.providers.openai_answers import to_count, to_json
from worker.providers.openai_errors import Complaint, complaint, meaning
from worker.providers.provider import Reply
from worker.resilience.backoff import retry_after_s
from worker.signals import Signal

# What an `invalid_request_error` says, lower case; of a message only, which is read and forgotten.
_PHRASES: tuple[tuple[str, Signal], ...] = (
    ("api usage limits", Signal.QUOTA_EXHAUSTED),  # a spend limit of one's own: a 400
    ("credit balance is too low", Signal.QUOTA_EXHAUSTED),
    ("prompt is too long", Signal.CONTEXT_TOO_LONG),
    ("exceed context limit", Signal.CONTEXT_TOO_LONG),
    ("content filtering policy", Signal.CONTENT_POLICY),
    ("maximum allowed number of output tokens", Signal.UNSUPPORTED),
    ("output_config", Signal.UNSUPPORTED),
    ("not support", Signal.UNSUPPORTED),  # prefill, effort, images: by the model
    ("for this model", Signal.UNSUPPORTED),
)
_FINISH_NAMES: Mapping[str, str] = {
    "end_turn": "stop", "stop_sequence": "stop", "tool_use": "tool_calls", "max_tokens": "length",
    "model_context_window_exceeded": "length",
}  # fmt: skip


def read_reply(status: int, headers: Mapping[str, str], body: bytes, *, provider: str, model: str, now: float) -> Reply:
    """What an HTTP response means. `now` is Unix time, for waits that are given as dates. Never raises."""
    return with_headroom(_reply(status, headers, body, provider, model, now), headers)


def _reply(status: int, headers: Mapping[str, str], body: bytes, provider: str, model: str, now: float) -> Reply:
    decoded = to_json(body)
    error = complaint(decoded)
    if status >= 300 or error is not None:
        return _refusal(status, headers, error or Complaint(), decoded, now)
    if decoded is None:
        return Reply(signal=Signal.MALFORMED, http_status=status, error_code="not_json")
    blocks = decoded.get("content") if isinstance(decoded, dict) else None
    if not isinstance(blocks, list):
        return Reply(signal=Signal.MALFORMED, usage=_usage_in(decoded), http_status=status, error_code="no_content")
    return _of_blocks([block for block in blocks if isinstance(block, dict)], decoded, status, provider=provider, model=model)


def usage_of(usage: Mapping[str, Any]) -> Usage:
    """Normalised. Anthropic's input excludes what was read from its cache and what was written to it; ours has both.

    Writing to the cache costs 1.25 (an hour long: 2) times the input rate, which `Usage` cannot say: such a call is booked
    too low by a quarter of its written tokens. Only requests that ask for caching write to it, and ours do not.
    """
    fresh, written, read = (
        to_count(usage.get(name)) for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    )
    details = usage.get("output_tokens_details")
    thinking = to_count(details.get("thinking_tokens")) if isinstance(details, dict) else None
    total = None if fresh is None else to_count(fresh + (written or 0) + (read or 0))
    return Usage(total, to_count(usage.get("output_tokens")), None if total is None else read, thinking)


def _of_blocks(blocks: list[dict[str, Any]], decoded: dict[str, Any], status: int, *, provider: str, model: str) -> Reply:
    usage = _usage_in(decoded)
    stopped = decoded.get("stop_reason")
    stopped = stopped.lower()[:64] if isinstance(stopped, str) and stopped else "end_turn"
    if stopped == "refusal":
        return Reply(signal=Signal.CONTENT_POLICY, usage=usage, http_status=status, error_code="refusal")
    if stopped == "pause_turn":  # to be continued by its caller, which a job is not
        return Reply(signal=Signal.UNFIT, usage=usage, http_status=status, error_code="finish_pause_turn")
    content = "".join(block["text"] for block in blocks if block.get("type") == "text" and isinstance(block.get("text"), str))
    tools = [_tool_call(block) for block in blocks if block.get("type") == "tool_use"] or None
    finish = _FINISH_NAMES.get(stopped, stopped)
    if not tools and not content.strip():
        signal, code = (Signal.UNFIT, "empty_length") if finish == "length" else (Signal.MALFORMED, "empty_answer")
        return Reply(signal=signal, usage=usage, http_status=status, error_code=code)
    said = decoded.get("model")
    answer = Answer(
        content=content or None,
        finish_reason=finish,
        provider=provider,
        model=said[:200] if isinstance(said, str) and said else model,
        usage=usage,
        tool_calls=tools,
    )
    return Reply(signal=Signal.ANSWERED, answer=answer, usage=usage, http_status=status)


def _tool_call(block: Mapping[str, Any]) -> dict[str, Any]:
    given = block.get("input")
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)  # a string: cut off by max_tokens
    return {"id": block.get("id"), "type": "function", "function": {"name": block.get("name"), "arguments": arguments}}


def _usage_in(decoded: Any) -> Usage:
    usage = decoded.get("usage") if isinstance(decoded, dict) else None
    return usage_of(usage) if isinstance(usage, dict) else Usage()


def _refusal(status: int, headers: Mapping[str, str], error: Complaint, decoded: Any, now: float) -> Reply:
    detail = _detail(decoded)
    if detail == "enforced_spend_limit_reached":  # a rate_limit_error that lasts until the month is over
        return Reply(signal=Signal.QUOTA_EXHAUSTED, http_status=status, error_code=detail)
    by_phrase = (signal for phrase, signal in _PHRASES if phrase in error.message)
    signal = next(by_phrase, None) if status in (200, 400) else None
    stated_s = retry_after_s(headers, now)
    return Reply(
        signal=signal or meaning(status, error),
        http_status=status,
        error_code="redirect" if 300 <= status < 400 else error.code,
        retry_after_s=reset_s(headers, now) if stated_s is None else stated_s,
    )


def _detail(decoded: Any) -> str | None:
    error = decoded.get("error") if isinstance(decoded, dict) else None
    details = error.get("details") if isinstance(error, dict) else None
    code = details.get("error_code") if isinstance(details, dict) else None
    return code if isinstance(code, str) else None
