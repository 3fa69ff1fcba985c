"""The schedule that befalls plain Celery and Backstop alike. The measurement itself takes minutes: `make controls CONTROLS=--baseline`."""

from collections import Counter

from baseline import FLUSHES, JOBS_A_STEP, KILLS, RESTARTS, WORKERS, schedule

STEPS = 2000 // JOBS_A_STEP


def test_the_same_seed_is_the_same_schedule_and_another_seed_another():
    assert schedule(7, STEPS) == schedule(7, STEPS)
    assert schedule(7, STEPS) != schedule(8, STEPS)


def test_every_schedule_holds_as_many_faults_as_are_promised_under_load_and_spares_no_worker():
    for seed in range(20):
        plan = schedule(seed, STEPS)
        faults = Counter(fault for step in plan.values() for fault in step)
        assert {fault for fault in faults if fault.startswith("kill")} == {f"kill {place}" for place in range(WORKERS)}
        assert sum(n for fault, n in faults.items() if fault.startswith("kill")) == KILLS
        assert (faults["flush"], faults["restart"]) == (FLUSHES, RESTARTS)
        assert all(0 < step < STEPS for step in plan)
