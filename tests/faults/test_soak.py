"""The soak in its short form; `make soak` is the long one. Fault 40; in it 1, 3, 6, 7, 10, 13, 14, 16, 17, 23, 26, 29, 32 at random.

Left to tests of their own: what needs a failpoint (2, 4, 15, 20, 22, 35), and what would end the load (11, 12, 18, 19, 24, 38).
"""

import xml.etree.ElementTree as ElementTree
from collections import Counter

import pytest
from figures import figures
from nemesis import FULL, SHORT, TTL_S, plan
from soak import CONFIG, ENVIRONMENT, SCRIPT, Outcome, leave, soak
from timeline import draw, picture

SVG = "{http://www.w3.org/2000/svg}"


def strikes(size, seed):
    return [strike for one in plan(seed, size) for strike in one]


def kept(**changes):
    """Figures of a soak in which all went well, but for these."""
    counts = ["workers that ended by themselves", "lost", "double results", "off the books", "billed twice where nobody was killed"]
    good = {"replies no API may give": {}, "recovery, worst, s": TTL_S, "rounds": FULL.rounds, "jobs accepted": FULL.jobs}
    good |= dict.fromkeys(counts, 0)
    return Outcome(FULL, {**good, **changes}, [])


def test_the_same_seed_is_the_same_plan_and_another_seed_another():
    assert plan(7, FULL) == plan(7, FULL)
    assert plan(7, FULL) != plan(8, FULL)


@pytest.mark.parametrize("seed", range(20))
def test_every_full_plan_holds_as_many_faults_as_are_promised(seed):
    found = strikes(FULL, seed)
    faults = Counter(strike.fault for strike in found)
    assert sum(len(s.places) for s in found if s.fault.startswith(("kill one", "kill two", "kill three", "kill all", "cut"))) >= 50
    assert faults["flush Redis"] + 4 * faults["flush Redis again and again"] >= 20
    restarts = {name: n for name, n in faults.items() if "Postgres" in name and name.startswith(("stop", "kill", "restart"))}
    assert sum(restarts.values()) >= 10
    assert sum(n for name, n in restarts.items() if "longer than the TTL" in name) >= 3


@pytest.mark.parametrize("size", [FULL, SHORT])
def test_nothing_is_broken_twice_at_once_and_every_card_is_dealt(size):
    rounds = plan(1, size)
    assert len(rounds) == size.rounds
    assert all(len({strike.against for strike in one}) == len(one) for one in rounds)
    dealt = Counter(strike.fault for one in rounds for strike in one)
    assert dealt == Counter({fault: times for deck in size.decks.values() for fault, times in deck.items()})
    assert all(0 <= place < size.workers for one in rounds for strike in one for place in strike.places)


@pytest.mark.timeout(400)
def test_a_fleet_under_load_and_random_faults_loses_nothing_and_pays_nothing_twice_but_for_the_killed(laboratory):
    async def story(lab):
        outcome = await soak(lab, 1, SHORT, lambda *_: None)
        assert outcome.broken(timed=False) == []
        found = outcome.figures
        assert found["workers killed"] >= 6
        assert found["Redis flushed"] >= 4
        assert found["Postgres restarted"] >= 2
        assert found["failed, why"] == {"unusable_row": 20}
        assert found["billed for calls of known cost, USD"] == found["booked, USD"] > 0
        drawn = ElementTree.fromstring(await draw(lab, 1, sound=True))
        dead = found["workers killed"] + found["… and others that came back from the dead"]
        assert len([text for text in drawn.iter(f"{SVG}title") if text.text.startswith("worker-")]) == dead
        await lab.rows("DELETE FROM results WHERE job_id = (SELECT min(job_id::text)::uuid FROM results)")
        await lab.rows("DELETE FROM provider_calls WHERE id = (SELECT min(id::text)::uuid FROM provider_calls WHERE outcome = 'answered')")
        broken = Outcome(SHORT, found | await figures(lab, TTL_S), await lab.verdicts()).broken(timed=False)
        assert {one.split(":")[0] for one in broken} == {"I2", "I4", "off the books"}

    laboratory(story, timeout_s=380, script=SCRIPT, config=CONFIG, environment=ENVIRONMENT)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workers that ended by themselves": 1}, "workers that ended by themselves: 1"),
        ({"lost": 1}, "lost: 1"),
        ({"double results": 2}, "double results: 2"),
        ({"off the books": 3}, "off the books: 3"),
        ({"billed twice where nobody was killed": 1}, "billed twice where nobody was killed: 1"),
        ({"replies no API may give": {"500 POST": 1}}, "replies no API may give: {'500 POST': 1}"),
        ({"recovery, worst, s": 6.01}, "recovery took 6.01 s, promised are 6 s"),
        ({"rounds": 12}, "only 12 rounds, planned were 40"),
        ({"jobs accepted": 19_999}, "only 19999 jobs accepted, planned were 20000"),
    ],
)
def test_a_promise_that_was_not_kept_is_named(changes, words):
    assert kept().broken() == []
    assert kept(**changes).broken() == [words]


def test_who_finds_something_broken_leaves_with_code_1_and_names_seed_and_history(capsys, tmp_path):
    leave([], 7, tmp_path)
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit) as left:
        leave(["I5: job 1 was paid for twice"], 7, tmp_path)
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert "broken: I5: job 1 was paid for twice" in said
    assert f"seed 7; the history is {tmp_path / 'history.jsonl'}" in said


def test_the_picture_shows_every_fault_in_its_row_and_what_has_no_jobs_is_drawn_too():
    faults = [("kills", "worker-1", 3.0, 3.0), ("redis", "FLUSHALL", 4.0, 4.0), ("postgres", "kill <Postgres> & wait", 5.0, 9.0)]
    drawn = ElementTree.fromstring(picture({0: 10, 3: 120}, faults, seed=7, sound=True))
    assert [mark.text for mark in drawn.iter(f"{SVG}title")] == ["worker-1, 3 s", "kill <Postgres> & wait, 5 s to 9 s", "FLUSHALL, 4 s"]
    assert drawn.get("aria-label") == "130 jobs under 3 faults: all ended, none twice"
    assert ElementTree.fromstring(picture({}, [], seed=7, sound=False)) is not None
