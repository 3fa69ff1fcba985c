"""A vendor's own rate limits: buckets of requests and tokens that refill all the time, and how many calls at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Self

from worker.simulator.script import ProviderScript

_CROWDED_S = 0.5  # what a vendor says that cannot know when a call will end


class Level(NamedTuple):
    """How full a bucket is: `remaining` of `limit`, all of it again in `full_in_s`."""

    limit: int
    remaining: int
    full_in_s: float


class Bucket:
    """`per_minute` of something, full at first, refilled evenly. Times are monotonic seconds."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._limit = per_minute
        self._level, self._at_s = float(per_minute), now_s

    def wait_s(self, wanted: float, now_s: float) -> float:
        """Until so much can be taken, 0 when it can be now. What is larger than the bucket needs a full one."""
        self._level = min(self._limit, self._level + (now_s - self._at_s) * self._limit / 60)
        self._at_s = now_s
        return max(0.0, (min(wanted, self._limit) - self._level) * 60 / self._limit)

    def take(self, wanted: float) -> None:
        self._level -= min(wanted, self._limit)

    def level(self) -> Level:
        return Level(self._limit, max(0, math.floor(self._level)), (self._limit - self._level) * 60 / self._limit)


class Limits:
    """Of one vendor, as its script has them. A refused request takes nothing."""

    def __init__(self, buckets: Mapping[str, Bucket], concurrency: int | None) -> None:
        self._buckets = buckets
        self._concurrency = concurrency

    @classmethod
    def of(cls, script: ProviderScript, now_s: float) -> Self:
        limits = {"requests": script.rpm, "tokens": script.tpm}
        return cls({name: Bucket(limit, now_s) for name, limit in limits.items() if limit}, script.concurrency)

    def refusal_s(self, tokens: int, others: int, now_s: float) -> float | None:
        """None: the request is taken. Else the seconds after which it would be; `others` are those being answered now."""
        wanted = {"requests": 1, "tokens": tokens}
        wait_s = max((bucket.wait_s(wanted[name], now_s) for name, bucket in self._buckets.items()), default=0.0)
        if wait_s > 0:
            return wait_s
        if self._concurrency is not None and others >= self._concurrency:
            return _CROWDED_S
        for name, bucket in self._buckets.items():
            bucket.take(wanted[name])
        return None

    def levels(self) -> Mapping[str, Level]:
        return {name: bucket.level() for name, bucket in self._buckets.items()}
