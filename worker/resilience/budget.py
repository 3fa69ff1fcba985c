"""The rules of what may be asked besides the first call: retries within a budget, hedges within an allowance.

`budget.lua` does the same in Redis for the whole fleet; tests hold the two together.

The retry budget is a bucket of 100 that an answer fills by 0.1 and a retry empties by 1 or 2; at half of it no more is
retried (gRPC's rule), so that an outage is not made worse by 10 % of repeated calls at most. Each ordinary call earns a
fiftieth of a hedge, and 5 % of its own cost to pay for one. Times are milliseconds, money is thousand-millionths of a dollar.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import NamedTuple


class BudgetRules(NamedTuple):
    """Sources: 100, 0.1, 1 and "not at half" are gRPC's A6, the dearer time-out AWS's; 2 % of requests and 5 % of money are ours."""

    retries_most: int = 100
    retries_least: int = 50  # at or below it nothing is retried
    retry_earned: float = 0.1  # by an answered first call
    retries_per_ms: float = 0.0001  # so that a quiet system can retry
    hedges_most: int = 10
    hedges_earned: float = 0.02
    money_earned_percent: int = 5
    budget_ttl_ms: int = 86_400_000


RULES = BudgetRules()
NANO = 1_000_000_000


def nano(cost_usd: Decimal) -> int:
    """Thousand-millionths of a dollar, rounded up; nothing below 0."""
    return max(0, int((cost_usd * NANO).to_integral_value(ROUND_CEILING)))


@dataclass(slots=True)
class Budget:
    """One provider's retries and hedges. Fields are those of its Redis hash."""

    at: int = 0  # clock of the retries
    retries: float = float(RULES.retries_most)
    hedges: float = 0.0
    money: float = 0.0

    @classmethod
    def from_fields(cls, fields: Mapping[str, str]) -> Budget:
        """The budget a Redis hash holds; full of retries and without a hedge when it holds nothing."""
        return cls(
            int(fields.get("at", 0)),
            float(fields.get("retries", RULES.retries_most)),
            float(fields.get("hedges", 0)),
            float(fields.get("money", 0)),
        )

    def _left(self, now: int) -> float:
        return min(float(RULES.retries_most), self.retries + max(0, now - self.at) * RULES.retries_per_ms)

    def _refresh(self, now: int) -> None:
        self.retries, self.at = self._left(now), max(self.at, now)

    def wait_ms(self, now: int) -> int:
        """0 when a retry may go out, else how long until time alone allows one."""
        left = self._left(now)
        return 0 if left > RULES.retries_least else math.floor((RULES.retries_least - left) / RULES.retries_per_ms) + 1

    def draw(self, now: int, cost: int) -> None:
        self._refresh(now)
        self.retries = max(0.0, self.retries - cost)

    def earn(self, now: int, *, answered: bool, sent: bool, cost: int) -> None:
        """A first call has ended."""
        self._refresh(now)
        if answered:
            self.retries = min(float(RULES.retries_most), self.retries + RULES.retry_earned)
        if sent:
            self.hedges = min(float(RULES.hedges_most), self.hedges + RULES.hedges_earned)
            self.money += cost * RULES.money_earned_percent / 100

    def hedge(self, now: int, cost: int) -> bool:
        """One hedge is drawn, with what it costs and a retry; or nothing is, and False."""
        self._refresh(now)
        self.money = min(self.money, float(RULES.hedges_most * cost))
        if self.hedges < 1 or self.money < cost or self.wait_ms(now):
            return False
        self.hedges, self.money = self.hedges - 1, self.money - cost
        self.draw(now, 1)
        return True
