"""The oracle: what must be true of ledger, bill and history once everything has come to rest, whatever was done to whom before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from history import History
from invariants import INVARIANTS, Evidence, Figure, Finding
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.cli.screen import plain, show_table
from worker.rescue import MAX_DEATHS
from worker.settlement import MAX_ATTEMPTS
from worker.simulator.bill import Line

SHOWN = 5  # contradictions that a verdict quotes


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one invariant. `figure`: what the claim counts or measures (see each), else how many contradict it."""

    name: str
    ok: bool
    detail: str
    figure: Figure


async def check(
    db: AsyncEngine,
    bill: Iterable[Line],
    history: History,
    *,
    max_attempts: int = MAX_ATTEMPTS,
    max_deaths: int = MAX_DEATHS,
    bounds: Mapping[str, float] | None = None,
    recovery_s: float = 30,
) -> list[Verdict]:
    """One verdict for each invariant, in their order, on a system at rest.

    `bounds`: by name, how large a sampled figure may get; a sample's own `bounds` go before. `recovery_s`: from the end of a
    fault to the next job's end. The providers of the bill bear the names, and take the prices, of the configuration.
    """
    async with db.connect() as ledger:
        sql = "SELECT id, job_id, provider, outcome, billing, cost_usd FROM provider_calls"
        evidence = Evidence(
            ledger=ledger,
            calls={str(row.id): row for row in await ledger.execute(text(sql))},
            bill=list(bill),
            events=history.events(),
            max_attempts=max_attempts,
            max_deaths=max_deaths,
            bounds=bounds or {},
            recovery_s=recovery_s,
        )
        return [_verdict(name, await claim(evidence)) for name, claim in INVARIANTS.items()]


def _verdict(name: str, finding: Finding) -> Verdict:
    wrong = finding.wrong
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    detail = "; ".join(wrong[:SHOWN]) + more if wrong else finding.seen
    return Verdict(name, not wrong, detail, len(wrong) if finding.figure is None else finding.figure)


def table(verdicts: Sequence[Verdict]) -> None:
    """On stdout, for people: aligned on a terminal, tab-separated in a pipe."""
    rows = [(one.name, "ok" if one.ok else "failed", one.figure, one.detail, _claim(one)) for one in verdicts]
    show_table(["invariant", "verdict", "figure", "detail", "claim"], rows)


def to_json(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """In JSON's own types; money as a string."""
    return [plain(asdict(one) | {"claim": _claim(one)}) for one in verdicts]


def _claim(verdict: Verdict) -> str:
    return (INVARIANTS[verdict.name].__doc__ or "").strip()
