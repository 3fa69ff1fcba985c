"""When nobody can be reached, it is us."""

from types import SimpleNamespace

import pytest
from scripted import Stage, answered, failed, walked

from worker.providers.provider import Reply
from worker.reach import WINDOW_S, Reach
from worker.signals import Signal, Verdict
from worker.walk import Answered, Exhausted, Parked

SILENT = Reply(signal=Signal.UNREACHABLE, error_code="connect_timeout")
REFUSED = Reply(signal=Signal.UNREACHABLE, error_code="refused")
APART = {"a": {"base_url": "http://a.example:1/v1"}, "b": {"base_url": "http://b.example:1/v1"}}


def reached(*heard):
    """What is thought after hearing, in this order, (host, reply, seconds since the one before)."""
    clock = SimpleNamespace(s=100.0)
    reach = Reach(lambda: clock.s)
    for host, reply, after_s in heard:
        clock.s += after_s
        reach.heard(host, reply)
    return reach


def test_two_hosts_that_cannot_be_reached_at_once_are_our_own_fault():
    assert reached(("a:1", SILENT, 0), ("b:1", SILENT, 1)).is_ours(SILENT)


@pytest.mark.parametrize(
    "heard",
    [
        [("a:1", SILENT, 0)],
        [("a:1", SILENT, 0), ("a:2", SILENT, 0)],  # one machine
        [("a:1", SILENT, 0), ("b:1", SILENT, WINDOW_S + 1)],
        [("a:1", SILENT, 0), ("b:1", REFUSED, 0)],  # somebody refused: the network works
        [("a:1", SILENT, 0), ("c:1", Reply(signal=Signal.SERVER_ERROR), 0), ("b:1", SILENT, 0)],
    ],
)
def test_else_it_is_the_providers(heard):
    assert not reached(*heard).is_ours(SILENT)


def test_a_call_that_was_cancelled_or_cut_short_says_nothing_of_the_network():
    for signal in (Signal.CANCELLED, Signal.OUT_OF_TIME):
        assert reached(("a:1", SILENT, 0), ("c:1", Reply(signal=signal), 0), ("b:1", SILENT, 0)).is_ours(SILENT)


def test_a_machine_out_of_sockets_blames_no_provider():
    assert reached(("a:1", SILENT, 0)).is_ours(Reply(signal=Signal.UNREACHABLE, error_code="out_of_sockets"))


def test_a_job_of_a_machine_without_a_network_costs_no_attempt_and_opens_no_breaker():
    stage = Stage({"a": [SILENT], "b": [SILENT]}, config=APART)
    outcome, _ = walked(stage)
    assert outcome == Parked(WINDOW_S, new_walk=True)
    assert stage.told("b") == [Verdict.NEUTRAL, Verdict.NEUTRAL]


def test_those_who_share_a_host_with_one_that_cannot_be_reached_are_asked_last():
    config = {"a": {"base_url": "http://x.example/v1"}, "b": {"base_url": "http://x.example/v2"}, "c": {"base_url": "http://y.example/v1"}}
    stage = Stage({"a": [REFUSED], "b": [answered()], "c": [failed(Signal.OVERLOADED)]}, config=config)
    assert isinstance(walked(stage)[0], Answered)
    assert stage.said("sent") == ["a", "c", "b"]


@pytest.mark.parametrize(
    ("reply", "order"),
    [
        (failed(Signal.QUOTA_EXHAUSTED), ["a", "c", "b"]),
        (failed(Signal.UNAUTHORIZED, http_status=401), ["a", "c", "b"]),
        (failed(Signal.UNAUTHORIZED, http_status=403), ["a", "b", "c"]),  # may be about the model alone
        (failed(Signal.OVERLOADED), ["a", "b", "c"]),
    ],
)
def test_those_who_share_an_account_with_one_that_is_locked_out_are_asked_last(reply, order):
    here = "http://x.example/v1"
    config = {"a": {"base_url": here}, "b": {"base_url": here, "model": "other"}, "c": {"base_url": here, "api_key": "env:OTHER"}}
    stage = Stage({"a": [reply], "b": [failed(Signal.OVERLOADED)], "c": [failed(Signal.OVERLOADED)]}, config=config)
    assert walked(stage)[0] == Exhausted()
    assert stage.said("sent") == order
