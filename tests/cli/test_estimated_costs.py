"""How commands and the books of the demo show costs that rest on estimated tokens: only where there are some."""

import asyncio
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import httpx
import stage

from worker import database
from worker.cli.books import compare
from worker.job import new_id
from worker.ledger import settle
from worker.simulator.script import Script
from worker.simulator.server import Simulator

PRICE = {"input": "1", "output": "2"}
SCRIPT = Script.model_validate({"providers": {"steady": {"model": "sim", "price": PRICE}}})
A_CALL = """
INSERT INTO provider_calls (id, job_id, fence, provider, model, outcome, billing, cost_usd, estimated)
VALUES (:id, :id, 1, 'steady', 'sim', 'answered', 'billed', 0.5, :estimated)
"""


def an_answered_job(database_url):
    made = []

    async def story(db):
        (claim,) = await stage.take(db, [await stage.a_job(db)])
        await settle(db, [stage.answered(claim, "hi")])
        made.append(str(claim.job_id))

    stage.play(database_url, story)
    return made[0]


def mark(database_url):
    async def story(db):
        await stage.rows(db, "UPDATE provider_calls SET estimated = true")

    stage.play(database_url, story)


def test_costs_and_timelines_say_what_is_estimated_and_nothing_where_nothing_is(backstop, database_url):
    job_id = an_answered_job(database_url)
    counted = backstop("costs"), backstop("job", job_id)
    assert all("estimated" not in ended.out + ended.err for ended in counted)
    mark(database_url)
    costs, timeline = backstop("costs"), backstop("job", job_id)
    assert costs.err == timeline.err == "of which 0.25 USD estimated: the provider counted no tokens\n"
    assert costs.out == counted[0].out  # who reads the table in a pipe sees no difference
    assert timeline.out == counted[1].out.replace("billed\n", "billed, estimated\n")
    (row,) = backstop("costs", "--json").json()
    assert (row["estimated_calls"], row["estimated_usd"]) == (1, "0.25")
    (call,) = backstop("job", job_id, "--json").json()["calls"]
    assert call["estimated"] is True


def test_an_estimate_may_differ_from_the_bill_and_a_count_may_not(database_url):
    async def story(db):
        async with Simulator(SCRIPT) as simulator, httpx.AsyncClient(timeout=30, trust_env=False) as http:
            for estimated in (True, False):
                call_id = new_id()
                body = {"model": "sim", "messages": [{"role": "user", "content": "hello"}]}
                url = f"{simulator.base_url('steady')}/chat/completions"
                await http.post(url, json=body, headers={"X-Client-Request-Id": str(call_id)})
                await stage.rows(db, A_CALL, id=call_id, estimated=estimated)
            return await compare(db, http, simulator.url, datetime.now(UTC) - timedelta(minutes=1))

    async def played():
        db = database.engine(database_url)
        try:
            return await story(db)
        finally:
            await db.dispose()

    comparison = asyncio.run(played())
    assert comparison.faults == ["steady charges other sums than our books say for 1 calls"]
    assert (comparison.providers["steady"].booked_usd, comparison.providers["steady"].estimated_usd) == (1, Decimal("0.5"))
