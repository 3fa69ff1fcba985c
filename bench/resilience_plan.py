"""What every contestant plays: worlds with their weather and their jobs, and three short scenes after them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.faultmodel import LATENCY, PRICES, PROVIDERS, Episode, arrivals, weather

DEADLINE_S = 20.0
WARM_UP = "warm-up"  # its jobs count for nothing
WARM_UP_S = 12.0  # so long before second 0
FAILOVER, DEAD, DARK = "failover", "dead-host", "full-outage"
SCENE_S = 20.0
ALONE_S = 12.0  # of each contestant with its first two scenes: side by side they would measure how busy the machine is
TURNS = 6  # so many contestants at most
_CALM_S = 2.0  # between the last job of the worlds and the scenes
_TURN_S = ALONE_S + _CALM_S


@dataclass(frozen=True, slots=True)
class Size:
    """`independent` worlds have no common cause, in `common` ones every outage strikes all three providers."""

    independent: int
    common: int
    length_s: float
    jobs_per_s: float  # of one world


FULL = Size(independent=20, common=6, length_s=900, jobs_per_s=0.6)
SHORT = Size(independent=12, common=4, length_s=40, jobs_per_s=1.0)


@dataclass(frozen=True, slots=True)
class World:
    """Providers and jobs that share nothing with those of other worlds. Times are the run's."""

    name: str
    seed: int
    episodes: Sequence[Episode]
    arrivals: Sequence[float]
    latency: Mapping[str, float]

    def provider(self, name: str) -> str:
        """What the simulator calls this provider of this world."""
        return f"{self.name}.{name}"


def worlds(size: Size, first_seed: int = 0) -> list[World]:
    """Those whose jobs count: `independent.N` and `common.N`."""
    kinds = [("independent", 0.0)] * size.independent + [("common", 1.0)] * size.common
    return [
        World(f"{kind}.{seed}", seed, weather(seed, size.length_s, beta=beta), arrivals(seed, size.length_s, size.jobs_per_s), LATENCY)
        for seed, (kind, beta) in enumerate(kinds, first_seed)
    ]


def scenes(size: Size) -> list[World]:
    """After the worlds: the first provider drops three calls in ten, or its host is dead; then nobody is well.

    The first two as they are in the first turn.
    """
    from_s = size.length_s + _CALM_S
    dark_s = from_s + TURNS * _TURN_S
    to_s = dark_s + SCENE_S
    dropping = Episode("alpha", FAILOVER, 0, to_s + 60, {"kind": "reset", "rate": 0.3})
    dark = [Episode(provider, DARK, 0, to_s + 60, {"kind": "status", "status": 500}) for provider in PROVIDERS]
    at_once = {"ms": 0}
    return [
        World(FAILOVER, 1, [dropping], _from(from_s, arrivals(1, ALONE_S, 30)), at_once),
        World(DEAD, 2, [], _from(from_s, arrivals(2, ALONE_S, 1)), at_once),
        World(DARK, 3, dark, _from(dark_s, arrivals(3, SCENE_S, 20)), at_once),
    ]


def warm_up() -> World:
    return World(WARM_UP, 0, [], _from(-WARM_UP_S, arrivals(0, 3, 6)), {"ms": 5})


def _from(at_s: float, times: Sequence[float]) -> list[float]:
    return [round(at_s + one, 4) for one in times]


@dataclass(frozen=True, slots=True)
class Plan:
    size: Size
    played: Sequence[World]  # all of them

    @classmethod
    def of(cls, size: Size, first_seed: int = 0) -> Plan:
        return cls(size, [warm_up(), *worlds(size, first_seed), *scenes(size)])

    @property
    def length_s(self) -> float:
        """From the beginning to the deadline of the last job."""
        return self.size.length_s + _CALM_S + TURNS * _TURN_S + SCENE_S + DEADLINE_S

    def world(self, name: str) -> World:
        return next(one for one in self.played if one.name == name)

    def jobs(self, turn: int) -> list[dict[str, Any]]:
        """Of the contestant whose turn it is as the one after `turn` others, in the order of their arrival; every prompt is told
        from every other."""
        later_s = {FAILOVER: turn * _TURN_S, DEAD: turn * _TURN_S}
        made = [
            {
                "world": world.name,
                "n": n,
                "at_s": at_s + later_s.get(world.name, 0),
                "prompt": f"{world.name} ticket {n}: the laptop does not find the network",
            }
            for world in self.played
            for n, at_s in enumerate(world.arrivals)
        ]
        return sorted(made, key=lambda job: job["at_s"])

    def script(self) -> str:
        """The simulator's, everybody well, as TOML."""
        return "\n".join(_lines(self.played))


def _lines(played: Sequence[World]) -> Iterator[str]:
    for world in played:
        latency = ", ".join(f"{key} = {value}" for key, value in world.latency.items())
        for name in PROVIDERS:
            dollars = dict(zip(("input", "output"), PRICES[name], strict=True))
            price = ", ".join(f'{key} = "{usd}"' for key, usd in dollars.items())
            yield f'[providers."{world.provider(name)}"]\nlatency = {{ {latency} }}\nprice = {{ {price} }}'
