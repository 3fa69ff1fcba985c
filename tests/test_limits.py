"""The limiter's rules as plain values; that Redis keeps the same ones is shown in tests/property."""

import itertools

import pytest

from worker.resilience.limits import RULES, Limits, Meter, Settling

_numbers = itertools.count()
NOW = 1_800_000_000_000


def meter(now=NOW, **limits):
    return Meter.from_fields({}, Limits(**limits), now)


def reserve(of, now, tokens=0, bulk=False, lease=None, lease_ms=30_000):
    """The wait, 0 when it is in flight."""
    of.refresh(now)
    of.sweep(now)
    wait_ms, _ = of.reserve(tokens, bulk)
    if not wait_ms:
        of.flying[lease or f"call {next(_numbers)}"] = now + lease_ms
    return wait_ms


def admitted(of, now, most=1_000, **ask):
    """How many go out at once, until one has to wait."""
    return next((n for n in range(most) if reserve(of, now, **ask)), most)


def test_ten_seconds_worth_goes_out_at_once_and_then_nine_tenths_of_the_rate():
    of = meter(rpm=600)
    assert admitted(of, NOW) == 100
    assert admitted(of, NOW + 1_000) == 9
    assert sum(admitted(of, NOW + 1_000 + ms) for ms in range(1_000, 60_001, 1_000)) in (539, 540)


def test_tokens_are_reserved_with_the_request_or_nothing_is():
    of = meter(rpm=600, tpm=6_000)
    assert admitted(of, NOW, tokens=300) == 3
    assert (of.requests.level, of.tokens.level) == (97, 100)


def test_who_waits_exactly_as_told_is_let_in():
    of = meter(rpm=7, tpm=6_000)
    for tokens in (1_000, 17, 999, 40_000, 1):
        wait_ms, now = reserve(of, of.at, tokens), of.at
        if wait_ms:
            of.requests.promised = of.tokens.promised = 0.0  # nobody else waits
            assert reserve(of, now + wait_ms, tokens) == 0


def test_parked_jobs_do_not_come_back_all_at_once():
    of = meter(rpm=600)
    admitted(of, NOW, 100)
    hints = [reserve(of, NOW, bulk=True) for _ in range(500)]
    assert hints == sorted(hints)
    assert hints[0] == 3_445  # 31 of a bucket of 100, of which it leaves 30
    assert hints[-1] - hints[0] == 55_444  # 499 at 9 a second
    assert {reserve(of, NOW) for _ in range(5)} == {112}  # a person is not queued behind them


def test_a_hint_is_at_most_ten_minutes_and_what_was_promised_is_forgotten_with_time():
    of = meter(rpm=6)
    assert max(reserve(of, NOW, bulk=True) for _ in range(1_000)) == RULES.hint_most_ms
    admitted(of, NOW + 10_000_000, 1)
    assert reserve(of, NOW + 10_000_000, bulk=True) < 12_000


def test_how_long_to_wait_for_a_call_to_end_is_learnt_from_those_that_have_ended():
    of = meter(concurrency=1)
    reserve(of, NOW, lease="first")
    assert reserve(of, NOW) == RULES.call_ms
    of.settle("first", Settling(took_ms=20))
    for n in range(50):
        reserve(of, NOW, lease=f"{n}")
        of.settle(f"{n}", Settling(took_ms=20))
    reserve(of, NOW, lease="last")
    assert 20 <= reserve(of, NOW) < 40


def test_a_provider_in_trouble_is_told_from_one_that_is_used_up():
    of = meter(concurrency=4)
    for n in range(4):
        reserve(of, NOW, lease=f"{n}")
    assert not of.is_congested(bulk=True)
    of.settle("0", Settling(ease=0.5, good=False))
    assert of.is_congested(bulk=True)


def test_what_is_larger_than_the_bucket_waits_for_a_full_one_and_leaves_a_debt():
    of = meter(tpm=6_000)
    assert reserve(of, NOW, 100) == 0
    wait_ms = reserve(of, NOW, 50_000)
    assert wait_ms == 1_112
    assert reserve(of, NOW + wait_ms, 50_000) == 0
    assert of.tokens.level == -1_000
    assert reserve(of, NOW + wait_ms, 0) > 0


def test_bulk_leaves_three_tenths_of_everything_to_people():
    of = meter(rpm=600, tpm=60_000)
    assert admitted(of, NOW, bulk=True) == 70
    assert admitted(of, NOW, tokens=100) == 30
    of = meter(tpm=60_000)
    assert admitted(of, NOW, tokens=1_000, bulk=True) == 7
    assert admitted(of, NOW, tokens=1_000) == 3
    of = meter(concurrency=10)
    assert admitted(of, NOW, bulk=True) == 7
    assert admitted(of, NOW) == 3


@pytest.mark.parametrize("limits", [{"rpm": 1}, {"tpm": 60}, {"concurrency": 1}])
def test_however_small_the_limit_one_bulk_job_may_run(limits):
    assert admitted(meter(**limits), NOW, tokens=1, bulk=True) >= 1


def test_a_clock_that_steps_back_gives_nothing():
    of = meter(rpm=600)
    admitted(of, NOW)
    assert admitted(of, NOW - 60_000) == 0
    assert admitted(of, NOW) == 0


