"""The comparison of our books with the simulator's bill: it holds when nothing is wrong, and says what is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import httpx
import pytest
import stage
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import database
from worker.cli.books import Comparison, compare
from worker.job import new_id
from worker.simulator.script import Script
from worker.simulator.server import Simulator

SCRIPT = Script.model_validate({
    "providers": {
        "steady": {"model": "sim", "price": {"input": "1", "output": "2"}},
        "late": {"model": "sim", "price": {"input": "1", "output": "2"}, "faults": [{"kind": "slow", "rate": 1.0, "seconds": 0}]},
        "down": {"model": "sim", "faults": [{"kind": "status", "rate": 1.0, "status": 503}]},
        "cutting": {"model": "sim", "price": {"input": "1", "output": "2"}, "faults": [{"kind": "truncate", "rate": 1.0}]},
    }
})  # fmt: skip
A_CALL = """
INSERT INTO provider_calls (id, job_id, fence, provider, model, opened_at, outcome, billing, cost_usd)
VALUES (:id, :job_id, 1, :provider, 'sim', :opened_at, 'answered', :billing, :cost_usd)
"""
BEGAN = datetime.now(UTC) - timedelta(minutes=1)


class Market:
    """A ledger and a simulated vendor: `send` makes a request, `book` enters one with what the bill says of it."""

    def __init__(self, db: AsyncEngine, simulator: Simulator, http: httpx.AsyncClient) -> None:
        self.db, self.simulator, self.http = db, simulator, http

    async def send(self, call_id: UUID | None, provider: str = "steady") -> None:
        headers = {"X-Client-Request-Id": str(call_id)} if call_id else {}
        body = {"model": "sim", "messages": [{"role": "user", "content": "hello"}]}
        try:
            await self.http.post(f"{self.simulator.base_url(provider)}/chat/completions", json=body, headers=headers)
        except httpx.TransportError:
            assert provider == "cutting"

    async def book(self, call_id: UUID, *, job_id: UUID | None = None, provider: str = "steady", **changes: Any) -> None:
        charged = next((line.cost for line in self.simulator.bill.lines() if line.call_id == str(call_id)), Decimal(0))
        values = {"cost_usd": charged, "billing": "billed", "opened_at": datetime.now(UTC)} | changes
        await stage.rows(self.db, A_CALL, id=call_id, job_id=job_id or new_id(), provider=provider, **values)

    async def made(self, **changes: Any) -> UUID:
        """A call as it should be, but for the changes."""
        call_id = new_id()
        await self.send(call_id, changes.get("provider", "steady"))
        await self.book(call_id, **changes)
        return call_id


Story = Callable[[Market], Awaitable[None]]


@pytest.fixture
def compared(database_url: str) -> Callable[[Story], Comparison]:
    """What the comparison says after a story."""

    async def played(story: Story) -> Comparison:
        db = database.engine(database_url)
        try:
            async with Simulator(SCRIPT) as simulator, httpx.AsyncClient(timeout=30, trust_env=False) as http:
                await story(Market(db, simulator, http))
                return await compare(db, http, simulator.url, BEGAN)
        finally:
            await db.dispose()

    def told(story: Story) -> Comparison:
        return asyncio.run(played(story))

    return told


def test_books_that_agree_hold_and_show_both_sides(compared):
    async def story(market: Market) -> None:
        await market.made()
        await market.made()
        await market.made(provider="down", billing="free")

    comparison = compared(story)
    assert comparison.faults == []
    steady, down = comparison.providers["steady"], comparison.providers["down"]
    assert (steady.billed_requests, steady.booked_requests, steady.billed_answers, steady.unknown_calls) == (2, 2, 2, 0)
    assert steady.billed_usd == steady.booked_usd > 0
    assert (down.billed_requests, down.booked_requests, down.billed_answers, down.billed_usd) == (1, 1, 0, 0)


def test_books_on_which_nothing_stands_hold(compared):
    async def story(market: Market) -> None:
        pass

    assert compared(story) == Comparison({}, [])


def test_what_failed_first_and_was_answered_by_another_holds(compared):
    async def story(market: Market) -> None:
        job_id = new_id()
        await market.made(job_id=job_id, provider="down", billing="free")
        await market.made(job_id=job_id)

    assert compared(story).faults == []


def test_an_unknown_cost_is_counted_with_what_it_was_charged_and_is_no_fault(compared):
    async def story(market: Market) -> None:
        await market.made()
        await market.made(provider="cutting", billing="unknown", cost_usd=None)

    comparison = compared(story)
    assert comparison.faults == []
    cutting = comparison.providers["cutting"]
    assert (cutting.unknown_calls, cutting.booked_usd) == (1, 0)
    assert cutting.unknown_usd == cutting.billed_usd > 0
    assert comparison.providers["steady"].unknown_calls == 0


def test_calls_from_before_the_beginning_are_left_out(compared):
    async def story(market: Market) -> None:
        await market.made()
        await market.book(new_id(), opened_at=BEGAN - timedelta(hours=1), cost_usd=Decimal(7))

    comparison = compared(story)
    assert comparison.faults == []
    assert comparison.providers["steady"].booked_requests == 1


async def _off_the_books(market: Market) -> None:
    await market.made()
    await market.send(new_id())


async def _without_an_id(market: Market) -> None:
    await market.made()
    await market.send(None)


async def _never_sent(market: Market) -> None:
    await market.made()
    await market.book(new_id(), cost_usd=None)


async def _never_sent_by_a_provider_nobody_asked(market: Market) -> None:
    await market.book(new_id(), provider="late", cost_usd=None)


async def _sent_twice(market: Market) -> None:
    await market.send(await market.made(provider="down", billing="free"), "down")


async def _answered_twice(market: Market) -> None:
    job_id = new_id()
    await market.made(job_id=job_id)
    await market.made(job_id=job_id)


async def _wrong_cost(market: Market) -> None:
    await market.made()
    await market.made(cost_usd=Decimal("0.000000000001"))


async def _zero_for_what_was_charged(market: Market) -> None:
    await market.made(provider="cutting", cost_usd=Decimal(0), billing="free")


async def _under_another_provider(market: Market) -> None:
    call_id = new_id()
    await market.send(call_id)
    await market.made(provider="down", billing="free")
    await market.book(call_id, provider="down")


@pytest.mark.parametrize(
    ("story", "fault"),
    [
        (_off_the_books, "1 requests are on the simulator's bill and not on our books"),
        (_without_an_id, "1 requests are on the simulator's bill and not on our books"),
        (_never_sent, "1 calls are on our books that no provider received"),
        (_never_sent_by_a_provider_nobody_asked, "1 calls are on our books that no provider received"),
        (_sent_twice, "1 calls reached a provider more than once"),
        (_answered_twice, "1 jobs were answered more than once"),
        (_wrong_cost, "steady charges other sums than our books say for 1 calls"),
        (_zero_for_what_was_charged, "cutting charges other sums than our books say for 1 calls"),
        (_under_another_provider, "down charges other sums than our books say for 1 calls"),
    ],
)
def test_each_difference_is_a_fault_and_the_only_one(compared, story, fault):
    assert compared(story).faults == [fault]


def test_a_job_answered_twice_is_found_however_slow_the_answers_were(compared):
    async def story(market: Market) -> None:
        job_id = new_id()
        await market.made(job_id=job_id, provider="late")
        await market.made(job_id=job_id, provider="late")

    assert compared(story).faults == ["1 jobs were answered more than once"]
