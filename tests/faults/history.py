"""What a test did and saw, in order: one JSON line for each event, on the file before the next thing happens."""

from __future__ import annotations

import json
import time
from itertools import count
from pathlib import Path
from typing import Any


class History:
    """Goes on where the file ends, so that a story may be told by several processes, one after the other.

    `checker` goes by these events (others are for people), job ids as UUIDs or strings:

        accepted{job_ids}                 submitted, and the submitter was told so
        cancel_acknowledged{job_ids}      ended by a cancel at once; not those that were only flagged
        killed{worker, held, open, open_calls}
                                          the jobs the worker held, how many calls of each were open, and of all; a call is open
                                          until its attempt is settled, so one job may have several. open_calls None: the ledger was away.
                                          Frozen for longer than its TTL it is as good as killed, and noted like that
        fault{name}, healed{name}         from when to when something was broken
        sample{FIGURE, ..., bounds}       measured; a figure is a number, or a mapping of one for each process
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self._numbers = count(len(path.read_bytes().splitlines()) + 1)

    def note(self, what: str, **fields: Any) -> None:
        """On the file when this returns, with `seq` (from 1), `wall_s` (Unix) and `monotonic_s`. What JSON does not know is a string."""
        event = {"seq": next(self._numbers), "wall_s": time.time(), "monotonic_s": time.monotonic(), "what": what, **fields}
        line = json.dumps(event, default=str)
        with self.path.open("a", encoding="ascii") as file:
            file.write(line + "\n")

    def events(self, what: str | None = None) -> list[dict[str, Any]]:
        """All of them, or those of one name, in order."""
        events = [json.loads(line) for line in self.path.read_text("ascii").splitlines()]
        return [event for event in events if what in (None, event["what"])]