def test_a_call_that_was_never_sent_gives_everything_back_and_no_settlement_counts_twice():
    of = meter(rpm=600, tpm=6_000)
    reserve(of, NOW, 400, lease="a")
    for _ in range(3):
        of.settle("a", Settling(reserved=400, sent=False))
        assert (of.requests.level, of.tokens.level) == (100, 1_000)
    assert not of.settle("nobody", Settling(reserved=400, sent=False))


@pytest.mark.parametrize(("used", "left"), [(None, 600), (400, 600), (150, 850), (0, 1_000), (500, 500), (99_000, -1_000)])
def test_what_was_used_replaces_what_was_reserved(used, left):
    of = meter(tpm=6_000)
    reserve(of, NOW, 400, lease="a")
    of.settle("a", Settling(reserved=400, used=used))
    assert of.tokens.level == left


def test_what_the_vendor_says_is_left_lowers_the_level_and_never_raises_it():
    of = meter(rpm=600, tpm=6_000)
    for lease in "ab":
        reserve(of, NOW, 100, lease=lease)
    of.settle("a", Settling(reserved=100, remaining_requests=7, remaining_tokens=30))
    assert (of.requests.level, of.tokens.level) == (7, 30)
    of.settle("b", Settling(reserved=100, remaining_requests=90, remaining_tokens=900))
    assert (of.requests.level, of.tokens.level) == (7, 30)


def test_congestion_slows_down_once_in_ten_seconds_and_is_forgotten_point_by_point():
    of = meter(rpm=60_000)
    for n in range(8):
        reserve(of, NOW, lease=str(n))
    for n in range(3):
        of.settle(str(n), Settling(good=False, ease=0.5))
    assert of.multiplier == 0.5
    of.refresh(NOW + 10_000)
    for n in range(3, 6):
        of.settle(str(n), Settling(good=False, ease=0.01))
    assert of.multiplier == 0.1
    of.refresh(NOW + 10_000 + 60_000)
    assert of.multiplier == pytest.approx(0.13)
    of.refresh(NOW + 10_000_000)
    assert of.multiplier == 1


def test_congestion_sets_a_ceiling_that_successes_lift_until_it_is_gone():
    of = meter()
    assert admitted(of, NOW, 40) == 40
    of.settle(next(iter(of.flying)), Settling(good=False, ease=0.7))
    assert of.room == pytest.approx(28)
    assert reserve(of, NOW) > 0
    now, successes = NOW, 0
    while of.room:
        now, successes = now + 1, successes + 1
        reserve(of, now)
        reserve(of, now)
        of.settle(next(iter(of.flying)), Settling())
    assert of.room == 0
    assert 15_000 < successes < 25_000  # a success at a ceiling of c lifts it by 1/c, so to 200 it takes about 200 x 200 / 2


def test_a_provider_with_one_call_at_a_time_keeps_it_under_congestion():
    of = meter(concurrency=1)
    reserve(of, NOW, lease="a")
    of.settle("a", Settling(good=False, ease=0.1))
    assert of.room == 1
    assert reserve(of, NOW) == 0


def test_the_dead_are_in_flight_until_their_lease_ends_and_what_they_reserved_is_not_given_back():
    of = meter(rpm=600, concurrency=3)
    assert admitted(of, NOW, lease_ms=5_000) == 3
    assert admitted(of, NOW + 4_999) == 0
    assert admitted(of, NOW + 5_000) == 3


def test_one_workers_part_is_never_nothing():
    assert Limits(100, 10_000, 2).shared_by(4) == Limits(25, 2_500, 1)
    assert Limits(rpm=3).shared_by(0) == Limits(rpm=3)


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_workers_on_their_own_admit_no_more_than_a_tenth_above_the_limit(workers):
    """L12: in a minute, of requests and of tokens."""
    fleet = [meter(**vars(Limits(600, 60_000).shared_by(workers))) for _ in range(workers)]
    requests = sum(admitted(of, NOW + ms, 700, tokens=50) for of in fleet for ms in range(0, 60_000, 500))
    assert 600 * 0.9 <= requests <= 600 * 1.1


def test_calls_that_went_out_before_a_failed_one_have_survived_it():
    of = meter()
    for n in range(10):
        reserve(of, NOW + n, lease=str(n))
    assert of.survivors("3", NOW + 20) == 3
    assert of.survivors("nobody", NOW + 20) == 0
    assert of.survivors("3", NOW + 40_000) == 0


def test_a_reset_forgets_the_congestion_and_the_promises_but_not_the_levels():
    of = meter(rpm=60)
    admitted(of, NOW, 10)
    of.settle(next(iter(of.flying)), Settling(ease=0.1))
    reserve(of, NOW)
    of.reset()
    assert (of.multiplier, of.room, of.requests.promised, of.requests.level) == (1, 0, 0, 0)
    reserve(of, NOW + 1_200, lease="b")
    of.settle("b", Settling(ease=0.5))
    assert of.multiplier == 0.5


def test_who_waits_for_a_provider_in_trouble_is_not_told_to_wait_long_after_it_is_well():
    of = meter()
    for n in range(2):
        reserve(of, NOW, lease=f"{n}")
    of.settle("0", Settling(ease=0.5, good=False))
    assert max(reserve(of, NOW, bulk=True) for _ in range(5_000)) == RULES.ease_every_ms
