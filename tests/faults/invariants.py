"""The twelve claims of the oracle, each a small function that looks for what contradicts it.

They believe nobody: not the ledger's constraints, not its counters, and where a thing can be told from outside, not the ledger alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.job import TERMINAL, JobState
from worker.simulator.bill import Line

# Rows of requests that may never have arrived. NULL is open, which is for I11 to judge.
_UNCERTAIN = frozenset({None, "orphaned", "cancelled", "unreachable", "dropped", "timed_out", "out_of_time"})
# Answers that the asker did without, by its own decision and in its books: another call had to be paid for.
_GIVEN_UP = frozenset({"dropped", "timed_out", "out_of_time", "unfit"})
_ANSWERS = frozenset({"answered", "slow"})
_FRAME = frozenset({"seq", "wall_s", "monotonic_s", "what", "bounds"})  # of a sample, which figures stand in
_STATES = {"ended": [state.value for state in TERMINAL], "legal": [state.value for state in JobState]}

Figure = int | float | Decimal


@dataclass(frozen=True, slots=True)
class Finding:
    """`wrong`: what contradicts the claim, one phrase each. `seen`: what was looked at."""

    wrong: Sequence[str]
    seen: str
    figure: Figure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    ledger: AsyncConnection
    calls: Mapping[str, Any]  # rows of provider_calls by id
    bill: Sequence[Line]
    events: Sequence[Mapping[str, Any]]
    max_attempts: int
    max_deaths: int
    bounds: Mapping[str, float]
    recovery_s: float

    def noted(self, what: str) -> list[Mapping[str, Any]]:
        return [event for event in self.events if event["what"] == what]

    def job_ids(self, what: str) -> list[UUID]:
        return list({UUID(job_id) for event in self.noted(what) for job_id in event["job_ids"]})

    async def said(self, sql: str, **values: Any) -> list[str]:
        """All rows of the query, which has one column; it may name `:ended` and `:legal` states."""
        return list((await self.ledger.execute(text(sql), {**_STATES, **values})).scalars())


async def nothing_is_lost(e: Evidence) -> Finding:
    """Every accepted job is in the ledger and has ended."""
    accepted = e.job_ids("accepted")
    wrong = await e.said(
        """
        SELECT format('job %s is %s', a.id, coalesce(j.state, 'not there'))
        FROM unnest(CAST(:ids AS uuid[])) AS a(id) LEFT JOIN jobs j ON j.id = a.id
        WHERE j.state IS NULL OR j.state <> ALL(:ended) ORDER BY a.id
        """,
        ids=accepted,
    )
    return Finding(wrong, f"{len(accepted)} accepted jobs")


async def one_result_for_each_success(e: Evidence) -> Finding:
    """Every succeeded job has exactly one result, and no other job has any."""
    wrong = await e.said(
        """
        SELECT format('job %s is %s and has %s results', coalesce(j.id, r.job_id), coalesce(j.state, 'not there'), coalesce(r.n, 0))
        FROM jobs j FULL JOIN (SELECT job_id, count(*) AS n FROM results GROUP BY job_id) r ON r.job_id = j.id
        WHERE coalesce(r.n, 0) <> CASE WHEN j.state = 'succeeded' THEN 1 ELSE 0 END
        """
    )
    return Finding(wrong, "successes and results are the same")


async def a_result_is_of_the_last_attempt(e: Evidence) -> Finding:
    """A result carries the fence of its job: nobody settled after another had taken over."""
    wrong = await e.said(
        """
        SELECT format('job %s has fence %s, its result %s', j.id, j.fence, r.fence)
        FROM jobs j JOIN results r ON r.job_id = j.id WHERE r.fence <> j.fence
        """
    )
    return Finding(wrong, "all fences agree")


async def every_request_is_on_the_books(e: Evidence) -> Finding:
    """Every request a provider received has one call row, and a row without a request says that it may not have arrived."""
    received = Counter(line.call_id for line in e.bill)
    unheard = [row for call_id, row in e.calls.items() if call_id not in received]
    wrong = [f"{n} requests bear the call id {call_id}" for call_id, n in received.items() if n > 1 and call_id is not None]
    wrong += [f"request {line.seq} to {line.provider} has no call row" for line in e.bill if line.call_id not in e.calls]
    wrong += [
        f"no request of call {row.id} arrived, but it is {row.outcome}, {row.billing}"
        for row in unheard
        if row.outcome not in _UNCERTAIN or row.billing == "billed"
    ]
    return Finding(wrong, f"{len(e.bill)} requests, {len(e.calls)} rows, {len(unheard)} of requests that did not arrive")


async def nothing_is_paid_twice(e: Evidence) -> Finding:
    """A further answer is paid for only where a killed worker held the job, and no more than calls were open. Figure: further answers."""
    wanted: Counter[str] = Counter()
    given_up = 0
    for line in e.bill:
        row = e.calls.get(line.call_id or "")
        if row is not None and line.outcome in _ANSWERS and line.cost > 0:
            given_up += row.outcome in _GIVEN_UP
            wanted[str(row.job_id)] += row.outcome not in _GIVEN_UP
    surplus = wanted - Counter(set(wanted))
    held, most = _open_at_deaths(e)
    wrong = [f"job {job_id} was paid for {n} times more than deaths explain" for job_id, n in (surplus - held).items()]
    if surplus.total() > most:
        wrong.append(f"{surplus.total()} further answers, but {most} calls open at deaths")
    seen = f"{surplus.total()} further answers, {most} calls open at {len(e.noted('killed'))} deaths, {given_up} given up"
    return Finding(wrong, seen, surplus.total())


def _open_at_deaths(e: Evidence) -> tuple[Counter[str], int]:
    """How many calls were open at deaths, of each job and in all. Was the ledger away at one, orphaned rows speak for all."""
    deaths = e.noted("killed")
    if any(death["open_calls"] is None for death in deaths):
        orphans = Counter(str(row.job_id) for row in e.calls.values() if row.outcome == "orphaned")
        return orphans, orphans.total()
    return sum((Counter(death.get("open", death["held"])) for death in deaths), Counter()), sum(death["open_calls"] for death in deaths)


async def the_books_are_the_bill(e: Evidence) -> Finding:
    """What the rows say was charged is the bill to the last digit, by provider; what is not known is NULL. Figure: USD known."""
    known = {call_id: row for call_id, row in e.calls.items() if row.cost_usd is not None}
    booked: defaultdict[str, Decimal] = defaultdict(Decimal)
    charged: defaultdict[str, Decimal] = defaultdict(Decimal)
    for call_id in known.keys() & {line.call_id for line in e.bill}:
        booked[known[call_id].provider] += known[call_id].cost_usd
    for line in e.bill:
        if line.call_id in known:
            charged[line.provider] += line.cost
    wrong = [f"{name}: booked {booked[name]}, billed {charged[name]}" for name in {*booked, *charged} if booked[name] != charged[name]]
    wrong += [f"call {row.id} is unknown and costs {row.cost_usd}" for row in known.values() if row.billing == "unknown"]
    unpriced = {call_id for call_id, row in e.calls.items() if row.outcome == "answered"} - known.keys()
    wrong += [f"call {call_id} is answered and has no cost" for call_id in unpriced]
    return Finding(wrong, f"{len(known)} rows with a cost, {len(e.calls) - len(known)} unknown", sum(booked.values(), Decimal(0)))


async def attempts_have_an_end(e: Evidence) -> Finding:
    """No job is attempted, or takes workers with it, more often than it may."""
    wrong = await e.said(
        """
        SELECT format('job %s was attempted %s times, %s workers died over it', id, attempts, deaths)
        FROM jobs WHERE attempts > :max_attempts OR deaths > :max_deaths
        """,
        max_attempts=e.max_attempts,
        max_deaths=e.max_deaths,
    )
    return Finding(wrong, f"at most {e.max_attempts} attempts, {e.max_deaths} deaths")


async def cancelled_stays_cancelled(e: Evidence) -> Finding:
    """No job succeeds after its cancel was acknowledged as its end, and none is both cancelled and answered."""
    acknowledged = e.job_ids("cancel_acknowledged")
    wrong = await e.said(
        """
        SELECT format('job %s was cancelled and %s', j.id, CASE j.state WHEN 'succeeded' THEN 'succeeded' ELSE 'has a result' END)
        FROM jobs j WHERE j.id = ANY(CAST(:ids AS uuid[])) AND j.state = 'succeeded'
            OR j.state = 'cancelled' AND EXISTS (SELECT FROM results r WHERE r.job_id = j.id)
        """,
        ids=acknowledged,
    )
    return Finding(wrong, f"{len(acknowledged)} acknowledged cancels")


async def counters_are_counts(e: Evidence) -> Finding:
    """Every batch counts its jobs exactly, and is finished exactly when it is complete and all of them have ended."""
    wrong = await e.said(
        """
        SELECT format('batch %s is %s and says %s, its jobs say %s', name, state, said, counted)
        FROM (
            SELECT b.name, b.state, b.finished_at, ARRAY[b.total, b.succeeded, b.degraded, b.failed, b.cancelled, b.expired] AS said, ARRAY[
                count(j.id), count(*) FILTER (WHERE j.state = 'succeeded'), count(r.answer ->> 'degraded'),
                count(*) FILTER (WHERE j.state = 'failed'),
                count(*) FILTER (WHERE j.state = 'cancelled'), count(*) FILTER (WHERE j.state = 'expired')] AS counted,
                b.state <> 'loading' AND count(*) FILTER (WHERE j.state <> ALL(:ended)) = 0 AS over
            FROM batches b LEFT JOIN jobs j ON j.batch_id = b.id LEFT JOIN results r ON r.job_id = j.id GROUP BY b.id
        ) t WHERE said <> counted OR (state = 'finished') <> over OR (finished_at IS NOT NULL) <> over
        """
    )
    return Finding(wrong, "all batches count right")


async def growth_is_bounded(e: Evidence) -> Finding:
    """No sampled figure exceeds its bound in any process, and every bound was put to the test."""
    wrong: list[str] = []
    peaks: dict[str, float] = {}
    for sample in e.noted("sample"):
        bounds = {**e.bounds, **sample.get("bounds", {})}
        for name in sample.keys() - _FRAME:
            value = max(sample[name].values(), default=0) if isinstance(sample[name], Mapping) else sample[name]
            peaks[name] = max(value, peaks.get(name, value))
            if value > bounds.get(name, value):
                wrong.append(f"{name} was {value}, bound {bounds[name]} (event {sample['seq']})")
    wrong += [f"{name} was never sampled" for name in e.bounds.keys() - peaks.keys()]
    return Finding(wrong, ", ".join(f"{name} at most {value}" for name, value in sorted(peaks.items())) or "no samples, no bounds")


async def attempts_are_in_order(e: Evidence) -> Finding:
    """States are legal, fences only grow, each is one attempt that asks one provider after the other, and no call stays open after it."""
    wrong = await e.said(
        """
        SELECT format('job %s is %s, worker %s, finished %s', id, state, worker_id, finished_at) FROM jobs
        WHERE state <> ALL(:legal) OR (state = 'running') <> (worker_id IS NOT NULL) OR (state = ANY(:ended)) <> (finished_at IS NOT NULL)
        UNION ALL
        SELECT format('call %s has fence %s, its job %s', c.id, c.fence, j.fence)
        FROM provider_calls c JOIN jobs j ON j.id = c.job_id WHERE c.fence > j.fence
        UNION ALL
        SELECT format('call %s of fence %s was opened after one of fence %s', id, fence, earlier) FROM (
            SELECT *, lag(fence) OVER (PARTITION BY job_id ORDER BY opened_at, id) AS earlier FROM provider_calls) t WHERE fence < earlier
        UNION ALL
        SELECT format('call %s began while another of fence %s was under way', id, fence) FROM (
            SELECT *, max(ended_at) OVER (PARTITION BY job_id, fence ORDER BY started_at, id ROWS BETWEEN UNBOUNDED PRECEDING
                AND 1 PRECEDING) AS busy_until FROM provider_calls WHERE started_at IS NOT NULL) t WHERE started_at < busy_until
        UNION ALL
        SELECT format('call %s is open, its job %s', c.id, coalesce(j.state, 'not there'))
        FROM provider_calls c LEFT JOIN jobs j ON j.id = c.job_id
        WHERE c.outcome IS NULL AND (j.state = 'running' AND j.fence = c.fence) IS NOT TRUE
        """
    )
    return Finding(wrong, "all in order")


async def work_goes_on_after_a_fault(e: Evidence) -> Finding:
    """After each healed fault one of the waiting jobs ends within the bound, time under other faults aside. Figure: longest time, s."""
    spans, ends = list(_faults(e)), await _ends(e)
    wrong, longest_s = [], 0.0
    for name, _, healed_s in spans:
        waiting = [ended_s for accepted_s, ended_s in ends if accepted_s <= healed_s and (ended_s is None or ended_s > healed_s)]
        if not waiting:
            continue
        if not (ended := [ended_s for ended_s in waiting if ended_s is not None]):
            wrong.append(f"none of {len(waiting)} waiting jobs ended after {name} had healed")
            continue
        took_s = _well_s(spans, healed_s, min(ended))
        longest_s = max(longest_s, took_s)
        if took_s > e.recovery_s:
            wrong.append(f"the first of {len(waiting)} waiting jobs ended {took_s:.1f} s after {name} had healed")
    return Finding(wrong, f"{len(spans)} healed faults, bound {e.recovery_s:g} s", round(longest_s, 3))


def _faults(e: Evidence) -> Iterator[tuple[str, float, float]]:
    """Name, beginning and end of each that healed."""
    began: dict[str, float] = {}
    for event in e.events:
        if event["what"] == "fault":
            began.setdefault(event["name"], event["wall_s"])
        elif event["what"] == "healed":
            yield event["name"], began.pop(event["name"], event["wall_s"]), event["wall_s"]


async def _ends(e: Evidence) -> list[tuple[float, float | None]]:
    """When each accepted job was accepted, and when it ended. To the millisecond, where counting now and then would miss by its step."""
    sql = "SELECT id, extract(epoch FROM finished_at) FROM jobs WHERE id = ANY(CAST(:ids AS uuid[])) AND finished_at IS NOT NULL"
    ended = {str(job_id): float(at_s) for job_id, at_s in await e.ledger.execute(text(sql), {"ids": e.job_ids("accepted")})}
    return [(event["wall_s"], ended.get(job_id)) for event in e.noted("accepted") for job_id in event["job_ids"]]


def _well_s(spans: Sequence[tuple[str, float, float]], from_s: float, to_s: float) -> float:
    """So long between the two nothing was broken."""
    well_s, now_s = 0.0, from_s
    for _, began_s, healed_s in sorted(spans, key=lambda span: span[1]):
        well_s += max(0.0, min(began_s, to_s) - now_s)
        now_s = max(now_s, healed_s)
    return well_s + max(0.0, to_s - now_s)


INVARIANTS: Mapping[str, Callable[[Evidence], Awaitable[Finding]]] = {
    "I1": nothing_is_lost,
    "I2": one_result_for_each_success,
    "I3": a_result_is_of_the_last_attempt,
    "I4": every_request_is_on_the_books,
    "I5": nothing_is_paid_twice,
    "I6": the_books_are_the_bill,
    "I7": attempts_have_an_end,
    "I8": cancelled_stays_cancelled,
    "I9": counters_are_counts,
    "I10": growth_is_bounded,
    "I11": attempts_are_in_order,
    "I12": work_goes_on_after_a_fault,
}
