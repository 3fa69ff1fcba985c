"""When to ask again: full jitter, and what a provider's own headers say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

LONGEST_WAIT_S = 3600.0
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_RESET = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h))+")
_RESET_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")


def delay_s(retry: int, *, base_s: float, cap_s: float, rng: Callable[[], float]) -> float:
    """Seconds to wait before the `retry`-th retry (from 1): `rng() * min(cap_s, base_s * 2**(retry - 1))`.

    `rng` gives numbers in [0, 1). Full jitter: of the usual jitters it makes the least total work
    (AWS Architecture Blog, "Exponential Backoff And Jitter").

    | retry | at most, base 0.5 s, cap 8 s | mean |
    |---|---|---|
    | 1 | 0.5 s | 0.25 s |
    | 2 | 1 s | 0.5 s |
    | 3 | 2 s | 1 s |
    | 4 | 4 s | 2 s |
    | 5 and on | 8 s | 4 s |
    """
    # 2**1023 is the largest power a float holds; long before that the cap decides.
    return rng() * min(cap_s, base_s * 2.0 ** min(max(retry, 1) - 1, 1000))


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds the provider asks us to wait, 0 to 3600, or None when it does not say. `now`: Unix time, for HTTP dates.

    Read in this order, the first that makes sense counts: `retry-after-ms`; `Retry-After` in seconds or as a date
    (RFC 9110 10.2.3); the longest of `x-ratelimit-reset-*` whose `-remaining-` is 0 ("1s", "6m0s", "20ms": OpenAI).
    Negative values and NaN are ignored, a date that has passed is 0. Header names in any case.
    """
    lower = {name.lower(): value.strip() for name, value in headers.items()}
    milliseconds = _number(lower.get("retry-after-ms", ""))
    if milliseconds is not None:
        return min(milliseconds / 1000, LONGEST_WAIT_S)
    after = lower.get("retry-after", "")
    for wait_s in (_number(after), _until_date_s(after, now), _reset_s(lower)):
        if wait_s is not None:
            return min(wait_s, LONGEST_WAIT_S)
    return None


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if number >= 0 and not math.isnan(number) else None


def _until_date_s(value: str, now: float) -> float | None:
    try:
        date = parsedate_to_datetime(value)
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _reset_s(lower: Mapping[str, str]) -> float | None:
    waits = [
        sum(float(number) * _UNITS_S[unit] for number, unit in _RESET_PART.findall(value))
        for name, value in lower.items()
        if name.startswith("x-ratelimit-reset-") and lower.get(name.replace("-reset-", "-remaining-")) == "0" and _RESET.fullmatch(value)
    ]
    return max(waits, default=None)
