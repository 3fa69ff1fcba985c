"""What happens to one request: drawn from (seed, provider, n), so that a run can be repeated."""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from statistics import NormalDist
from typing import Any

from worker.simulator.limits import Limits
from worker.simulator.script import Fault, Latency, ProviderScript, changed

_NORMAL = NormalDist()
_P99 = _NORMAL.inv_cdf(0.99)


@dataclass(frozen=True, slots=True)
class Plan:
    """The n-th request of a provider (from 1): `latency_s` passes, then `fault` happens; None is a good answer."""

    n: int
    fault: Fault | None
    latency_s: float


def draw(script: ProviderScript, seed: int, provider: str, n: int, *, nth: int, elapsed_s: float) -> Plan:
    """The plan of request `n`; `nth` and `elapsed_s`, since start or the last change, are held against the windows."""
    digest = blake2b(f"{seed}/{provider}/{n}".encode(), digest_size=12).digest()
    in_outage, in_faults, in_latency = ((word + 0.5) / 2**32 for word in struct.unpack("<3I", digest))
    latency_s = _latency_s(script.latency, in_latency)
    for outage in script.outages:
        if outage.covers(nth, elapsed_s) and in_outage < outage.rate:
            return Plan(n, outage, latency_s)
    edge = 0.0
    for fault in script.faults:
        edge += fault.rate
        if in_faults < edge:
            return Plan(n, fault, latency_s)
    return Plan(n, None, latency_s)


def _latency_s(latency: Latency, uniform: float) -> float:
    if latency.median_ms is None or latency.p99_ms is None:
        return (latency.ms or 0) / 1000
    sigma = math.log(latency.p99_ms / latency.median_ms) / _P99
    return latency.median_ms * math.exp(sigma * _NORMAL.inv_cdf(uniform)) / 1000


@dataclass(slots=True)
class Vendor:
    """A provider on stage: its script as it stands now, how many requests it has seen, and how many it is answering now."""

    name: str
    script: ProviderScript
    seed: int
    requests: int = 0
    busy: int = 0
    limits: Limits = field(init=False)
    _before_change: int = 0
    _since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.limits = Limits.of(self.script, self._since)

    def next(self) -> Plan:
        self.requests += 1
        nth = self.requests - self._before_change
        return draw(self.script, self.seed, self.name, self.requests, nth=nth, elapsed_s=self.elapsed_s())

    def change(self, changes: Mapping[str, Any]) -> None:
        """These keys of the script hold from the next request on, windows are counted anew, limits are full. Raises UsageError."""
        self.script = changed(self.script, changes, self.name)
        self._before_change, self._since = self.requests, time.monotonic()
        self.limits = Limits.of(self.script, self._since)

    def refusal_s(self, tokens: int) -> float | None:
        """None: the vendor's limits have room for a request of so many tokens; else the seconds after which they may."""
        return self.limits.refusal_s(tokens, self.busy, time.monotonic())

    def elapsed_s(self) -> float:
        return time.monotonic() - self._since

    def is_refusing(self) -> bool:
        elapsed_s = self.elapsed_s()
        return any(outage.kind == "refuse" and outage.covers(1, elapsed_s) for outage in self.script.outages)

    def next_turn_s(self) -> float | None:
        """Seconds until a `refuse` outage begins or ends; None: never."""
        elapsed_s = self.elapsed_s()
        closings = [outage for outage in self.script.outages if outage.kind == "refuse"]
        turns = [turn for outage in closings for turn in (outage.from_s, outage.to_s) if turn is not None]
        return min((turn - elapsed_s for turn in turns if turn > elapsed_s), default=None)
