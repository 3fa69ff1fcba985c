import math
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.resilience.backoff import delay_s, retry_after_s

NOW = 1_800_000_000.0


@pytest.mark.parametrize(("retry", "most_s"), [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 8), (5000, 8)])
def test_the_longest_delay_doubles_up_to_the_cap(retry, most_s):
    assert delay_s(retry, base_s=0.5, cap_s=8, rng=lambda: 1.0) == most_s


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_a_delay_is_its_share_of_the_longest_one(retry, share):
    longest = delay_s(retry, base_s=0.5, cap_s=8, rng=lambda: 1.0)
    assert delay_s(retry, base_s=0.5, cap_s=8, rng=lambda: share) == share * longest


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"Retry-After": "0"}, 0),
        ({"RETRY-AFTER-MS": "250", "Retry-After": "1"}, 0.25),
        ({"retry-after-ms": "soon", "Retry-After": "1"}, 1),
        ({"Retry-After": formatdate(NOW + 90, usegmt=True)}, 90),
        ({"Retry-After": formatdate(NOW + 90, usegmt=True).replace("GMT", "-0000")}, 90),
        ({"Retry-After": formatdate(NOW - 90, usegmt=True)}, 0),
        ({"Retry-After": "86400"}, 3600),
        ({"Retry-After": "inf"}, 3600),
        ({"retry-after-ms": "1e12"}, 3600),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "later"}, None),
        ({"x-ratelimit-reset-requests": "6m0s", "x-ratelimit-remaining-requests": "0"}, 360),
        ({"X-RateLimit-Reset-Tokens": "20ms", "X-RateLimit-Remaining-Tokens": "0"}, 0.02),
        ({"x-ratelimit-reset-tokens": "1m1.5s", "x-ratelimit-remaining-tokens": "0"}, 61.5),
        ({"x-ratelimit-reset-requests": "6m0s", "x-ratelimit-remaining-requests": "12"}, None),
        ({"x-ratelimit-reset-requests": "1767225600", "x-ratelimit-remaining-requests": "0"}, None),
        (
            {
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-tokens": "3s",
                "x-ratelimit-remaining-tokens": "0",
            },
            3,
        ),
    ],
)
def test_the_wait_a_provider_asks_for_is_read_from_its_headers(headers, wait_s):
    assert retry_after_s(headers, NOW) == (wait_s if wait_s is None else pytest.approx(wait_s))


NAMES = ["retry-after", "Retry-After-MS", "x-ratelimit-reset-requests", "x-ratelimit-remaining-requests"]


@given(st.dictionaries(st.sampled_from(NAMES), st.text() | st.floats().map(str) | st.integers().map(str)))
def test_whatever_the_headers_say_the_wait_is_none_or_within_an_hour(headers):
    wait_s = retry_after_s(headers, NOW)
    assert wait_s is None or (0 <= wait_s <= 3600 and not math.isnan(wait_s))


@given(st.text(alphabet="0123456789 :,-+GMTadehlnorstuw", max_size=40))
def test_a_date_in_disorder_is_ignored_or_read_but_never_an_error(value):
    wait_s = retry_after_s({"Retry-After": value}, NOW)
    assert wait_s is None or 0 <= wait_s <= 3600
