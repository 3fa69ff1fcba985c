"""The weather of three providers: when which of them is down, half down or rate limited, drawn from a seed.

Each provider goes up and down by itself (Markov: both times exponential), for each of three illnesses; a share `beta` of the
outages, the common cause, strikes all three at the same moment. Nothing here waits or asks: two equal calls give equal weather.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

PROVIDERS = ("alpha", "beta", "gamma")  # cheap to dear, in the order of every chain
PRICES = {"alpha": ("0.28", "0.42"), "beta": ("0.30", "2.50"), "gamma": ("3.00", "15.00")}  # USD per 1M tokens, in and out
LATENCY = {"median_ms": 400, "p99_ms": 1500}  # of every provider when it is well
ACCELERATION = 90  # an outage of half an hour is played in 20 s
HANG_S = 30.0


@dataclass(frozen=True, slots=True)
class Illness:
    """Strikes a healthy provider once in `every_s` on average and lasts `lasts_s` on average, both exponential."""

    name: str
    every_s: float
    lasts_s: float

    @property
    def share(self) -> float:
        """Of all time, in the long run."""
        return self.lasts_s / (self.every_s + self.lasts_s)


OUTAGE = Illness("outage", every_s=480, lasts_s=20)
BROWN_OUT = Illness("brown-out", every_s=300, lasts_s=20)
STORM = Illness("429 storm", every_s=600, lasts_s=10)

# How each looks on the wire, as keys of a simulator's outage; an episode takes one of them.
_LOOKS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    OUTAGE.name: (
        {"kind": "status", "status": 503},
        {"kind": "status", "status": 500},
        {"kind": "reset"},
        {"kind": "html", "status": 502},
        {"kind": "hang", "seconds": HANG_S},
    ),
    BROWN_OUT.name: ({"kind": "status", "status": 500, "rate": 0.3},),
    STORM.name: (
        {"kind": "status", "status": 429, "rate": 0.8},
        {"kind": "status", "status": 429, "rate": 0.8, "retry_after_s": 3},
    ),
}


@dataclass(frozen=True, slots=True)
class Episode:
    """One provider is ill from `from_s` to `to_s` of the world's time. `look`: keys of the simulator's outage, times left out."""

    provider: str
    illness: str
    from_s: float
    to_s: float
    look: Mapping[str, Any]
    common: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def outage(self, now_s: float) -> dict[str, Any] | None:
        """For a simulator whose clock starts at `now_s` of the world's; None when it is over by then."""
        if self.to_s <= now_s:
            return None
        return {**self.look, "from_s": max(0.0, self.from_s - now_s), "to_s": self.to_s - now_s}


def weather(seed: int, length_s: float, *, beta: float) -> list[Episode]:
    """All episodes of one world, by their beginning. All three providers are well when it begins."""
    episodes: list[Episode] = []
    for provider in PROVIDERS:
        own = replace(OUTAGE, every_s=OUTAGE.every_s / (1 - beta)) if beta < 1 else None
        for illness in filter(None, (own, BROWN_OUT, STORM)):
            dice = random.Random(f"{seed}/{provider}/{illness.name}")
            for from_s, to_s in _spells(dice, illness, length_s):
                episodes.append(Episode(provider, illness.name, from_s, to_s, dice.choice(_LOOKS[illness.name])))
    if beta > 0:
        dice = random.Random(f"{seed}/common cause")
        for from_s, to_s in _spells(dice, replace(OUTAGE, every_s=OUTAGE.every_s / beta), length_s):
            look = dice.choice(_LOOKS[OUTAGE.name])
            episodes += [Episode(provider, OUTAGE.name, from_s, to_s, look, common=True) for provider in PROVIDERS]
    return sorted(episodes, key=lambda episode: (episode.from_s, episode.provider))


def arrivals(seed: int, length_s: float, per_s: float) -> list[float]:
    """When jobs come: Poisson, whether or not anybody is ready for them (an open loop)."""
    dice, at_s, times = random.Random(f"{seed}/arrivals"), 0.0, []
    while (at_s := at_s + dice.expovariate(per_s)) < length_s:
        times.append(round(at_s, 4))
    return times


def dark_share(episodes: Iterable[Episode], times: Sequence[float]) -> float:
    """The share of these moments at which no provider answers anybody: what only waiting can mend."""
    dark = [at_s for at_s in times if all(provider in _out(episodes, at_s) for provider in PROVIDERS)]
    return len(dark) / len(times) if times else 0.0


def _out(episodes: Iterable[Episode], at_s: float) -> set[str]:
    return {one.provider for one in episodes if one.illness == OUTAGE.name and one.from_s <= at_s < one.to_s}


def _spells(dice: random.Random, illness: Illness, length_s: float) -> Iterator[tuple[float, float]]:
    at_s = 0.0
    while (at_s := at_s + dice.expovariate(1 / illness.every_s)) < length_s:
        end_s = at_s + max(0.5, dice.expovariate(1 / illness.lasts_s))
        yield round(at_s, 3), round(min(end_s, length_s), 3)
        at_s = end_s
