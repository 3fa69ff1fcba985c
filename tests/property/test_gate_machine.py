"""A provider's gate keeps its promises, whatever happens in whatever order; and the machine that says so would notice if it did not."""

import pytest
from gate_machine import Gate, Stand
from gate_mutants import MUTANTS
from gate_tour import TOUR
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from redis import Redis
from redis.exceptions import ResponseError

from worker.resilience.gate_store import SCRIPT

BOUNDED = settings(
    max_examples=150, stateful_step_count=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def clients(redis_url):
    clients = [Redis.from_url(redis_url, decode_responses=True) for _ in range(3)]
    yield clients
    for client in clients:
        client.close()


def play(stand, act):
    machine = Gate(stand)
    act(machine)
    machine.levels_keep_their_bounds()
    machine.teardown()


def test_a_gate_keeps_its_promises_whatever_happens_in_whatever_order(clients):
    stand = Stand(clients, SCRIPT)
    for act in TOUR:
        play(stand, act)
    run_state_machine_as_test(lambda: Gate(stand), settings=BOUNDED)
    print(f"{BOUNDED.max_examples} stories, {stand.turn} steps on Valkey")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_gate_without_one_of_its_guards_is_noticed(clients, name):
    """Every mutant can be told from the gate, and not because Valkey cannot read it."""
    old, new = MUTANTS[name]
    assert SCRIPT.count(old) == 1, f"{name}: the script does not say {old!r} any more"
    stand, noticed = Stand(clients, SCRIPT.replace(old, new)), []
    for act in TOUR:
        try:
            play(stand, act)
        except ResponseError as error:
            pytest.fail(f"{name}: {error}")
        except AssertionError:
            noticed.append(act.__name__)
            break
    assert noticed, f"{name}: nobody noticed"
