"""What an error of an OpenAI-compatible vendor means: its codes are asked first, then phrases, then the HTTP status.

The status alone lies (a spent budget is a 429, a wrong key a 400). Vendors put things in different places;
`complaint` finds them, the tables below judge them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from worker.signals import Signal

# Codes, types and statuses that mean one thing whatever the HTTP status says. Normalised by `_word`.
_CODES: Mapping[Signal, tuple[str, ...]] = {
    Signal.QUOTA_EXHAUSTED: (
        "insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "billing_error",
        "credit_balance_exhausted", "enforced_spend_limit_reached", "insufficient_balance", "insufficient_credits",
        "insufficient_user_quota", "pre_consume_token_quota_failed", "exceeded_current_quota_error", "budget_exceeded",
        "arrearage", "quota_exceeded", "1113",
    ),
    Signal.CONTEXT_TOO_LONG: (
        "context_length_exceeded", "exceed_context_size_error", "contextwindowexceedederror", "request_too_large",
        "string_above_max_length", "3051",
    ),
    Signal.CONTENT_POLICY: (
        "content_filter", "content_policy_violation", "responsibleaipolicyviolation", "moderation_blocked",
        "invalid_prompt", "data_inspection_failed", "datainspectionfailed", "prohibited_content",
        "contentpolicyviolationerror", "1301",
    ),
    Signal.UNAUTHORIZED: (
        "invalid_api_key", "authentication_error", "invalid_authentication_error", "api_key_invalid", "unauthenticated",
        "permission_denied", "permission_error", "account_deactivated", "unsupported_country_region_territory",
        "invalidapikey", "service_disabled", "user_location_not_supported",
    ),
    Signal.MODEL_NOT_FOUND: (
        "model_not_found", "model_not_available", "model_decommissioned", "deploymentnotfound", "notfounderror",
        "not_found_error", "invalid_model",
    ),
    Signal.SLOW_DOWN: ("slow_down", "slowdown"),
    Signal.OVERLOADED: (
        "overloaded_error", "engine_overloaded", "engine_overloaded_error", "server_overloaded", "capacity_exceeded",
        "insufficient_system_resource",
    ),
    Signal.UNFIT: ("json_validate_failed", "tool_use_failed"),  # Groq: 400 because of what its model wrote, not we
}  # fmt: skip

# What vendors without codes say, lower case; of a message only, which is read and forgotten.
_PHRASES: tuple[tuple[str, Signal], ...] = (
    ("insufficient balance", Signal.QUOTA_EXHAUSTED),
    ("insufficient credit", Signal.QUOTA_EXHAUSTED),
    ("credit balance is too low", Signal.QUOTA_EXHAUSTED),
    ("credits are depleted", Signal.QUOTA_EXHAUSTED),
    ("maximum context length", Signal.CONTEXT_TOO_LONG),
    ("context window", Signal.CONTEXT_TOO_LONG),
    ("context size", Signal.CONTEXT_TOO_LONG),
    ("context length", Signal.CONTEXT_TOO_LONG),
    ("prompt is too long", Signal.CONTEXT_TOO_LONG),
    ("input token count", Signal.CONTEXT_TOO_LONG),
    ("max_new_tokens must be <=", Signal.CONTEXT_TOO_LONG),
    ("max_new_tokens` must be <=", Signal.CONTEXT_TOO_LONG),
    ("too large for model with", Signal.CONTEXT_TOO_LONG),
    ("reduce the length of the", Signal.CONTEXT_TOO_LONG),
    ("content management policy", Signal.CONTENT_POLICY),
    ("content exists risk", Signal.CONTENT_POLICY),
    ("safety system", Signal.CONTENT_POLICY),
    ("input was flagged", Signal.CONTENT_POLICY),
    ("violates usage guidelines", Signal.CONTENT_POLICY),
    ("api key not valid", Signal.UNAUTHORIZED),
    ("incorrect api key", Signal.UNAUTHORIZED),
    ("user location is not supported", Signal.UNAUTHORIZED),
    ("model not exist", Signal.MODEL_NOT_FOUND),
    ("not a valid model", Signal.MODEL_NOT_FOUND),
    ("no available channel", Signal.MODEL_NOT_FOUND),
    ("overloaded", Signal.OVERLOADED),
)

# Words that say no more than a status would; they count where there is none, inside a 200.
_GENERIC: Mapping[str, int] = {
    "invalid_request_error": 400, "badrequesterror": 400, "bad_request": 400, "invalid_argument": 400,
    "rate_limit_exceeded": 429, "rate_limit_error": 429, "rate_limited": 429, "requests": 429, "tokens": 429,
    "resource_exhausted": 429, "too_many_requests": 429,
    "timeout": 504, "timeout_error": 504, "deadline_exceeded": 504, "service_unavailable": 503, "unavailable": 503,
    "server_error": 500, "api_error": 500, "internal": 500, "internal_error": 500, "internalservererror": 500,
}  # fmt: skip

_STATUSES: Mapping[int, Signal] = {
    401: Signal.UNAUTHORIZED,
    402: Signal.QUOTA_EXHAUSTED,
    403: Signal.UNAUTHORIZED,
    404: Signal.MODEL_NOT_FOUND,
    405: Signal.MODEL_NOT_FOUND,
    407: Signal.UNAUTHORIZED,
    408: Signal.REQUEST_TIMEOUT,
    409: Signal.CONFLICT,
    410: Signal.MODEL_NOT_FOUND,
    413: Signal.CONTEXT_TOO_LONG,
    424: Signal.SERVER_ERROR,
    425: Signal.CONFLICT,
    429: Signal.RATE_LIMITED,
    451: Signal.UNAUTHORIZED,
    498: Signal.OVERLOADED,  # Groq, flex capacity
    499: Signal.SERVER_ERROR,
    503: Signal.OVERLOADED,
    504: Signal.REQUEST_TIMEOUT,
    524: Signal.REQUEST_TIMEOUT,
    529: Signal.OVERLOADED,
}

_MEANING: Mapping[str, Signal] = {word: signal for signal, words in _CODES.items() for word in words}
_SHORT = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_READ_CHARS = 4000


@dataclass(frozen=True, slots=True)
class Complaint:
    """What a vendor put into an error: short codes, most telling first; its message, lower case; the wait it names."""

    codes: tuple[str, ...] = ()
    message: str = ""
    retry_delay_s: float | None = None

    @property
    def code(self) -> str | None:
        """The one to record: rather a word than a number, which is mostly the HTTP status again."""
        return next((code for code in self.codes if not code.isdigit()), next(iter(self.codes), None))


def complaint(body: Any) -> Complaint | None:
    """The error in a decoded body of any shape, or None when there is none in it.

    OpenAI: {"error": {"message", "type", "code"}}; Gemini: a list of that, with "status" and "details";
    Ollama: {"error": "text"}; Mistral and vLLM: {"object": "error", "message", "type", "code"}; FastAPI: {"detail"};
    Azure's gateway: {"statusCode", "message"}.
    """
    if isinstance(body, list):
        body = body[0] if body else None
    if not isinstance(body, dict):
        return None
    error = body.get("error")
    if not error and _is_bare_error(body):
        error = body
    if isinstance(error, dict):
        return _of_fields(error)
    return Complaint(message=_text(error)) if error else None


def _is_bare_error(body: Mapping[str, Any]) -> bool:
    if body.get("object") == "error" or body.get("type") == "error":
        return True
    return "choices" not in body and any(key in body for key in ("message", "detail", "code", "statusCode"))


def meaning(status: int, error: Complaint) -> Signal:
    """The signal of an error answer. `status` is the HTTP one; below 400 the error's own words take its place."""
    for code in error.codes:
        if code in _MEANING:
            return _MEANING[code]
        if code.endswith(("spend_limit_exceeded", "usage_limit_exceeded")):
            return Signal.QUOTA_EXHAUSTED
    for phrase, signal in _PHRASES:
        if phrase in error.message:
            return signal
    if 300 <= status < 400:
        return Signal.MODEL_NOT_FOUND  # base_url points to the wrong place
    status = status if status >= 400 else _stated_status(error)
    if status in _STATUSES:
        return _STATUSES[status]
    return Signal.SERVER_ERROR if status >= 500 else Signal.INVALID_REQUEST


