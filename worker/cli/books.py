"""Holds our books against the simulator's bill: each request once on both sides, and the same money."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

import httpx
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

GOOD = frozenset({"answered", "slow"})
_CALLS = text("SELECT id, job_id, provider, outcome, cost_usd, estimated FROM provider_calls WHERE opened_at >= :since")


@dataclass(frozen=True, slots=True)
class Books:
    """One provider, on its side and on ours. `unknown_calls`: their cost is not known to us, `unknown_usd` is what it charges for them.

    `estimated_usd`: the part of `booked_usd` for which it counted no tokens; it may charge another sum.
    """

    billed_requests: int
    booked_requests: int
    billed_answers: int
    billed_usd: Decimal
    booked_usd: Decimal
    unknown_calls: int
    unknown_usd: Decimal
    estimated_usd: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """`faults` names every difference; empty when the books hold."""

    providers: dict[str, Books]
    faults: list[str]


async def compare(db: AsyncEngine, http: httpx.AsyncClient, simulator: str, since: datetime) -> Comparison:
    """Everything the simulator received, request by request, against the calls opened since then."""
    bill = (await http.get(f"{simulator}/bill?full=1")).json()["lines"]
    async with db.connect() as connection:
        calls = (await connection.execute(_CALLS, {"since": since})).all()
    booked = {str(call.id): call for call in calls}
    faults = []
    received = Counter(line["call_id"] for line in bill)
    if twice := [call_id for call_id, times in received.items() if times > 1]:
        faults.append(f"{len(twice)} calls reached a provider more than once")
    if off := received.keys() - booked.keys():
        faults.append(f"{len(off)} requests are on the simulator's bill and not on our books")
    if unsent := booked.keys() - received.keys():
        faults.append(f"{len(unsent)} calls are on our books that no provider received")
    answers = Counter(booked[line["call_id"]].job_id for line in bill if line["outcome"] in GOOD and line["call_id"] in booked)
    if again := [job for job, times in answers.items() if times > 1]:
        faults.append(f"{len(again)} jobs were answered more than once")
    providers = {}
    for name in dict.fromkeys(line["provider"] for line in bill):
        lines = [line for line in bill if line["provider"] == name]
        ours = [call for call in calls if call.provider == name]
        charges = {line["call_id"]: Decimal(line["cost"]) for line in lines}
        known = [call for call in ours if call.cost_usd is not None]
        unknown = [call for call in ours if call.cost_usd is None]
        providers[name] = Books(
            billed_requests=len(lines),
            booked_requests=len(ours),
            billed_answers=sum(line["outcome"] in GOOD for line in lines),
            billed_usd=sum(charges.values(), Decimal(0)),
            booked_usd=sum((call.cost_usd for call in known), Decimal(0)),
            unknown_calls=len(unknown),
            unknown_usd=sum((charges.get(str(call.id), Decimal(0)) for call in unknown), Decimal(0)),
            estimated_usd=sum((call.cost_usd for call in known if call.estimated), Decimal(0)),
        )
        wrong = [call for call in known if not call.estimated and call.cost_usd != charges.get(str(call.id))]
        if wrong:
            faults.append(f"{name} charges other sums than our books say for {len(wrong)} calls")
    return Comparison(providers, faults)
