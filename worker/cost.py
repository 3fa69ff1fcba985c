"""Money: what a call used, what that costs. `Decimal` only; None means unknown, never zero."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache, partial
from typing import Any, NamedTuple

from worker.config import ProviderConfig

BYTES_A_TOKEN = 3.5  # of English and of JSON with the usual tokenizers; other scripts take more tokens
IMAGE_TOKENS = 1000  # of one that is sent along; vendors count some hundred to 1,600, whatever its bytes
_QUANTUM = Decimal("1e-12")  # scale of provider_calls.cost_usd
_DATA_URL = re.compile(r'"data:[a-zA-Z0-9.+/-]+;base64,[^"\\]*"')


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call, normalised: the input includes the cached ones, the output includes the reasoning ones.

    None: the provider did not say. `estimated`: it did not of an answer, so what is missing was reckoned from the texts.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    estimated: bool = False

    def to_json(self) -> dict[str, int | None]:
        return {name: getattr(self, name) for name in self.__slots__}


class Rates(NamedTuple):
    """USD per 1M tokens. `cached` None: cached input tokens cost what the others cost."""

    input: Decimal
    output: Decimal
    cached: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Pricing:
    """The price of one provider. `source` says whence: `config`, `genai-prices 0.2.3 openai/gpt-5`, None for unknown.

    `rates` gives what is in force now for a call of so many input tokens (long prompts and office hours may cost more),
    or None.
    """

    source: str | None
    rates: Callable[[int], Rates | None]

    @classmethod
    def of(cls, config: ProviderConfig) -> Pricing:
        """Of the price in the config; else of genai-prices, by endpoint and model, else by model alone; else unknown.

        Found by model alone it is the list price of who makes the model: state what a reseller takes in the config.
        """
        if config.price is not None:
            rates = Rates(config.price.input, config.price.output, config.price.cached)
            return cls("config", lambda input_tokens: rates)
        return _listed(config.base_url, config.model)

    def cost(self, usage: Usage | None) -> Decimal | None:
        """USD, to 12 places; None when the price, the input tokens or the output tokens are not known.

        (input - cached) * input rate + cached * cached rate + output * output rate, per 1M. A vendor that names
        no cached tokens granted no discount, so they count as none; reasoning tokens are output, not added again.
        """
        if usage is None or usage.input_tokens is None or usage.output_tokens is None:
            return None
        rates = self.rates(usage.input_tokens)
        if rates is None:
            return None
        cached = min(usage.cached_tokens or 0, usage.input_tokens)
        cached_rate = rates.input if rates.cached is None else rates.cached
        per_million = (usage.input_tokens - cached) * rates.input + cached * cached_rate + usage.output_tokens * rates.output
        return per_million.scaleb(-6).quantize(_QUANTUM)


def estimated_tokens(said: str | list[dict[str, Any]]) -> int:
    """Of a text or of messages, before or although nobody has counted them: a token for each 3.5 bytes of UTF-8.

    A file in a data URL counts as IMAGE_TOKENS, for its bytes say nothing.
    """
    text, files = (said, 0) if isinstance(said, str) else _DATA_URL.subn("", json.dumps(said, ensure_ascii=False))
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_A_TOKEN) + files * IMAGE_TOKENS


@lru_cache(maxsize=1024)
def _listed(base_url: str, model: str) -> Pricing:
    # Here, not above: the price list takes 0.2 s to import, and who configures all prices never needs it.
    import genai_prices
    from genai_prices.data_snapshot import get_snapshot

    for api_url in (base_url, None):
        try:
            vendor, found = get_snapshot().find_provider_model(model, None, None, api_url)
        except LookupError:
            continue
        return Pricing(f"genai-prices {genai_prices.__version__} {vendor.id}/{found.id}", partial(_rates_now, found))
    return Pricing(None, lambda input_tokens: None)


def _rates_now(model: Any, input_tokens: int) -> Rates | None:
    """Rates of a genai-prices model. It names none (per image, per second): None."""
    prices = model.get_prices(datetime.now(UTC))
    rates = [_tier(getattr(prices, name, None), input_tokens) for name in ("input_mtok", "output_mtok", "cache_read_mtok")]
    if rates[0] is None or rates[1] is None:
        return None
    return Rates(rates[0], rates[1], rates[2])


def _tier(price: Any, input_tokens: int) -> Decimal | None:
    """The rate of all tokens of a call: the last tier whose start the whole input exceeds (genai-prices' "cliff")."""
    if price is None or isinstance(price, Decimal):
        return price
    rate: Decimal = price.base
    for tier in price.tiers:
        if input_tokens > tier.start:
            rate = tier.price
    return rate
