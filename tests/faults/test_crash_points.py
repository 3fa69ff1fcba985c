"""A worker dies at every step of the protocol: what it had not paid for is asked once, and what it had is repeated at most once.

Faults of the table held here: 1, a single death under load, and 2. Where the leader can die is in `test_fleet_faults`; fifty deaths in
one run are the soak's.

Left out of 2: after BRPOP and before the message is acknowledged, which is one step, because messages are acknowledged when they are
fetched; the points around each statement, with one job at a time the same as those around claim and settle.
"""

import time

import pytest
from stage import results

JOBS = 20
MANY = 200
SLOW = {"providers": {"first": {"model": "sim", "latency": {"ms": 150}}}}
# The first vendor has no use for what it is asked, which says nothing of its health; the second answers.
TWO = {
    "providers": {
        "first": {"model": "m-first", "faults": [{"kind": "status", "status": 409, "rate": 1}]},
        "second": {"model": "m-second", "latency": {"ms": 50}},
    }
}
ASKED_ONCE = {"providers.first": {"max_retries": 0}}
ONE_AT_A_TIME = {"BACKSTOP_BULK_SLOTS": "1", "BACKSTOP_PACK_SIZE": "1"}

# Where it dies, how many open calls are orphaned by that, and how many requests are repeated.
POINTS = [
    ("after_fetch@1", 0, 0),  # of the first message: the others are fetched while its job runs
    ("before_claim@3", 0, 0),
    ("after_claim@3", 1, 0),
    ("before_open_call@3", 1, 0),
    ("after_open_call@3", 1, 0),
    ("before_request@3", 1, 0),
    ("after_request@3", 1, 1),
    ("before_settle@3", 1, 1),
    ("after_settle@3", 0, 0),
]


async def dies(lab, *, failing, jobs):
    """Of two workers under load one has died at the point, and what it held is free again; the history says how long that took."""
    dying, other = await lab.worker("dying", failing=failing), await lab.worker("other")
    await dying.live()
    await other.live()
    await lab.submit_batch(jobs)
    assert await dying.ended() == -9
    await recovered(lab, dying)


async def recovered(lab, dead):
    (note,) = lab.history.events("killed")
    ids = await dead.ids()
    await lab.until("SELECT WHERE NOT EXISTS (SELECT FROM jobs WHERE worker_id = ANY(CAST(:ids AS uuid[])))", ids=ids)
    lab.history.note("recovered", worker=dead.name, seconds=time.time() - note["wall_s"])


async def orphaned(lab):
    return await lab.rows("SELECT * FROM provider_calls WHERE outcome = 'orphaned'")


@pytest.mark.parametrize(("point", "orphans", "repeated"), POINTS, ids=[point for point, _, _ in POINTS])
def test_a_worker_that_dies_at_a_step_leaves_what_that_step_had_done_and_no_more(laboratory, point, orphans, repeated):
    async def story(lab):
        await dies(lab, failing=point.replace("@", ":kill@"), jobs=JOBS)
        await lab.assert_sound()
        assert len(lab.bill) == JOBS + repeated
        left = await orphaned(lab)
        assert [(row.billing, row.cost_usd) for row in left] == [("unknown", None)] * orphans
        assert len(await lab.rows("SELECT FROM jobs WHERE deaths = 1")) == orphans
        for row in left:
            (result,) = await results(lab.db, row.job_id)
            assert result.fence == row.fence + 1

    laboratory(story, environment=ONE_AT_A_TIME)


@pytest.mark.parametrize(("point", "orphans", "repeated"), [("before_open_call", 1, 1), ("after_open_call", 1, 0)])
def test_a_provider_that_had_failed_on_the_books_is_not_asked_again_after_a_death(laboratory, point, orphans, repeated):
    async def story(lab):
        await dies(lab, failing=f"{point}:kill@4", jobs=JOBS)  # on its way to the second vendor
        await lab.assert_sound()
        assert len(await orphaned(lab)) == orphans
        assert {name: totals.requests for name, totals in lab.bill.totals().items()} == {"first": JOBS + repeated, "second": JOBS}

    laboratory(story, script=TWO, config=ASKED_ONCE, environment=ONE_AT_A_TIME)


@pytest.mark.parametrize("point", ["after_statement:kill@8", "before_request:kill@35", "after_request:kill@35", "before_settle:kill@3"])
def test_of_a_full_worker_no_more_is_repeated_than_was_open_when_it_died(laboratory, point):
    async def story(lab):
        await dies(lab, failing=point, jobs=MANY)
        await lab.assert_sound()
        (note,) = lab.history.events("killed")
        left = await orphaned(lab)
        assert len(left) == note["open_calls"] > 0
        assert 0 <= len(lab.bill) - MANY <= len(left)
        assert {str(row.job_id) for row in left} <= set(note["held"])

    laboratory(story, script=SLOW)
