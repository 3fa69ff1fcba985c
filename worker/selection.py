"""Which jobs are meant, by what they are rather than by who they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from worker.job import JobState

_CONDITIONS = {
    "state": "j.state = :state",
    "code": "j.error ->> 'code' = :code",
    "chain": "j.chain = :chain",
    "since": "coalesce(j.finished_at, j.created_at) >= :since",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Jobs for which everything holds that is not None.

    `code` is that of their error. `since`: they ended since then, or were submitted since then and have not ended.
    """

    state: JobState | None = None
    code: str | None = None
    chain: str | None = None
    since: datetime | None = None

    @property
    def values(self) -> dict[str, Any]:
        """What was given; empty when all jobs are meant."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def conditions(self) -> str:
        """SQL on `jobs j`, to stand behind another condition; its parameters are `values`."""
        return "".join(f" AND {_CONDITIONS[name]}" for name in self.values)


ALL = Selection()
