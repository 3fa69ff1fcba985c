"""What a soak comes to, in figures for people: counted from ledger, bill and history, none of them taken at its word."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from statistics import median
from typing import Any

from lab import Lab

import worker

_ANSWERS = frozenset({"answered", "slow"})
_GIVEN_UP = frozenset({"dropped", "timed_out", "out_of_time", "unfit"})  # the books say that we did without that answer
_NOBODY_LEFT = frozenset({"kill all workers", "cut the power of all"})
_MB = 2**20
_ROOT = Path(worker.__file__).parents[1]

Figures = dict[str, Any]


async def figures(lab: Lab, ttl_s: float) -> Figures:
    """All of them by name; seconds, megabytes and USD where the name says so."""
    events = lab.history.events()
    return {
        **_befallen(events),
        **await _jobs(lab, events),
        **await _requests(lab, events),
        **_recovery(events, ttl_s),
        **await _cancels(lab, events),
        **_told(events),
        **_memory(events),
    }


def _befallen(events: Sequence[Mapping[str, Any]]) -> Figures:
    happened = Counter(event["what"] for event in events)
    faults = Counter(event["name"] for event in events if event["what"] == "fault")
    return {
        "workers killed": happened["killed"] - happened["haunted"],
        "… and others that came back from the dead": happened["haunted"],
        "Redis flushed": happened["flushed"],
        "Postgres restarted": happened["postgres restarted"],
        "workers drained": happened["drained"],
        "workers that ended by themselves": happened["fell"],
        "starts that failed and were tried again": happened["did not start"],
        "faults": dict(sorted(faults.items())),
    }


async def _jobs(lab: Lab, events: Sequence[Mapping[str, Any]]) -> Figures:
    accepted = {job_id for event in events if event["what"] == "accepted" for job_id in event["job_ids"]}
    found = {str(row.id): row.state for row in await lab.rows("SELECT id, state FROM jobs WHERE finished_at IS NOT NULL")}
    twice = await lab.rows("SELECT job_id FROM results GROUP BY job_id HAVING count(*) > 1")
    states = Counter(found.values())
    codes = await lab.rows("SELECT error ->> 'code' AS code, count(*) AS n FROM jobs WHERE state = 'failed' GROUP BY 1 ORDER BY 1")
    again = await lab.rows("SELECT count(*) AS n FROM jobs WHERE fence > 1")
    return {
        "jobs accepted": len(accepted),
        "ended": len(accepted & found.keys()),
        "lost": len(accepted - found.keys()),
        "double results": len(twice),
        **{state: states[state] for state in ("succeeded", "failed", "cancelled", "expired")},
        "failed, why": {row.code: row.n for row in codes},
        "jobs attempted again": again[0].n,
    }


async def _requests(lab: Lab, events: Sequence[Mapping[str, Any]]) -> Figures:
    calls = {str(row.id): row for row in await lab.rows("SELECT id, job_id, outcome, billing, cost_usd FROM provider_calls")}
    lines = list(lab.bill.lines())
    deaths = [event for event in events if event["what"] == "killed"]
    paid: Counter[str] = Counter()
    given_up = 0
    for line in lines:
        call = calls.get(line.call_id or "")
        if call is not None and line.outcome in _ANSWERS and line.cost > 0:
            given_up += call.outcome in _GIVEN_UP
            paid[str(call.job_id)] += call.outcome not in _GIVEN_UP
    surplus = paid - Counter(set(paid))
    held = sum((Counter(death.get("open", ())) for death in deaths), Counter())
    known = {call_id: call.cost_usd for call_id, call in calls.items() if call.cost_usd is not None}
    return {
        "requests in the bill": len(lines),
        "calls in the books": len(calls),
        "off the books": sum(line.call_id not in calls for line in lines),
        "calls of unknown cost": dict(sorted(Counter(str(call.outcome) for call in calls.values() if call.billing == "unknown").items())),
        "billed, USD": sum((line.cost for line in lines), Decimal(0)),
        "billed for calls of known cost, USD": sum((line.cost for line in lines if line.call_id in known), Decimal(0)),
        "booked, USD": sum(known.values(), Decimal(0)),
        "calls open at kills": None if any(death["open_calls"] is None for death in deaths) else sum(d["open_calls"] for d in deaths),
        "billed twice": surplus.total(),
        "billed twice where nobody was killed": (surplus - held).total(),
        "answers given up by a timeout or a cut": given_up,
    }


def _recovery(events: Sequence[Mapping[str, Any]], ttl_s: float) -> Figures:
    """From the moment of its death until all that a worker held was queued again. Well: Postgres stood, and another worker lived."""
    rescued = [event for event in events if event["what"] == "rescued" and event["held"]]
    troubles = _spans(events)
    well = [e["took_s"] for e in rescued if not any(began < e["wall_s"] and end > e["died_s"] for began, end in troubles)]
    every = [e["took_s"] for e in rescued]
    return {
        "heartbeat TTL, s": ttl_s,
        "deaths that left jobs": len(every),
        "… with recovery, median, s": round(median(every), 2) if every else None,
        "… with recovery, worst, s": round(max(every), 2) if every else None,
        "deaths while Postgres stood and another worker lived": len(well),
        "recovery, median, s": round(median(well), 2) if well else None,
        "recovery, worst, s": round(max(well), 2) if well else None,
    }


def _spans(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """When Postgres was broken, or no worker was left, from and to."""
    began: dict[str, float] = {}
    found = []
    for event in events:
        if event["what"] == "fault" and (event["against"] == "postgres" or event["name"] in _NOBODY_LEFT):
            began[event["name"]] = event["wall_s"]
        elif event["what"] == "healed" and event["name"] in began:
            found.append((began.pop(event["name"]), event["wall_s"]))
    return found


async def _cancels(lab: Lab, events: Sequence[Mapping[str, Any]]) -> Figures:
    asked = [event for event in events if event["what"] == "cancel"]
    replies = Counter(event["reply"] for event in asked)
    flagged = list({event["job_id"] for event in asked if event["reply"] == "flagged"})
    ends = await lab.rows("SELECT state, count(*) AS n FROM jobs WHERE id = ANY(CAST(:ids AS uuid[])) GROUP BY 1", ids=flagged)
    ended = Counter({row.state: row.n for row in ends})
    return {
        "cancels asked for": len(asked),
        "cancelled at once": replies["acknowledged"],
        "came too late": replies["late"],
        "raced a running job": len(flagged),
        "… and stopped it": ended["cancelled"],
        "… and its answer was first": ended["succeeded"],
    }


def _told(events: Sequence[Mapping[str, Any]]) -> Figures:
    odd = Counter(f"{event['status']} {event['asked'].split('/')[0]}" for event in events if event["what"] == "odd reply")
    return {
        "answers heard over HTTP": sum(event["what"] == "told" for event in events),
        "replies no API may give": dict(odd),
    }


def _memory(events: Sequence[Mapping[str, Any]]) -> Figures:
    samples = [event for event in events if event["what"] == "sample"]

    def most(name: str) -> float:
        found = [sample[name] for sample in samples if name in sample]
        return max((max(one.values(), default=0) if isinstance(one, Mapping) else one for one in found), default=0)

    return {
        "RSS of a worker at most, MB": round(most("rss") / _MB),
        "RSS of the API at most, MB": round(most("api_rss") / _MB),
        "Redis at most, MB": round(most("redis_bytes") / _MB, 1),
        "messages in Redis at most": most("redis_depth"),
    }


async def machine(lab: Lab) -> dict[str, str]:
    """What it ran on, and what was run."""
    (version,) = await lab.rows("SHOW server_version")
    valkey = await lab.redis.info("server")
    changed = " with changes" if _git("status", "--porcelain") else ""
    return {
        "commit": (_git("rev-parse", "--short=12", "HEAD") or "unknown") + changed,
        "cores": str(len(os.sched_getaffinity(0))),
        "load": f"{os.getloadavg()[0]:.1f} at the end",
        "python": platform.python_version(),
        "postgres": version.server_version,
        "valkey": valkey.get("valkey_version", valkey["redis_version"]),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "--no-optional-locks", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=30)
    except OSError:
        return ""
    return done.stdout.strip()
