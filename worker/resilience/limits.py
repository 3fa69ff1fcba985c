"""The rules of the limiter, as plain values: how much one provider is asked to do in a minute and at once.

`limits.lua` does the same in Redis for the whole fleet; tests hold the two together. This one serves a process that
has lost Redis.

What a call is expected to need is reserved before it goes out, all of it or nothing, and put right when it has ended.
Requests and tokens are buckets that fill with 90 % of the configured rate and hold ten seconds' worth, because windows
of 1 to 10 s are enforced. After congestion the rate is multiplied, and a ceiling for calls in flight appears that grows
back with each success. Times are milliseconds of one clock that never runs backwards here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Limits:
    """What one provider takes, as the configuration says it; None: not limited.

    `rpm`: requests a minute. `tpm`: tokens a minute, in and out. `concurrency`: calls in flight, over all workers.
    """

    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None

    def shared_by(self, workers: int) -> Limits:
        """One worker's part when each has to keep its own; never less than 1 of anything."""
        parts = (limit and max(1, limit // max(1, workers)) for limit in (self.rpm, self.tpm, self.concurrency))
        return Limits(*parts)


class LimitRules(NamedTuple):
    """Sources: 90 % and the burst are ours; x0.1 to x1 once in 10 s is AWS's, with a longer pause; 3 points a minute is half of
    OpenAI's "no more than 50 % in 15 minutes"; the adaptive ceiling is Netflix's AIMD with its 200."""

    used_percent: int = 90
    bursts_a_minute: int = 6
    bulk_leaves: float = 0.3  # of each burst and of the calls in flight, to interactive
    ease_every_ms: int = 10_000  # what comes sooner is the same congestion
    least_multiplier: float = 0.1
    recovery_per_ms: float = 0.03 / 60_000
    most_room: int = 200  # an adaptive ceiling that passes it is gone
    call_ms: int = 250  # a guess at how long a call takes, until some have ended: who comes too early asks again
    call_weight: float = 0.1  # of the newest one, in what calls take on average
    hint_most_ms: int = 600_000
    close: float = 1e-6  # of a request or token: what rounding may lack
    limits_ttl_ms: int = 86_400_000


RULES = LimitRules()
STRAINED = 0.5  # a multiplier below it: the provider is in trouble itself


class Settling(NamedTuple):
    """What a call that ended means for its provider's limits; see `admission.Ending`."""

    reserved: int = 0
    used: int | None = None
    sent: bool = True
    good: bool = True
    ease: float = 1.0
    remaining_requests: int | None = None
    remaining_tokens: int | None = None
    took_ms: int | None = None


@dataclass(slots=True)
class Bucket:
    """What is left of a limit per minute. `promised`: to those who were told when to come back."""

    limit: int
    level: float
    promised: float = 0.0

    @property
    def burst(self) -> float:
        return max(1.0, self.limit / RULES.bursts_a_minute)

    def pace(self, multiplier: float) -> float:
        """A millisecond's worth."""
        return self.limit * RULES.used_percent / 6_000_000 * multiplier

    def fill(self, elapsed_ms: int, multiplier: float) -> None:
        gain = elapsed_ms * self.pace(multiplier)
        self.level, self.promised = min(self.burst, self.level + gain), max(0.0, self.promised - gain)

    def missing(self, demand: int, bulk: bool) -> float:
        """How much more is needed; what is larger than the bucket needs a full one."""
        leaves = RULES.bulk_leaves * self.burst if bulk else 0.0
        return min(self.burst, demand + leaves) - self.level

    def add(self, amount: float) -> None:
        """Given back, or charged when negative; neither above the burst nor deeper in debt than one."""
        self.level = max(-self.burst, min(self.burst, self.level + amount))


@dataclass(slots=True)
class Meter:
    """One provider's limits at work. Fields are those of its Redis hash; `flying` is its sorted set: lease, end of it."""

    at: int  # clock of the levels
    requests: Bucket | None = None
    tokens: Bucket | None = None
    concurrency: int = 0  # 0: no ceiling
    multiplier: float = 1.0
    eased_at: int = 0
    room: float = 0.0  # the adaptive ceiling; 0: none
    promised_calls: float = 0.0
    call_ms: float = float(RULES.call_ms)  # on average
    flying: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_fields(cls, fields: Mapping[str, str], limits: Limits, now: int, flying: Mapping[str, int] | None = None) -> Meter:
        """The meter a Redis hash holds; a full one when it holds nothing."""
        meter = cls(int(fields.get("at", now)), concurrency=limits.concurrency or 0, flying=dict(flying or {}))
        for name, limit in (("requests", limits.rpm), ("tokens", limits.tpm)):
            if limit:
                full = max(1.0, limit / RULES.bursts_a_minute)
                setattr(meter, name, Bucket(limit, float(fields.get(name, full)), float(fields.get(f"promised_{name}", 0))))
        meter.multiplier, meter.eased_at = float(fields.get("multiplier", 1)), int(fields.get("eased_at", 0))
        meter.room, meter.promised_calls = float(fields.get("room", 0)), float(fields.get("promised_calls", 0))
        meter.call_ms = float(fields.get("call_ms", RULES.call_ms))
        return meter

    @property
    def ceiling(self) -> float:
        """Of calls in flight; infinite when there is none."""
        return min(self.concurrency or math.inf, self.room or math.inf)

    def refresh(self, now: int) -> int:
        """Time has passed: levels and the multiplier are those of `now`. Returns the clock, which never runs backwards."""
        elapsed = max(0, now - self.at)
        for bucket in (self.requests, self.tokens):
            if bucket:
                bucket.fill(elapsed, self.multiplier)
        if self.ceiling < math.inf:
            self.promised_calls = max(0.0, self.promised_calls - elapsed * (self.ceiling / self.call_ms))
        self.multiplier = min(1.0, self.multiplier + elapsed * RULES.recovery_per_ms)
        self.at = max(self.at, now)
        return self.at

    def sweep(self, now: int) -> None:
        """Who died in flight is in flight no more; what it reserved is not given back."""
        for lease in [lease for lease, end in self.flying.items() if end <= now]:
            del self.flying[lease]

    def reserve(self, tokens: int, bulk: bool) -> tuple[int, int]:
        """How long to wait in ms, and the tokens reserved when that is 0. `refresh` comes first, the lease after it.

        Who is alone and waits exactly so long gets it (where it is only calls in flight that stand in the way, the wait
        is a guess). A bulk job that is not alone is told a later time, at most ten minutes: what was promised to others
        comes first. A person is not queued behind them.
        """
        charge = tokens if self.tokens is None else min(tokens, math.floor(2 * self.tokens.burst))
        alone = queued = 0
        demands = [(bucket, demand) for bucket, demand in ((self.requests, 1), (self.tokens, tokens)) if bucket]
        for bucket, demand in demands:
            missing, pace = bucket.missing(demand, bulk), bucket.pace(self.multiplier)
            if missing > RULES.close:
                alone = max(alone, math.ceil(missing / pace))
                queued = max(queued, math.ceil((missing + bucket.promised) / pace))
        if len(self.flying) + 1 > self._top(bulk):
            alone = max(alone, math.ceil(self.call_ms / self.ceiling))
            most = RULES.ease_every_ms if self._is_pinched() else RULES.hint_most_ms  # such a ceiling grows back in no time
            queued = max(queued, min(most, math.ceil((1 + self.promised_calls) * self.call_ms / self.ceiling)))
        if alone == 0:
            for bucket, demand in demands:
                bucket.add(-(charge if bucket is self.tokens else demand))
            return 0, charge
        if not bulk:
            return alone, 0
        self._promise(tokens)
        return max(alone, min(queued, RULES.hint_most_ms)), 0

    def is_congested(self, bulk: bool) -> bool:
        """Whether it is the adaptive ceiling that leaves no room: the provider is in trouble, rather than used up."""
        return self._is_pinched() and len(self.flying) + 1 > self._top(bulk)

    def _is_pinched(self) -> bool:
        return 0 < self.room < (self.concurrency or math.inf)

    def _top(self, bulk: bool) -> float:
        ceiling = self.ceiling
        return max(1, math.floor(ceiling * (1 - RULES.bulk_leaves))) if bulk and ceiling < math.inf else ceiling

    def _promise(self, tokens: int) -> None:
        for bucket, demand in ((self.requests, 1), (self.tokens, tokens)):
            if bucket:
                most = bucket.pace(self.multiplier) * RULES.hint_most_ms
                bucket.promised = min(bucket.promised + demand, most)
        if self.ceiling < math.inf:
            self.promised_calls = min(self.promised_calls + 1, self.ceiling / self.call_ms * RULES.hint_most_ms)

    def settle(self, lease: str, settling: Settling) -> bool:
        """The call has ended, and what was reserved is put right; False when it had ended before, or nobody knows it."""
        if self.flying.pop(lease, None) is None:
            return False
        in_flight = len(self.flying) + 1
        if settling.took_ms is not None:
            self.call_ms += (max(1, settling.took_ms) - self.call_ms) * RULES.call_weight
        if self.requests:
            self.requests.add(0 if settling.sent else 1)
            if settling.remaining_requests is not None:
                self.requests.level = min(self.requests.level, settling.remaining_requests)
        if self.tokens:
            used = (settling.reserved if settling.used is None else settling.used) if settling.sent else 0
            self.tokens.add(settling.reserved - used)
            if settling.remaining_tokens is not None:
                self.tokens.level = min(self.tokens.level, settling.remaining_tokens)
        if settling.ease < 1 and self.at - self.eased_at >= RULES.ease_every_ms:
            self.multiplier = max(RULES.least_multiplier, self.multiplier * settling.ease)
            self.room = max(1.0, min(self.room or math.inf, settling.ease * in_flight))
            self.eased_at = self.at
        elif settling.good and self.room and in_flight * 2 >= self.room:
            self._widen()
        return True

    def _widen(self) -> None:
        self.room += 1 / self.room
        if self.room > (self.concurrency or RULES.most_room):
            self.room = 0.0

    def in_flight(self, now: int) -> int:
        return sum(end > now for end in self.flying.values())

    def survivors(self, lease: str, now: int) -> int:
        """Calls still in flight that went out with this one or before it, told by the ends of their leases."""
        end = self.flying.get(lease, 0)
        return sum(now < other <= end for other in self.flying.values()) - (now < end)

    def reset(self) -> None:
        """As if there had been no congestion and nobody had been promised anything. The levels stay."""
        self.multiplier, self.eased_at, self.room, self.promised_calls = 1.0, 0, 0.0, 0.0
        for bucket in (self.requests, self.tokens):
            if bucket:
                bucket.promised = 0.0
