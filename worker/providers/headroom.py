"""What the headers of a response say is left of the vendor's rate limits, and when there will be more."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime

from worker.providers.provider import Reply
from worker.resilience.backoff import LONGEST_WAIT_S

# x-ratelimit-remaining-requests (OpenAI, Azure, Groq, xAI, LiteLLM), -req-minute (Mistral), -requests-day (Cerebras), nothing (OpenRouter,
# Together); x-tokenlimit-remaining (Together); anthropic-ratelimit-requests-remaining.
_REMAINING = re.compile(
    r"x-ratelimit-remaining(?:-(?P<openai>req|tokens)[a-z_-]*)?|x-(?P<together>token)limit-remaining"
    r"|anthropic-ratelimit-(?P<anthropic>requests|tokens|input-tokens|output-tokens)-remaining"
)
_PARTS = ("generated", "prompt")  # of the tokens (Fireworks): what is left of one says little of the whole
_COUNT = re.compile(r"([0-9]{1,15})(?:\.[0-9]*)?")
_UNITS = r"ms|milliseconds?|minutes?|mins?|m|seconds?|secs?|s|hours?|h|days?|d"
_UNITS_S: Mapping[str, float] = {
    "ms": 0.001,
    "mil": 0.001,
    "m": 60,
    "min": 60,
    "s": 1,
    "sec": 1,
    "h": 3600,
    "hou": 3600,
    "d": 86_400,
    "day": 86_400,
}
_PART = re.compile(rf"([0-9]{{1,12}}(?:\.[0-9]{{1,12}})?) ?({_UNITS})")
SPAN = rf"(?:[0-9]{{1,12}}(?:\.[0-9]{{1,12}})? ?(?:{_UNITS}) ?){{1,4}}"  # "1.2s", "6m0s", "20ms", "7 seconds"
_NUMBER = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,15})?")
_LATEST_SPAN_S = 1e9  # a larger number is a moment: Unix time in seconds, or in milliseconds
_LATEST_UNIX_S = 1e11


def with_headroom(reply: Reply, headers: Mapping[str, str]) -> Reply:
    """The reply, knowing what is left: of several limits the least.

    An answer that used up the last of one names no wait: most vendors' `reset` is when the limit is full again, and room comes
    back long before.
    """
    lower = {name.lower(): value.strip() for name, value in headers.items() if "limit-" in name.lower()}
    left = list(_left(lower))
    if not left:
        return reply
    return replace(
        reply,
        remaining_requests=min((count for kind, count in left if kind.startswith("req")), default=None),
        remaining_tokens=min((count for kind, count in left if kind.startswith("token")), default=None),
    )


def reset_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds until all limits of which nothing remains are reset, 0 to 3600; None when it is not said. `now` is Unix time."""
    lower = {name.lower(): value.strip() for name, value in headers.items()}
    names = [name for name, value in lower.items() if _REMAINING.fullmatch(name) and _count(value) == 0]
    waits = [_until_s(lower.get(name.replace("remaining", "reset"), ""), now) for name in names]
    return max((min(wait, LONGEST_WAIT_S) for wait in waits if wait is not None), default=None)


def span_s(text: str) -> float:
    """Seconds, of what SPAN matches."""
    return sum(float(number) * _UNITS_S[unit if len(unit) < 3 else unit[:3]] for number, unit in _PART.findall(text))


def _left(lower: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    for name, value in lower.items():
        match = _REMAINING.fullmatch(name)
        count = _count(value)
        if match and count is not None and not any(part in name for part in _PARTS):
            yield match["openai"] or match["together"] or (match["anthropic"] or "requests").removeprefix("input-"), count


def _count(value: str) -> int | None:
    match = _COUNT.fullmatch(value)
    return int(match[1]) if match else None


def _until_s(value: str, now: float) -> float | None:
    """Until a reset: a span ("6m0s"), seconds, Unix time in seconds or milliseconds, or an RFC 3339 time with its zone."""
    if re.fullmatch(SPAN, value):
        return span_s(value)
    if _NUMBER.fullmatch(value):
        number = float(value)
        if number <= _LATEST_SPAN_S:
            return number
        return max(0.0, (number if number <= _LATEST_UNIX_S else number / 1000) - now)
    try:
        moment = datetime.fromisoformat(value)
        return max(0.0, moment.timestamp() - now) if moment.tzinfo else None
    except (ValueError, OverflowError):
        return None
