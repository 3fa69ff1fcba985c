"""The chain keeps its rules under any script of faults; and the rules would notice if it did not."""

import pytest
from chain_endings import ENDINGS, check_rungs
from chain_mutants import MUTANTS, mutated
from chain_outage import Outage
from chain_rules import RULES
from chain_scripts import plays, visits
from chain_story import perform, swift_time
from chain_tour import TOUR, VISITS
from chain_visits import check_visits, visited
from chainmodel import Play
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from worker.job import JobState
from worker.signals import Signal

BOUNDED = settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def check(play: Play) -> None:
    story = perform(play)
    for rule in (*RULES, *ENDINGS):
        rule(story)
    check_rungs(story)


def check_cache(visits, fresh):
    with swift_time() as runner, capture_logs():
        story = runner.run(visited(visits, fresh))
    check_visits(story, fresh)


def test_no_known_script_breaks_the_rules():
    for play in TOUR:
        check(play)
    for script in VISITS:
        check_cache(*script)


@BOUNDED
@given(plays)
def test_no_script_of_faults_breaks_the_rules(play):
    check(play)


@settings(BOUNDED, max_examples=100)
@given(visits, st.booleans())
def test_from_the_cache_comes_only_what_the_same_tenant_was_answered_in_full_and_not_too_long_ago(script, fresh):
    check_cache(script, fresh)


def test_a_full_outage_costs_its_first_wave_and_a_few_probes_and_everybody_is_answered_after_it():
    """X9. 2,000 jobs, 100 in flight, three providers, thirty minutes, then twice the longest opening of a breaker."""
    with swift_time() as runner:
        outage = runner.run(Outage(jobs=2_000, slots=100, signal=Signal.SERVER_ERROR, seconds=0.05).play())
    first_wave, later = [sum(at_s < end_s for at_s in outage.sent_s) for end_s in (10, outage.ends_s)]
    assert first_wave <= len(outage.providers) * (outage.slots + 50)  # everybody in flight asks everybody once; 50 retries are budgeted
    assert later - first_wave <= 0.1 * outage.jobs
    assert outage.states == [JobState.SUCCEEDED] * outage.jobs
    assert outage.last_s <= outage.ends_s + 2 * 300 * 1.2


@pytest.fixture(scope="module")
def drawn():
    """The same scripts for every mutant."""
    scripts: list[Play] = []

    @settings(BOUNDED, max_examples=150, phases=[Phase.generate])
    @given(plays)
    def draw(play):
        scripts.append(play)

    draw()
    return scripts


@pytest.mark.parametrize("name", MUTANTS)
def test_a_chain_without_one_of_its_guards_is_noticed(name, drawn):
    with mutated(*MUTANTS[name]):
        assert any(_is_noticed(check, play) for play in (*TOUR, *drawn)) or any(_is_noticed(check_cache, *script) for script in VISITS), (
            f"{name}: nobody noticed"
        )


def _is_noticed(look, *script):
    try:
        look(*script)
    except AssertionError:
        return True
    return False
