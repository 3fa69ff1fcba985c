"""Tells the dead workers from the living, by looking on."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from uuid import UUID

LOOK_S = 1.0  # a look stands for so much time at most, however long ago the one before it was


class DeathWatch:
    """A worker is dead when its heartbeat did not change for `ttl_s` while somebody looked on.

    How old a heartbeat is says too little: after an outage of Postgres every one is old, and the database's clock may jump. Nor
    does the time count in which the watcher could not look: it was frozen, or cut off, and the others may have been as well.
    """

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._looked_s: float | None = None
        self._watched_s = 0.0
        self._unchanged: dict[UUID, tuple[datetime, float]] = {}  # heartbeat, and since when it stands there

    def look(self, heartbeats: Mapping[UUID, datetime], now_s: float) -> Mapping[UUID, datetime]:
        """The dead among all who are said to live, with the last heartbeat of each. `now_s`: of a monotonic clock."""
        if self._looked_s is not None:
            self._watched_s += min(now_s - self._looked_s, LOOK_S)
        self._looked_s = now_s
        before = self._unchanged
        self._unchanged = {
            worker: before[worker] if worker in before and before[worker][0] == heartbeat else (heartbeat, self._watched_s)
            for worker, heartbeat in heartbeats.items()
        }
        return {worker: beat for worker, (beat, since_s) in self._unchanged.items() if self._watched_s - since_s >= self._ttl_s}
