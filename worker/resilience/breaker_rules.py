"""The numbers of the circuit breaker."""

from __future__ import annotations

from typing import NamedTuple


class Rules(NamedTuple):
    """What trips a breaker and for how long.

    Sources: 60 s, 20 calls and 50 % are Hystrix's and Polly's; 8 in a row, because a 20 % brown-out reaches 5 in a row
    in every fifth 1,000 calls; 10 to 300 s are Envoy's and Finagle's; providers ask for a ramp after a pause.
    """

    bucket_ms: int = 10_000
    buckets: int = 6
    min_calls: int = 20
    fail_percent: int = 50
    slow_percent: int = 80
    fails_in_a_row: int = 8  # a time-out counts as two: it has cost its job the whole time
    open_ms: int = 10_000  # doubled with each opening
    open_most_ms: int = 300_000
    jitter_permille: int = 200  # only lengthens
    forget_ms: int = 600_000  # closed for so long: the next opening is a first one
    good_probes: int = 2
    probe_wait_ms: int = 1_000  # who meets a running probe asks again then
    ramp_ms: int = 60_000
    ramp_from_permille: int = 100
    forced_wait_ms: int = 10_000  # an operator may close it at any time
    block_most_ms: int = 3_600_000
    guess_most_ms: int = 60_000  # of a wait that the provider did not name, doubled each time in a row
    isolate_most_ms: int = 86_400_000
    ttl_ms: int = 86_400_000  # of the hash in Redis; a forced state stays for ever


RULES = Rules()
