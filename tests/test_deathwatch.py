"""Who is dead is told by looking on, not by how old a heartbeat is."""

from datetime import UTC, datetime, timedelta
from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from worker.deathwatch import LOOK_S, DeathWatch
from worker.job import new_id

TTL_S = 10.0
BEAT = datetime(2026, 1, 1, tzinfo=UTC)
LONG_AGO = BEAT - timedelta(days=365)


def looks(watch, beats, gaps_s):
    """What each look finds, at one worker whose heartbeat stands at these values."""
    worker = new_id()
    return [bool(watch.look({worker: beat}, now_s)) for beat, now_s in zip(beats, accumulate(gaps_s), strict=True)]


def test_a_heartbeat_that_did_not_change_for_a_ttl_is_of_the_dead_however_fresh_it_says_it_is():
    for beat in (LONG_AGO, BEAT, BEAT + timedelta(days=365)):
        assert looks(DeathWatch(TTL_S), [beat] * 12, [LOOK_S] * 12) == [False] * 10 + [True] * 2


def test_the_last_heartbeat_is_named_so_that_one_more_saves_the_worker():
    watch, worker = DeathWatch(TTL_S), new_id()
    found = [watch.look({worker: BEAT}, float(now_s)) for now_s in range(11)]
    assert found[-1] == {worker: BEAT}


def test_time_in_which_nobody_looked_does_not_count():
    assert looks(DeathWatch(TTL_S), [BEAT] * 3, [0, 3600, 3600]) == [False] * 3


def test_who_was_away_is_watched_anew():
    watch, worker = DeathWatch(TTL_S), new_id()
    for now_s in range(9):
        watch.look({worker: BEAT}, float(now_s))
    watch.look({}, 9.0)
    assert watch.look({worker: BEAT}, 10.0) == {}
    assert watch.look({worker: BEAT}, 11.0) == {}


@given(st.lists(st.tuples(st.floats(0.01, 30), st.booleans()), max_size=60))
def test_nobody_dies_in_less_than_a_ttl_after_a_heartbeat_and_everybody_after_a_ttl_of_close_looks(steps):
    watch, worker, beat = DeathWatch(TTL_S), new_id(), BEAT
    now_s = since_s = close_s = 0.0
    watch.look({worker: beat}, now_s)
    for gap_s, beats in steps:
        now_s += gap_s
        beat += timedelta(seconds=beats)
        dead = watch.look({worker: beat}, now_s)
        since_s = now_s if beats else since_s
        close_s = 0.0 if beats else close_s + min(gap_s, LOOK_S)
        assert not dead or now_s - since_s >= TTL_S - 1e-6
        assert abs(close_s - TTL_S) < 1e-6 or bool(dead) == (close_s > TTL_S)
