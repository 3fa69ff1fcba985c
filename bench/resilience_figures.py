"""From how jobs ended and what the vendors' bill says to the figures. Pure; a job without an answer took its whole deadline."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from statistics import NormalDist
from typing import Any

from bench.faultmodel import LATENCY
from bench.resilience_plan import DARK, DEAD, DEADLINE_S, FAILOVER, SCENE_S, Plan

BETAS = (0.0, 0.06, 0.20)
RESAMPLES = 2_000
TRIP = 8  # failures in a row that open a breaker of Backstop

Job = Mapping[str, Any]
Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tally:
    """Jobs of one world."""

    good: int
    jobs: int

    @property
    def share(self) -> float:
        return self.good / self.jobs


def tallies(jobs: Iterable[Job]) -> dict[str, Tally]:
    """Of each world; good is an answer at full quality within the deadline."""
    found: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for job in jobs:
        found[job["world"]][0] += is_good(job)
        found[job["world"]][1] += 1
    return {world: Tally(*counts) for world, counts in found.items()}


def is_good(job: Job) -> bool:
    return bool(job["ok"]) and not job.get("degraded") and job["took_s"] <= DEADLINE_S


def share(found: Iterable[Tally]) -> float:
    """Of all their jobs."""
    counted = list(found)
    return sum(one.good for one in counted) / sum(one.jobs for one in counted)


def mixed(independent: Sequence[Tally], common: Sequence[Tally], beta: float) -> float:
    """The share of good jobs when a share `beta` of the outages has a common cause: what is lost is the sum of both parts' losses.

    From worlds in which no outage has one, and worlds in which all have: at 6 % a run of minutes would see none or one.
    """
    if beta == 0:
        return share(independent)
    return 1 - (1 - beta) * (1 - share(independent)) - beta * (1 - share(common))


def lower_bound(independent: Sequence[Tally], common: Sequence[Tally], beta: float, *, seed: int = 0) -> float:
    """95 % of resamplings of the worlds (whole worlds: failures come in bursts) lie above it.

    Where nothing failed, resampling cannot say more than 3 / jobs does (the rule of three).
    """
    dice = random.Random(seed)
    shares = sorted(
        mixed(dice.choices(independent, k=len(independent)), dice.choices(common, k=len(common)) if common else [], beta)
        for _ in range(RESAMPLES)
    )
    rule_of_three = 1 - 3 / sum(one.jobs for one in independent)
    return min(shares[RESAMPLES // 20], rule_of_three)


def quantile(values: Sequence[float], share_below: float) -> float:
    """The smallest value with at least that share at or below it."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share_below * len(ordered)))]


def latency_alone_s(share_below: float) -> float:
    """Of a provider that is well, from its lognormal."""
    middle, tail = LATENCY["median_ms"] / 1000, LATENCY["p99_ms"] / 1000
    normal = NormalDist()
    return float(middle * (tail / middle) ** (normal.inv_cdf(share_below) / normal.inv_cdf(0.99)))


def added_ms(jobs: Sequence[Job], share_below: float) -> float:
    """What this quantile of the jobs has on top of the same quantile of a healthy provider."""
    took = [job["took_s"] if is_good(job) else DEADLINE_S for job in jobs]
    return (quantile(took, share_below) - latency_alone_s(share_below)) * 1000


def good_seconds(jobs: Iterable[Job], due_s: Callable[[Job], float]) -> float:
    """The share of seconds, of those in which jobs came, whose jobs all ended well."""
    seconds: dict[tuple[str, int], bool] = {}
    for job in jobs:
        at = job["world"], int(due_s(job))
        seconds[at] = seconds.get(at, True) and is_good(job)
    return sum(seconds.values()) / len(seconds)


def world_of(line: Line) -> str:
    return str(line["provider"].rpartition(".")[0])


def contestant(plan: Plan, jobs: Sequence[Job], lines: Sequence[Line]) -> dict[str, Any]:
    """All its figures. Latency, waste and cost are those of the worlds without common cause."""
    found = tallies(jobs)
    independent = [tally for world, tally in found.items() if world.startswith("independent.")]
    common = [tally for world, tally in found.items() if world.startswith("common.")]
    own = [job for job in jobs if job["world"].startswith("independent.")]
    asked = [line for line in lines if line["provider"].startswith("independent.")]
    answers = sum(is_good(job) for job in own)
    spent = sum((Decimal(line["cost"]) for line in asked), Decimal(0))
    due = {world.name: world.arrivals for world in plan.played}
    return {
        "jobs": len(own),
        "lost": len(own) - answers,
        "shares": {f"{beta:.0%}": [mixed(independent, common, beta), lower_bound(independent, common, beta)] for beta in BETAS},
        "good_seconds": good_seconds(own, lambda job: due[job["world"]][job["n"]]),
        "worst_seed": min(tally.share for tally in independent),
        "begun_late_p99_ms": 1000 * quantile([job["late_s"] for job in own], 0.99),
        "degraded": sum(bool(job.get("degraded")) for job in own) / len(own),
        "added_p50_ms": added_ms(own, 0.50),
        "added_p99_ms": added_ms(own, 0.99),
        "wasted_per_1000": 1000 * (len(asked) - answers) / len(own),
        "usd_per_1000": f"{1000 * spent / answers:.4f}" if answers else None,
        **scenes(plan, jobs, lines),
    }


def scenes(plan: Plan, jobs: Sequence[Job], lines: Sequence[Line]) -> dict[str, Any]:
    """From the bill of the three scenes."""
    received: defaultdict[str, list[Line]] = defaultdict(list)
    for line in sorted(lines, key=lambda line: line["received_at"]):
        received[world_of(line)].append(line)
    by_job: defaultdict[str, list[Line]] = defaultdict(list)
    for line in received[FAILOVER]:
        by_job[line["prompt"]].append(line)
    gaps_ms = [
        (later["received_at"] - earlier["received_at"]) * 1000
        for asked in by_job.values()
        for earlier, later in pairwise(asked)
        if earlier["outcome"] == "reset"
    ]
    dead_ms = [1000 * job["took_s"] for job in jobs if job["world"] == DEAD]
    dark = plan.world(DARK)
    return {
        "failovers": len(gaps_ms),
        "failover_p99_ms": quantile(gaps_ms, 0.99) if gaps_ms else None,
        "dead_host_ms": max(dead_ms),
        "dark_requests_per_job": len(_within(received[DARK], SCENE_S)) / len(dark.arrivals),
        "lag_ms": lag_ms(received[DARK]),
    }


def lag_ms(lines: Sequence[Line]) -> float | None:
    """In a full outage: from a provider's 8th failure to the last request that still came before its first probe, the worst provider."""
    found = []
    for provider in {line["provider"] for line in lines}:
        at = [line["received_at"] for line in lines if line["provider"] == provider]
        if len(at) >= TRIP:
            before_probe = [one for one in at if one < at[TRIP - 1] + 9]  # a breaker opens for 10 s at least
            found.append((before_probe[-1] - at[TRIP - 1]) * 1000)
    return max(found, default=None)


def _within(lines: Sequence[Line], length_s: float) -> list[Line]:
    return [line for line in lines if line["received_at"] < lines[0]["received_at"] + length_s]
