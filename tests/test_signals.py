"""The table of signals: complete, and true to the rules money and safety rest on."""

import pytest

from worker.signals import POLICIES, Billing, Next, Signal, Verdict


def test_every_signal_has_a_policy():
    assert set(POLICIES) == set(Signal)


@pytest.mark.parametrize("signal", [signal for signal in Signal if POLICIES[signal].retry])
def test_what_is_retried_may_also_move_on_and_was_not_isolated(signal):
    policy = POLICIES[signal]
    assert policy.next is Next.ONWARD
    assert policy.isolate_s is None


@pytest.mark.parametrize(
    "signal",
    [
        Signal.CONTENT_POLICY,
        Signal.INVALID_REQUEST,
        Signal.CONTEXT_TOO_LONG,
        Signal.UNAUTHORIZED,
        Signal.QUOTA_EXHAUSTED,
        Signal.MODEL_NOT_FOUND,
        Signal.DROPPED,
        Signal.TIMED_OUT,
        Signal.CANCELLED,
    ],
)
def test_what_cannot_help_or_may_have_been_billed_is_never_retried_there(signal):
    assert not POLICIES[signal].retry


@pytest.mark.parametrize("signal", [Signal.RATE_LIMITED, Signal.SLOW_DOWN])
def test_a_rate_limit_is_no_illness_but_shuts_the_provider_for_a_while(signal):
    assert POLICIES[signal].verdict is Verdict.NEUTRAL
    assert POLICIES[signal].block_s is not None


@pytest.mark.parametrize("signal", [Signal.UNAUTHORIZED, Signal.QUOTA_EXHAUSTED, Signal.MODEL_NOT_FOUND])
def test_faults_of_configuration_isolate_without_counting_against_health(signal):
    assert POLICIES[signal].verdict is Verdict.NEUTRAL
    assert POLICIES[signal].next is Next.ONWARD
    assert (POLICIES[signal].isolate_s or 0) >= 300


def test_only_what_no_other_provider_may_mend_stops_a_job():
    stopping = {signal for signal in Signal if POLICIES[signal].next is Next.STOP}
    assert stopping == {Signal.ANSWERED, Signal.CONTENT_POLICY, Signal.INVALID_REQUEST}


def test_a_call_that_was_cut_off_is_never_booked_as_free():
    cut_off = {Signal.DROPPED, Signal.TIMED_OUT, Signal.OUT_OF_TIME, Signal.CANCELLED, Signal.ORPHANED}
    assert {POLICIES[signal].billing for signal in cut_off | {Signal.REQUEST_TIMEOUT}} == {Billing.UNKNOWN}


def test_a_request_that_never_left_is_free():
    assert POLICIES[Signal.UNREACHABLE].billing is Billing.FREE


def test_our_own_doings_say_nothing_about_a_provider():
    ours = (Signal.OUT_OF_TIME, Signal.CANCELLED, Signal.ORPHANED, Signal.INVALID_REQUEST, Signal.CONTEXT_TOO_LONG)
    assert {POLICIES[signal].verdict for signal in ours} == {Verdict.NEUTRAL}
