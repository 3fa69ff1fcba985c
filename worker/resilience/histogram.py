"""How long a provider's answers take: counts by latency, on a scale on which each bucket is a fifth longer than the last."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

WIDTH = 1.2  # of a bucket, so that its middle is within 9.6 % of whatever fell into it
PERIOD_MS = 120_000
PERIODS = 6  # counted: the last ten minutes, and what there is of the two before
_LONGEST_MS = 86_400_000


def bucket(took_ms: int) -> int:
    """Where a latency is counted; 0 is up to 1 ms, and a day is the longest."""
    return math.floor(math.log(min(max(1, took_ms), _LONGEST_MS), WIDTH))


def middle_ms(of: int) -> float:
    """The latency that stands for a bucket: the geometric middle."""
    return math.pow(WIDTH, of + 0.5)


def quantile_ms(counts: Mapping[int, int], q: float) -> float:
    """The latency that the share `q` (0 to 1) of all counted did not exceed. Raises ValueError when nothing was counted."""
    left = q * sum(counts.values())
    for of in sorted(counts):
        left -= counts[of]
        if left <= 0 < counts[of]:
            return middle_ms(of)
    raise ValueError("nothing was counted, so there is no quantile")


def recent(fields: Iterable[tuple[str, str]], now: int) -> dict[int, int]:
    """Counts by bucket of the last periods at `now` (ms), from fields `<period>:<bucket>`."""
    oldest, counts = now // PERIOD_MS - PERIODS, dict[int, int]()
    for name, count in fields:
        period, _, of = name.partition(":")
        if of and int(period) > oldest:
            counts[int(of)] = counts.get(int(of), 0) + int(count)
    return counts
