"""Money: exact, additive, and unknown rather than wrong."""

from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction

import genai_prices
import pytest
from genai_prices.data_snapshot import get_snapshot
from hypothesis import given
from hypothesis import strategies as st

from worker.config import ProviderConfig
from worker.cost import Pricing, Usage

TOKENS = st.integers(0, 2**31 - 1)
RATES = st.decimals(0, 1000, places=6, allow_nan=False)


def configured(input="0.28", output="0.42", cached=None):
    price = {"input": input, "output": output} | ({"cached": cached} if cached is not None else {})
    return Pricing.of(ProviderConfig(base_url="http://127.0.0.1/v1", model="m", price=price))


def listed(model, base_url="https://api.example.com/v1"):
    return Pricing.of(ProviderConfig(base_url=base_url, model=model))


def test_a_price_in_the_config_is_used_and_named():
    pricing = configured()
    assert pricing.source == "config"
    assert pricing.cost(Usage(1_000_000, 1_000_000)) == Decimal("0.70")


def test_ten_million_requests_cost_what_the_arithmetic_says():
    # 10M requests of 162 output tokens, 95/4/1 % over $0.42, $2.50 and $15 per 1M.
    shares = [(9_500_000, "0.42"), (400_000, "2.50"), (100_000, "15")]
    costs = [configured("0", rate).cost(Usage(0, 162)) * requests for requests, rate in shares]
    assert sum(costs) == Decimal("1051.380")


@given(RATES, RATES, RATES, TOKENS, TOKENS, TOKENS)
def test_the_cost_is_exact(input_rate, output_rate, cached_rate, input_tokens, output_tokens, cached):
    cached = min(cached, input_tokens)
    cost = configured(input_rate, output_rate, cached_rate).cost(Usage(input_tokens, output_tokens, cached))
    exact = (
        (input_tokens - cached) * Fraction(input_rate) + cached * Fraction(cached_rate) + output_tokens * Fraction(output_rate)
    ) / 1_000_000
    assert Fraction(cost) == exact
    assert cost.as_tuple().exponent == -12


@given(RATES, RATES, *[st.integers(0, 2**30)] * 4)
def test_two_calls_cost_as_much_as_one_with_the_tokens_of_both(input_rate, output_rate, in_1, in_2, out_1, out_2):
    pricing = configured(input_rate, output_rate)
    assert pricing.cost(Usage(in_1, out_1)) + pricing.cost(Usage(in_2, out_2)) == pricing.cost(Usage(in_1 + in_2, out_1 + out_2))


@pytest.mark.parametrize("usage", [None, Usage(), Usage(input_tokens=5), Usage(output_tokens=5)])
def test_a_missing_count_makes_the_cost_unknown_not_zero(usage):
    assert configured().cost(usage) is None


def test_nothing_used_costs_nothing():
    assert configured().cost(Usage(0, 0)) == 0


def test_cached_tokens_cost_their_own_rate_once_and_the_full_rate_where_none_is_given():
    usage = Usage(1_000_000, 0, cached_tokens=400_000)
    assert configured("1", "0", "0.1").cost(usage) == Decimal("0.64")
    assert configured("1", "0").cost(usage) == 1


def test_more_cached_tokens_than_input_never_make_a_negative_cost():
    assert configured("1", "0", "0").cost(Usage(10, 0, cached_tokens=1000)) == 0


def test_reasoning_tokens_are_output_already_and_not_paid_twice():
    assert configured().cost(Usage(0, 100, reasoning_tokens=90)) == configured().cost(Usage(0, 100))


def test_an_unknown_model_has_no_price():
    pricing = listed("no-such-model-anywhere")
    assert pricing.source is None
    assert pricing.cost(Usage(1000, 1000)) is None


def test_a_listed_price_names_list_version_and_model():
    assert listed("gpt-4.1").source == f"genai-prices {genai_prices.__version__} openai/gpt-4.1"


def test_the_endpoint_decides_whose_price_it_is():
    assert "openrouter/" in listed("openai/gpt-4.1", "https://openrouter.ai/api/v1").source
    assert "deepseek/" in listed("deepseek-v3.2", "https://api.example.com/v1").source


@pytest.mark.parametrize(
    ("model", "input_tokens"),
    [
        ("gpt-4.1", 1000),
        ("gemini-2.5-flash", 1000),
        ("gemini-2.5-pro", 200_000),
        ("gemini-2.5-pro", 200_001),
        ("claude-sonnet-4-5", 300_000),
    ],
)
def test_our_sum_agrees_with_the_price_lists_own_also_across_tiers(model, input_tokens):
    own = listed(model).cost(Usage(input_tokens, 777, cached_tokens=333))
    theirs = genai_prices.calc_price(genai_prices.Usage(input_tokens=input_tokens, output_tokens=777, cache_read_tokens=333), model)
    assert own == theirs.total_price.quantize(own)


def test_prices_by_the_hour_are_those_in_force_now():
    _, model = get_snapshot().find_provider_model("deepseek-chat", None, None, None)
    assert isinstance(model.prices, list)
    before = model.get_prices(datetime.now(UTC))
    rates = listed("deepseek-chat").rates(0)
    after = model.get_prices(datetime.now(UTC))
    assert rates[:2] in [(price.input_mtok, price.output_mtok) for price in (before, after)]


def test_a_model_whose_output_has_no_listed_price_is_unknown():
    assert listed("@cf/baai/bge-m3").source is not None
    assert listed("@cf/baai/bge-m3").cost(Usage(10, 10)) is None
