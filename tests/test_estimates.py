"""Tokens that no provider counted: estimated, marked, and shown as what they are."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
import stage
from alembic import command
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from worker import database, reads, schema
from worker.calls import NewCall, Stopwatch, open_calls
from worker.config import ProviderConfig
from worker.cost import IMAGE_TOKENS, Pricing, Usage, estimated_tokens
from worker.errors import Unreadable
from worker.job import Answer, ChatRequest, new_id
from worker.ledger import document, settle, settle_documents
from worker.providers.counted import counted
from worker.providers.provider import Reply
from worker.signals import Signal
from worker.views import CostKey

ASK = ChatRequest([{"role": "user", "content": "x" * 310}])  # 350 bytes of JSON around it
PRICED = Pricing.of(ProviderConfig.model_validate({"base_url": "http://a/v1", "model": "m", "price": {"input": "1", "output": "2"}}))
LONG_AGO = datetime.now(UTC) - timedelta(days=1)


def answered(usage=None, content="y" * 35, **fields):
    answer = Answer(content=content, finish_reason="stop", provider="p", model="m", usage=usage or Usage(), **fields)
    return Reply(signal=Signal.ANSWERED, answer=answer, usage=answer.usage)


@pytest.mark.parametrize(
    ("said", "tokens"),
    [
        ("", 0),
        ("a", 1),
        ("x" * 35, 10),
        ("ü" * 35, 20),  # bytes, not characters
        ("\ud800" * 7, 2),  # what cannot be encoded is a byte
        ([], 1),
        ([{"role": "user", "content": "x" * 310}], 99),
        ([{"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10**6}}]}], 19 + IMAGE_TOKENS),
        ([{"content": 'I wrote "data:a/b;base64,' + "x" * 3500 + '"'}], 1015),  # a text about a data URL is a text
        ([{"content": "data:" + "x" * 7000}], 2007),
    ],
)
def test_a_token_is_three_and_a_half_bytes_and_a_file_is_none_of_its_bytes(said, tokens):
    assert estimated_tokens(said) == pytest.approx(tokens, abs=2 if isinstance(said, list) else 0)


def test_an_answer_without_usage_gets_an_estimate_of_both_sides_that_is_marked_as_such():
    reply = counted(answered(), ASK)
    assert reply.usage == reply.answer.usage == Usage(estimated_tokens(ASK.messages), 10, estimated=True)


@pytest.mark.parametrize(
    ("usage", "kept"),
    [
        (Usage(7, None, 3), Usage(7, 10, 3, estimated=True)),
        (Usage(None, 7, None, 5), Usage(estimated_tokens(ASK.messages), 7, None, 5, estimated=True)),
        (Usage(0, 0), Usage(estimated_tokens(ASK.messages), 10, estimated=True)),
        (Usage(7, 3), Usage(7, 3)),
    ],
)
def test_what_was_counted_is_kept_and_a_count_of_nothing_is_none(usage, kept):
    assert counted(answered(usage), ASK).usage == kept


def test_tool_calls_are_output_too():
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "z" * 3500}}]
    assert counted(answered(content=None, tool_calls=calls), ASK).usage.output_tokens > 1000


@pytest.mark.parametrize("signal", sorted(set(Signal) - {Signal.ANSWERED}))
def test_what_is_no_answer_is_never_estimated(signal):
    reply = Reply(signal=signal)
    assert counted(reply, ASK) is reply


def test_an_estimate_is_priced_like_a_count_and_its_call_is_marked():
    call = Stopwatch(new_id(), "p", "m").book(counted(answered(), ASK), PRICED)
    assert call.cost_usd == PRICED.cost(Usage(estimated_tokens(ASK.messages), 10))
    assert call.to_json()["estimated"] is True


@given(st.builds(Usage, *[st.none() | st.integers(0, 2**31)] * 4, st.booleans()))
def test_an_answer_comes_back_with_its_mark(usage):
    answer = answered(usage).answer
    assert Answer.from_json(json.loads(json.dumps(answer.to_json()))) == answer


def test_an_answer_of_before_there_were_estimates_was_counted():
    body = answered(Usage(1, 2)).answer.to_json()
    del body["usage"]["estimated"]
    assert Answer.from_json(body).usage == Usage(1, 2)


@pytest.mark.parametrize("mark", [None, 1, "yes"])
def test_an_answer_whose_mark_is_none_cannot_be_read(mark):
    body = answered(Usage(1, 2)).answer.to_json()
    with pytest.raises(Unreadable):
        Answer.from_json(body | {"usage": body["usage"] | {"estimated": mark}})


def estimated(call):
    return replace(call, usage=replace(call.usage, estimated=True))


def test_a_settled_call_is_marked_in_the_books_in_its_timeline_and_in_the_costs(database_url):
    async def story(db):
        claims = await stage.take(db, [await stage.a_job(db) for _ in range(3)])
        for claim, guess in zip(claims, (True, False, False), strict=True):
            whole = stage.answered(claim, "hi")
            (call,) = whole.calls
            await settle(db, [replace(whole, calls=(estimated(call),)) if guess else whole])
        marks = [view.estimated for claim in claims for view in await reads.calls(db, claim.job_id)]
        assert marks == [True, False, False]
        (row,) = await reads.costs(db, CostKey.PROVIDER, LONG_AGO)
        assert (row.calls, row.cost_usd, row.coverage) == (3, Decimal("0.75"), 1)
        assert (row.estimated_calls, row.estimated_usd) == (1, Decimal("0.25"))

    stage.play(database_url, story)


@pytest.mark.parametrize(("marked", "calls", "usd"), [(False, 0, 0), (True, 1, None)])
def test_an_estimate_at_an_unknown_price_is_unknown_and_no_estimate_is_nothing(marked, calls, usd, database_url):
    async def story(db):
        (claim,) = await stage.take(db, [await stage.a_job(db)])
        whole = stage.answered(claim, "hi")
        (call,) = whole.calls
        unpriced = replace(call, cost_usd=None)
        await settle(db, [replace(whole, calls=(estimated(unpriced) if marked else unpriced,))])
        (row,) = await reads.costs(db, CostKey.MODEL, LONG_AGO)
        assert (row.cost_usd, row.estimated_calls, row.estimated_usd) == (None, calls, usd)

    stage.play(database_url, story)


def test_a_call_that_is_booked_when_the_next_one_is_opened_is_marked_too(database_url):
    async def story(db):
        (claim,) = await stage.take(db, [await stage.a_job(db)])
        ended = estimated(stage.a_call(claim.opened_id, Signal.UNFIT))
        new = NewCall(id=new_id(), job_id=claim.job_id, fence=claim.fence, provider="second", model="m", ended=(ended,))
        assert await open_calls(db, [new]) == [True]
        assert [call.estimated for call in await stage.calls(db, claim.job_id)] == [True, False]

    stage.play(database_url, story)


def test_what_an_older_worker_left_to_be_settled_is_booked_unmarked(database_url):
    async def story(db):
        (claim,) = await stage.take(db, [await stage.a_job(db)])
        spooled = json.loads(json.dumps(document(stage.answered(claim, "hi"))))
        for call in spooled["calls"]:
            del call["estimated"]
        assert await settle_documents(db, [spooled], again=True) == [True]
        assert [call.estimated for call in await stage.calls(db, claim.job_id)] == [False]

    stage.play(database_url, story)


def test_the_mark_can_be_taken_back_and_made_again(database_url):
    def columns():
        engine = create_engine(database.driver_url(database_url))
        with engine.connect() as connection:
            sql = "SELECT column_name FROM information_schema.columns WHERE table_name = 'provider_calls'"
            found = set(connection.execute(text(sql)).scalars())
        engine.dispose()
        return found

    config = schema._alembic(database_url)
    command.downgrade(config, "0002")
    assert "estimated" not in columns()
    command.upgrade(config, "head")
    assert "estimated" in columns()
