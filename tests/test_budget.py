"""The retry budget and the hedge allowance as plain values; that Redis keeps the same rules is shown in tests/property."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.resilience.budget import Budget, nano

NOW = 1_800_000_000_000


def retries(budget, now=NOW, cost=1, most=1_000):
    made = 0
    while made < most and not budget.wait_ms(now):
        budget.draw(now, cost)
        made += 1
    return made


def earn(budget, calls, cost=0, answered=True, sent=True):
    for _ in range(calls):
        budget.earn(NOW, answered=answered, sent=sent, cost=cost)


@pytest.mark.parametrize(("cost", "made"), [(1, 50), (2, 25)])
def test_half_of_the_budget_can_be_spent_at_once_and_a_timeout_costs_double(cost, made):
    assert retries(Budget(), cost=cost) == made


def test_in_an_outage_calls_grow_by_the_budget_and_then_by_one_retry_in_ten_seconds():
    budget = Budget()
    assert sum(retries(budget, NOW + ms, most=1) for ms in range(0, 3_600_000, 100)) in range(50 + 355, 50 + 362)


def test_ten_answers_earn_a_retry_and_failures_earn_none():
    budget = Budget()
    retries(budget)
    earn(budget, 1_000, answered=False)
    assert budget.wait_ms(NOW)
    earn(budget, 21)
    assert retries(budget) in (2, 3)


def test_who_waits_as_long_as_told_may_retry_and_not_a_moment_sooner():
    budget = Budget()
    retries(budget, cost=2)
    wait_ms = budget.wait_ms(NOW)
    assert budget.wait_ms(NOW + wait_ms) == 0
    assert budget.wait_ms(NOW + wait_ms - 2) > 0


def test_a_full_budget_holds_no_more_however_long_it_is_quiet():
    budget = Budget()
    budget.draw(NOW, 1)
    assert retries(budget, NOW + 10**9) == 50


def test_a_clock_that_steps_back_gives_nothing():
    budget = Budget()
    retries(budget)
    assert budget.wait_ms(NOW - 10**6) == budget.wait_ms(NOW) > 0


def test_fifty_calls_earn_a_hedge_and_ten_can_be_saved():
    budget = Budget()
    assert not budget.hedge(NOW, 0)
    earn(budget, 49)
    assert not budget.hedge(NOW, 0)
    earn(budget, 2)
    assert budget.hedge(NOW, 0)
    assert not budget.hedge(NOW, 0)
    earn(budget, 10_000)
    assert sum(budget.hedge(NOW, 0) for _ in range(100)) == 10


def test_what_was_never_sent_earns_no_hedge():
    budget = Budget()
    earn(budget, 1_000, sent=False, cost=100)
    assert (budget.hedges, budget.money) == (0, 0)


@pytest.mark.parametrize(("price", "hedges"), [(100, 5), (500, 1), (501, 0)])
def test_hedges_cost_no_more_than_a_twentieth_of_what_ordinary_calls_cost(price, hedges):
    budget = Budget()
    earn(budget, 50 * 10, cost=20)  # 10 hedges earned, and 500 to pay for them
    assert sum(budget.hedge(NOW, price) for _ in range(20)) == hedges


def test_money_for_ten_hedges_is_kept_and_no_more():
    budget = Budget()
    earn(budget, 5_000, cost=1_000_000)
    assert budget.hedge(NOW, 100)
    assert budget.money == 900


def test_a_hedge_costs_a_retry_and_is_not_made_at_half_of_the_budget():
    budget = Budget()
    earn(budget, 5_000)
    assert budget.hedge(NOW, 0)
    assert retries(budget) == 49
    assert not budget.hedge(NOW, 0)


def test_hedges_are_two_of_a_hundred_calls_in_every_window():
    budget, made = Budget(), []
    for n in range(20_000):
        budget.earn(NOW + n, answered=True, sent=True, cost=0)
        made.append(budget.hedge(NOW + n, 0) if n > 5_000 else False)
    assert sum(made) <= 0.02 * 20_000 + 1
    for start in range(0, 20_000, 500):
        for length in (100, 1_000, 5_000):
            assert sum(made[start : start + length]) <= 0.02 * length + 10 + 1


def test_money_is_rounded_up_to_thousand_millionths_of_a_dollar():
    assert nano(Decimal("0.0000000001")) == 1
    assert nano(Decimal("1.5")) == 1_500_000_000
    assert nano(Decimal(-1)) == 0


EVENTS = st.lists(st.tuples(st.sampled_from(["call", "call", "call", "hedge"]), st.integers(0, 5_000), st.integers(1, 400)), max_size=400)


@given(EVENTS, st.integers(0, 40), st.integers(1, 400))
def test_in_any_stretch_of_time_hedges_are_two_percent_of_the_calls_and_five_of_their_cost_beside_what_was_saved(events, calls, usual):
    """X8. Stretches of ten minutes are among them: where one begins and ends is as free as the events are."""
    budget, made = Budget(), []
    for kind, cost, many in [("call", 20 * usual, 50 * calls), *events]:
        if kind == "call":
            earn(budget, many, cost=cost)
            made += [("call", cost * many, many)]
        elif budget.hedge(NOW, cost):
            made += [("hedge", cost, 1)]
    for start in range(len(made)):
        hedges, spent, dearest, sent, earned = 0, 0, 0, 0, 0
        for kind, cost, many in made[start:]:
            if kind == "call":
                sent, earned = sent + many, earned + cost
                continue
            hedges, spent, dearest = hedges + 1, spent + cost, max(dearest, cost)
            assert hedges <= 10 + sent / 50 + 1e-6
            assert spent <= 10 * dearest + earned / 20 + 1e-6
