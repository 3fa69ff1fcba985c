"""Whether it is us: this machine's own network or limits, and not a provider."""

from __future__ import annotations

import time
from collections.abc import Callable
from urllib.parse import urlsplit

from worker.providers.provider import Reply
from worker.signals import Signal

WINDOW_S = 5.0
HOSTS = 2  # so many that cannot be reached at the same time are no coincidence
# Nobody answered at all; a refused connection or a bad certificate is an answer.
_SILENT = frozenset({"dns", "connect_timeout", "no_route"})
_OWN = frozenset({"out_of_sockets"})


class Reach:
    """What one worker process can reach.

    When 2 hosts or more cannot be reached within 5 s and none has answered in between, the fault is taken for ours: Envoy tells
    its own origin of errors apart in the same way (outlier detection, `split_external_local_origin_errors`).
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._silent: dict[str, float] = {}  # host without its port, and when it was last not there

    def heard(self, host: str, reply: Reply) -> None:
        """A call to that host has ended so."""
        if reply.signal is Signal.CANCELLED:
            return
        if _is_silent(reply):
            self._silent[_name(host)] = self._clock()
        elif reply.signal is not Signal.OUT_OF_TIME and reply.error_code not in _OWN:
            self._silent.clear()

    def is_ours(self, reply: Reply) -> bool:
        """Whether a call that has just been `heard` failed for a fault of this machine."""
        if reply.error_code in _OWN:
            return True
        return _is_silent(reply) and self.is_lost()

    def is_lost(self) -> bool:
        recent = [host for host, at in self._silent.items() if self._clock() - at <= WINDOW_S]
        return len(recent) >= HOSTS


def _is_silent(reply: Reply) -> bool:
    return reply.signal is Signal.UNREACHABLE and reply.error_code in _SILENT


def _name(host: str) -> str:
    return urlsplit(f"//{host}").hostname or host
