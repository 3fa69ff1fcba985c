"""What the books say of one call."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from worker.calls import Stopwatch
from worker.config import ProviderConfig
from worker.cost import Pricing, Usage
from worker.job import Answer, new_id
from worker.providers.provider import Reply
from worker.signals import POLICIES, Billing, Signal

PRICED = Pricing.of(
    ProviderConfig.model_validate({"base_url": "http://127.0.0.1:1/v1", "model": "m", "price": {"input": "1", "output": "2"}})
)
UNPRICED = Pricing(None, lambda input_tokens: None)
USAGE = Usage(1_000, 100)
SPENT = Decimal("0.0012")


def booked(reply: Reply, pricing: Pricing = PRICED):
    return Stopwatch(new_id(), "p", "m").book(reply, pricing)


@pytest.mark.parametrize("signal", list(Signal))
def test_a_call_without_usage_costs_nothing_only_where_that_is_known(signal):
    call = booked(Reply(signal=signal))
    assert call.billing is POLICIES[signal].billing
    assert call.cost_usd == (0 if call.billing is Billing.FREE else None)


@pytest.mark.parametrize("signal", list(Signal))
def test_tokens_that_came_out_are_paid_whatever_became_of_the_call(signal):
    call = booked(Reply(signal=signal, usage=USAGE))
    assert (call.billing, call.cost_usd, call.price_source) == (Billing.BILLED, SPENT, "config")


def test_an_unknown_price_is_an_unknown_cost():
    call = booked(Reply(signal=Signal.ANSWERED, usage=USAGE), UNPRICED)
    assert (call.billing, call.cost_usd, call.price_source) == (Billing.BILLED, None, None)


def test_a_refusal_is_free_although_it_counted_the_prompt():
    call = booked(Reply(signal=Signal.INVALID_REQUEST, usage=Usage(1_000, 0)))
    assert (call.billing, call.cost_usd, call.price_source) == (Billing.FREE, 0, None)


def test_a_call_keeps_who_when_and_how():
    row, before = new_id(), datetime.now(UTC)
    answer = Answer(content="x", finish_reason="stop", provider="p", model="m-2", usage=USAGE)
    reply = Reply(signal=Signal.ANSWERED, answer=answer, usage=USAGE, http_status=200, error_code=None)
    call = Stopwatch(row, "p", "m").book(reply, PRICED)
    assert (call.id, call.provider, call.model, call.signal, call.http_status) == (row, "p", "m", "answered", 200)
    assert before <= call.started_at <= call.ended_at <= datetime.now(UTC)
    assert call.latency_ms >= 0
    assert (call.answer, call.usage) == (answer, USAGE)


def test_what_the_provider_did_not_count_is_unknown_not_zero():
    call = booked(Reply(signal=Signal.ANSWERED, usage=None))
    assert call.usage == Usage(None, None, None, None)
    assert call.cost_usd is None
