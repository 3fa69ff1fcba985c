"""The ledger is what the protocol says, whatever happens in whatever order; and the machine that says so would notice if it were not."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from machine import Ledger
from mutants import MUTANTS
from sqlalchemy.exc import ProgrammingError
from theatre import a_theatre
from tour import TOUR

BOUNDED = settings(
    max_examples=12, stateful_step_count=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def play(theatre, act):
    machine = Ledger(theatre)
    machine.begin()
    for _ in act(machine):
        machine.holds()
    machine.teardown()


def test_the_ledger_is_what_the_protocol_says_whatever_happens_in_whatever_order(database_url, redis_url):
    with a_theatre(database_url, redis_url) as theatre:
        for act in TOUR:
            play(theatre, act)
        run_state_machine_as_test(lambda: Ledger(theatre), settings=BOUNDED)


@pytest.mark.parametrize("act", TOUR, ids=lambda act: act.__name__)
def test_a_ledger_without_one_of_its_guards_is_noticed(database_url, redis_url, monkeypatch, act):
    """Every mutant of `mutants` can be told from the ledger, and not because Postgres cannot read it."""

    def noticed(mutant):
        with monkeypatch.context() as patched:
            patched.setattr(mutant.module, mutant.constant, mutant.value())
            try:
                play(theatre, act)
            except Exception as error:
                return not isinstance(error, ProgrammingError)
        return False

    with a_theatre(database_url, redis_url) as theatre:
        assert [mutant.name for mutant in MUTANTS[act] if not noticed(mutant)] == []
