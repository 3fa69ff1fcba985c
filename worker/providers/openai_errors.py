"""What an error of an OpenAI-compatible vendor means: its codes are asked first, then phrases, then the HTTP status.

The status alone lies (a spent budget is a 429, a wrong key a 400). Vendors put things in different places;
`complaint` finds them, the tables below judge them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from worker.providers.headroom import SPAN, span_s
from worker.resilience.backoff import LONGEST_WAIT_S
from worker.signals import POLICIES, Signal

# Codes, types and statuses that mean one thing whatever the HTTP status says. Normalised by `_word`.
_CODES: Mapping[Signal, tuple[str, ...]] = {
    Signal.QUOTA_EXHAUSTED: (
        "insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "billing_error",
        "credit_balance_exhausted", "enforced_spend_limit_reached", "insufficient_balance", "insufficient_credits",
        "insufficient_user_quota", "pre_consume_token_quota_failed", "exceeded_current_quota_error", "budget_exceeded",
        "arrearage", "quota_exceeded", "credit_limit", "credit_limit_exceeded", "1113",
    ),
    Signal.CONTEXT_TOO_LONG: (
        "context_length_exceeded", "exceed_context_size_error", "contextwindowexceedederror", "request_too_large",
        "string_above_max_length", "3051",
    ),
    Signal.UNSUPPORTED: ("unsupported_parameter", "unsupported_value"),
    Signal.CONTENT_POLICY: (
        "content_filter", "content_policy_violation", "responsibleaipolicyviolation", "moderation_blocked",
        "invalid_prompt", "data_inspection_failed", "datainspectionfailed", "prohibited_content",
        "contentpolicyviolationerror", "1301",
    ),
    Signal.UNAUTHORIZED: (
        "invalid_api_key", "authentication_error", "invalid_authentication_error", "api_key_invalid", "unauthenticated",
        "permission_denied", "permission_error", "account_deactivated", "unsupported_country_region_territory",
        "invalidapikey", "service_disabled", "user_location_not_supported", "organization_restricted",
    ),
    Signal.MODEL_NOT_FOUND: (
        "model_not_found", "model_not_available", "model_decommissioned", "deploymentnotfound", "notfounderror",
        "not_found_error", "invalid_model", "unknown_model", "model_not_supported", "operationnotsupported",
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
    ("used all available credits", Signal.QUOTA_EXHAUSTED),
    ("any credits yet", Signal.QUOTA_EXHAUSTED),
    ("run out of credits", Signal.QUOTA_EXHAUSTED),
    ("out of call volume quota", Signal.QUOTA_EXHAUSTED),
    ("maximum context length", Signal.CONTEXT_TOO_LONG),
    ("context window", Signal.CONTEXT_TOO_LONG),
    ("context size", Signal.CONTEXT_TOO_LONG),
    ("context length", Signal.CONTEXT_TOO_LONG),
    ("context_length_exceeded", Signal.CONTEXT_TOO_LONG),
    ("contextwindowexceedederror", Signal.CONTEXT_TOO_LONG),
    ("maximum model length", Signal.CONTEXT_TOO_LONG),
    ("maximum prompt length", Signal.CONTEXT_TOO_LONG),
    ("prompt is too long", Signal.CONTEXT_TOO_LONG),
    ("input token count", Signal.CONTEXT_TOO_LONG),
    ("max_new_tokens must be <=", Signal.CONTEXT_TOO_LONG),
    ("max_new_tokens` must be <=", Signal.CONTEXT_TOO_LONG),
    ("too large for model with", Signal.CONTEXT_TOO_LONG),
    ("reduce the length of the", Signal.CONTEXT_TOO_LONG),
    ("supports at most", Signal.UNSUPPORTED),  # so many tokens of answer
    ("valid range of max_tokens", Signal.UNSUPPORTED),
    ("contentpolicyviolationerror", Signal.CONTENT_POLICY),
    ("content management policy", Signal.CONTENT_POLICY),
    ("content exists risk", Signal.CONTENT_POLICY),
    ("safety system", Signal.CONTENT_POLICY),
    ("input was flagged", Signal.CONTENT_POLICY),
    ("violates usage guidelines", Signal.CONTENT_POLICY),
    ("api key not valid", Signal.UNAUTHORIZED),
    ("incorrect api key", Signal.UNAUTHORIZED),
    ("invalid authorization header", Signal.UNAUTHORIZED),
    ("user location is not supported", Signal.UNAUTHORIZED),
    ("model not exist", Signal.MODEL_NOT_FOUND),
    ("not a valid model", Signal.MODEL_NOT_FOUND),
    ("invalid model name", Signal.MODEL_NOT_FOUND),
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
_NOTHING = frozenset({"none", "null", "unknown"})
_READ_CHARS = 4000
_AGAIN = re.compile(rf"(?:try again|retry)(?: your request)?(?: in| after)? ({SPAN})")
_QUOTED = re.compile(r"""(?<![a-z0-9])(['"]).*?\1""", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Complaint:
    """What a vendor put into an error: short codes, most telling first; its message, lower case; the wait it names.

    `param`: the part of the request that it is about.
    """

    codes: tuple[str, ...] = ()
    message: str = ""
    retry_delay_s: float | None = None
    param: str | None = None

    @property
    def code(self) -> str | None:
        """The one to record: rather a word than a number, which is mostly the HTTP status again."""
        return next((code for code in self.codes if not code.isdigit()), next(iter(self.codes), None))

    @property
    def own_words(self) -> str:
        """The message without what it may quote of the request, whose author must not be able to take a provider out."""
        return _QUOTED.sub("", self.message) if self.param in (None, "model") else ""


def complaint(body: Any) -> Complaint | None:
    """The error in a decoded body of any shape, or None when there is none in it.

    OpenAI: {"error": {"message", "type", "code"}}; Gemini: a list of that, with "status" and "details";
    Ollama: {"error": "text"}; xAI: that with a "code"; Mistral and vLLM: {"object": "error", "message", "type", "code"};
    FastAPI: {"detail"}; Azure's gateway: {"statusCode", "message"}; Cloudflare: {"errors": [{"code", "message"}]}.
    """
    if isinstance(body, list):
        body = body[0] if body else None
    if not isinstance(body, dict):
        return None
    listed = body.get("errors")
    error = body.get("error") or (listed[0] if isinstance(listed, list) and listed and not body.get("choices") else None)
    if isinstance(error, dict):
        return _of_fields(error)
    return _of_fields(body) if error or _is_bare_error(body) else None


def plain(body: bytes) -> Complaint:
    """What stands in a body that holds no error in JSON: a text, whose words count unless it is HTML."""
    text = body[:_READ_CHARS].decode("utf-8", "replace").lower().strip()
    return Complaint() if text.startswith("<") else Complaint(message=text, retry_delay_s=_named_s(text))


def _is_bare_error(body: Mapping[str, Any]) -> bool:
    if body.get("object") == "error" or body.get("type") == "error":
        return True
    return "choices" not in body and any(key in body for key in ("message", "detail", "code", "statusCode"))


def meaning(status: int, error: Complaint) -> Signal:
    """The signal of an error answer. `status` is the HTTP one; in a 200 the error's own words take its place.

    A redirect is not followed, for it would take prompt and key elsewhere: `base_url` points to the wrong place.
    """
    if 300 <= status < 400:
        return Signal.MODEL_NOT_FOUND
    for code in error.codes:
        if code in _MEANING:
            return _MEANING[code]
        if code.endswith(("spend_limit_exceeded", "usage_limit_exceeded")):
            return Signal.QUOTA_EXHAUSTED
    for phrase, signal in _PHRASES:
        if phrase in (error.own_words if POLICIES[signal].isolate_s and status in (200, 400, 422) else error.message):
            return signal
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
    metadata = metadata if isinstance(metadata, dict) else {}
    listed = error.get("details")
    details = [detail for detail in listed if isinstance(detail, dict)] if isinstance(listed, list) else []
    found = [
        error.get("code"),
        inner.get("code") if isinstance(inner, dict) else None,
        *(detail.get("reason") for detail in details),
        error.get("status"),
        error.get("type"),
        error.get("statusCode"),
        metadata.get("error_type"),
    ]
    codes = tuple(dict.fromkeys(word for word in map(_word, found) if word))
    message = _text(error.get("message") or error.get("detail") or error.get("error"))
    param = error.get("param")
    upstream = _text(metadata.get("raw"))  # OpenRouter: what the vendor behind it said
    return Complaint(
        codes,
        f"{message}\n{upstream}" if upstream else message,
        next(_delays(details), _named_s(message)),
        param if isinstance(param, str) and param and param.lower() not in _NOTHING else None,
    )


def _word(value: Any) -> str | None:
    """A short code as `[a-z0-9_.-]`, or None: what looks like a sentence might quote the prompt."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    text = str(value).lower()
    return text if _SHORT.fullmatch(text) and text not in _NOTHING else None


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
            yield min(float(match[1]), LONGEST_WAIT_S)


def _named_s(message: str) -> float | None:
    """The wait that is named in so many words: "Please try again in 6m0s.", "Please retry after 7 seconds."."""
    match = _AGAIN.search(message)
    return min(span_s(match[1]), LONGEST_WAIT_S) if match else None