def _stated_status(error: Complaint) -> int:
    for code in error.codes:
        if code in _GENERIC:
            return _GENERIC[code]
        if re.fullmatch("[45][0-9][0-9]", code):
            return int(code)
    return 500


def _of_fields(error: Mapping[str, Any]) -> Complaint:
    inner = error.get("innererror")
    metadata = error.get("metadata")
    listed = error.get("details")
    details = [detail for detail in listed if isinstance(detail, dict)] if isinstance(listed, list) else []
    found = [
        error.get("code"),
        inner.get("code") if isinstance(inner, dict) else None,
        *(detail.get("reason") for detail in details),
        error.get("status"),
        error.get("type"),
        error.get("statusCode"),
        metadata.get("error_type") if isinstance(metadata, dict) else None,
    ]
    codes = tuple(dict.fromkeys(word for word in map(_word, found) if word))
    message = _text(error.get("message") or error.get("detail") or error.get("error"))
    return Complaint(codes, message, next(_delays(details), None))


def _word(value: Any) -> str | None:
    """A short code as `[a-z0-9_.-]`, or None: what looks like a sentence might quote the prompt."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    text = str(value)
    return text.lower() if _SHORT.fullmatch(text) else None


def _text(value: Any) -> str:
    try:
        return str(value or "")[:_READ_CHARS].lower()
    except RecursionError:
        return ""


def _delays(details: list[dict[str, Any]]) -> Iterator[float]:
    """Google's RetryInfo: {"@type": "...RetryInfo", "retryDelay": "34.07s"}."""
    for detail in details:
        match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,9})?)s", str(detail.get("retryDelay")))
        if match:
            yield min(float(match[1]), 3600.0)
