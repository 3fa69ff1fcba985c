from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.resilience import histogram

latencies = st.integers(1, 3_600_000)


def counted(of):
    counts = {}
    for took_ms in of:
        counts[histogram.bucket(took_ms)] = counts.get(histogram.bucket(took_ms), 0) + 1
    return counts


@given(latencies)
def test_a_bucket_stands_for_what_fell_into_it_within_a_tenth(took_ms):
    assert abs(histogram.middle_ms(histogram.bucket(took_ms)) - took_ms) <= 0.1 * took_ms


@given(latencies, latencies)
def test_what_took_longer_is_never_in_an_earlier_bucket(one, other):
    assert (histogram.bucket(one) <= histogram.bucket(other)) or one > other


@given(st.lists(latencies, min_size=1, max_size=300), st.sampled_from([0.5, 0.95, 0.99, 1.0]))
def test_a_quantile_is_that_of_the_latencies_within_a_tenth(of, q):
    true = sorted(of)[max(0, ceil(q * len(of) - 1e-9) - 1)]
    assert abs(histogram.quantile_ms(counted(of), q) - true) <= 0.1 * true


@pytest.mark.parametrize("took_ms", [-5, 0, 10**15])
def test_a_senseless_latency_has_a_bucket_all_the_same(took_ms):
    assert 0 <= histogram.bucket(took_ms) <= 101


def test_nothing_counted_has_no_quantile():
    with pytest.raises(ValueError, match="nothing was counted"):
        histogram.quantile_ms({}, 0.95)


def test_only_the_last_ten_to_twelve_minutes_count():
    now = 1_800_000_000_000
    this = now // histogram.PERIOD_MS
    fields = {"newest": str(this), f"{this}:3": "1", f"{this - 5}:3": "10", f"{this - 6}:3": "100", f"{this - 2}:7": "5"}
    assert histogram.recent(fields.items(), now) == {3: 11, 7: 5}
