"""Reads an answer of the OpenAI-compatible dialect: pure, bounded, and never surprised by what a vendor sends."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from worker.cost import Usage
from worker.job import Answer
from worker.providers.headroom import reset_s, with_headroom
from worker.providers.openai_errors import Complaint, complaint, meaning, plain
from worker.providers.provider import Reply
from worker.resilience.backoff import retry_after_s
from worker.signals import POLICIES, Signal

_MOST_TOKENS = 2**31 - 1  # what the ledger's columns hold
# Raw line breaks in strings are forgiven; NaN and Infinity, which Postgres refuses, become null.
_decode = json.JSONDecoder(strict=False, parse_constant=lambda _: None).decode
_UNSTORABLE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
_ESCAPES = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a pair: one character, stays
    r"|\\u(0000|[dD][89a-fA-F][0-9a-fA-F]{2})"  # NUL or half a pair: Postgres refuses both
    r"|\\.",
    re.DOTALL,
)
_COMMENTS = re.compile(r"(?:\s*:[^\n]*\n)+")  # keep-alives in the manner of event streams; blank ones JSON allows anyway
_FINISH_SIGNALS: Mapping[str, Signal] = {
    **dict.fromkeys(
        ("content_filter", "safety", "sensitive", "recitation", "blocklist", "prohibited_content", "spii", "refusal"),
        Signal.CONTENT_POLICY,
    ),
    **dict.fromkeys(("error", "network_error", "abort"), Signal.SERVER_ERROR),
    "insufficient_system_resource": Signal.OVERLOADED,
    **dict.fromkeys(("function_call_filter", "malformed_function_call"), Signal.UNFIT),  # Gemini: its model wrote no valid call
}
_FINISH_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("max_tokens", "model_length", "model_context_window_exceeded"), "length"),
    **dict.fromkeys(("end_turn", "eos", "complete", "stop_sequence"), "stop"),
    **dict.fromkeys(("tool_use", "function_call"), "tool_calls"),
}


def read_reply(status: int, headers: Mapping[str, str], body: bytes, *, provider: str, model: str, now: float) -> Reply:
    """What an HTTP response means. `now` is Unix time, for a Retry-After that names a date. Never raises."""
    return with_headroom(_read(status, headers, body, provider, model, now), headers)


def _read(status: int, headers: Mapping[str, str], body: bytes, provider: str, model: str, now: float) -> Reply:
    decoded = to_json(body)
    error = complaint(decoded)
    if error is not None or status >= 300:
        return _refusal(status, headers, error or plain(body), _usage_in(decoded), now)
    if decoded is None:
        return Reply(signal=Signal.MALFORMED, http_status=status, error_code="not_json")
    choice = _first_choice(decoded)
    if choice is None:
        return Reply(signal=Signal.MALFORMED, usage=_usage_in(decoded), http_status=status, error_code="no_choices")
    if choice.get("error"):
        return _refusal(status, headers, complaint(choice) or Complaint(), _usage_in(decoded), now)
    return _of_choice(choice, decoded, status, provider=provider, model=model)


def _of_choice(choice: dict[str, Any], decoded: dict[str, Any], status: int, *, provider: str, model: str) -> Reply:
    usage = _usage_in(decoded)
    finish = choice.get("finish_reason")
    finish = finish.lower()[:64] if isinstance(finish, str) and finish else "stop"
    finish = _FINISH_NAMES.get(finish, finish)
    signal = _FINISH_SIGNALS.get(finish.split(":")[0])
    if signal is not None:
        return Reply(signal=signal, usage=usage, http_status=status, error_code=f"finish_{finish.split(':')[0]}")
    message = choice["message"] if isinstance(choice.get("message"), dict) else {}
    content, tools = _content(message.get("content")), _tool_calls(message)
    if not tools and not (content or "").strip():
        return _empty(message, finish, usage, status)
    said = decoded.get("model")
    answer = Answer(
        content=content,
        finish_reason=finish,
        provider=provider,
        model=said[:200] if isinstance(said, str) and said else model,
        usage=usage,
        tool_calls=tools,
    )
    return Reply(signal=Signal.ANSWERED, answer=answer, usage=usage, http_status=status)


def _empty(message: Mapping[str, Any], finish: str, usage: Usage, status: int) -> Reply:
    if message.get("refusal"):
        return Reply(signal=Signal.CONTENT_POLICY, usage=usage, http_status=status, error_code="refusal")
    if finish == "length":  # thinking used up max_tokens: the request's fault, not the provider's illness
        return Reply(signal=Signal.UNFIT, usage=usage, http_status=status, error_code="empty_length")
    return Reply(signal=Signal.MALFORMED, usage=usage, http_status=status, error_code="empty_answer")


def _refusal(status: int, headers: Mapping[str, str], error: Complaint, usage: Usage, now: float) -> Reply:
    signal = meaning(status, error)
    waits = (retry_after_s(headers, now), error.retry_delay_s if POLICIES[signal].block_s else None, reset_s(headers, now))
    return Reply(
        signal=signal,
        usage=None if usage == Usage() else usage,
        http_status=status,
        error_code="redirect" if 300 <= status < 400 else error.code,
        retry_after_s=next((wait_s for wait_s in waits if wait_s is not None), None),
    )


def to_json(body: bytes) -> Any:
    """The decoded body, storable in Postgres (no NUL, no half surrogate), or None when it is no JSON."""
    text = body.decode("utf-8-sig", "replace").replace("\0", "\ufffd")
    comments = _COMMENTS.match(text)
    if comments:
        text = text[comments.end() :]
    if _UNSTORABLE.search(text):
        text = _ESCAPES.sub(lambda match: r"\ufffd" if match[1] else match[0], text)
    try:
        return _decode(text)
    except (ValueError, RecursionError):
        return None


def _first_choice(decoded: Any) -> dict[str, Any] | None:
    choices = decoded.get("choices") if isinstance(decoded, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or not (isinstance(choice.get("message"), dict) or choice.get("error") or _is_blocked(choice)):
        return None
    return choice


def _is_blocked(choice: Mapping[str, Any]) -> bool:
    """Gemini says of a blocked prompt that it is, and leaves the message out."""
    finish = choice.get("finish_reason")
    return isinstance(finish, str) and finish.lower().split(":")[0] in _FINISH_SIGNALS


def _content(value: Any) -> str | None:
    """Text; or the text parts of a list of parts (Mistral sends its thinking beside them)."""
    if isinstance(value, list):
        return "".join(part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))
    return value if isinstance(value, str) else None


def _tool_calls(message: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    calls = message.get("tool_calls")
    older = message.get("function_call")
    if not calls and isinstance(older, dict):
        return [{"id": None, "type": "function", "function": older}]
    return [call for call in calls if isinstance(call, dict)] or None if isinstance(calls, list) else None


def _usage_in(decoded: Any) -> Usage:
    usage = decoded.get("usage") if isinstance(decoded, dict) else None
    return usage_of(usage) if isinstance(usage, dict) else Usage()


def usage_of(usage: Mapping[str, Any]) -> Usage:
    """Normalised. Prompt tokens include cached ones here; hidden thinking (Gemini, xAI) is what the total adds.

    Of three counts the third, where one is missing, is the difference of the others.
    """
    prompt, completion, total = (to_count(usage.get(f"{name}_tokens")) for name in ("prompt", "completion", "total"))
    cached = _first_count(_part(usage, "prompt_tokens_details", "cached_tokens"), usage.get("prompt_cache_hit_tokens"),
                          usage.get("cached_tokens"))  # fmt: skip
    reasoning = _first_count(_part(usage, "completion_tokens_details", "reasoning_tokens"), usage.get("reasoning_tokens"))
    if total is not None and (prompt is None) != (completion is None) and total >= (prompt or completion or 0):
        prompt, completion = (total - (completion or 0), completion) if prompt is None else (prompt, total - prompt)
    if prompt is not None and completion is not None and total is not None and total > prompt + completion:
        hidden = total - prompt - completion
        completion, reasoning = total - prompt, max(reasoning or 0, hidden)
    return Usage(prompt, completion, cached if prompt is None or cached is None else min(cached, prompt), reasoning)


def _part(usage: Mapping[str, Any], section: str, name: str) -> Any:
    details = usage.get(section)
    return details.get(name) if isinstance(details, dict) else None


def _first_count(*values: Any) -> int | None:
    return next((count for count in map(to_count, values) if count is not None), None)


def to_count(value: Any) -> int | None:
    """A token count out of int, float or string; None out of anything else, negative or past the ledger's columns."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        count = int(value) if isinstance(value, int) else round(float(value))
    except (ValueError, OverflowError):
        return None
    return count if 0 <= count <= _MOST_TOKENS else None
