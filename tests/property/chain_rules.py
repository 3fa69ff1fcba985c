"""What holds of every story of a chain, whatever its script: who is asked, when, and in what order, X1 to X6."""

import itertools
import math
from dataclasses import replace

from chain_story import ROOM, Story
from chainmodel import SMALLER, UNFIT, Play

from worker.hedge import RACE_S
from worker.job import Lane
from worker.resilience.gate import BreakerState, Denial
from worker.signals import Signal
from worker.step import LEAST_CALL_S, MOST_EXTRAS, RESERVE_S
from worker.walk import Answered, Exhausted, Refused

SOON = 1e-6
FINAL = {Signal.INVALID_REQUEST, Signal.CONTENT_POLICY}
AGAIN = {Signal.REQUEST_TIMEOUT, Signal.CONFLICT, Signal.RATE_LIMITED, Signal.SERVER_ERROR, Signal.UNREACHABLE}
DOUBTFUL = {Signal.REQUEST_TIMEOUT, Signal.DROPPED, Signal.TIMED_OUT, Signal.OUT_OF_TIME, Signal.CANCELLED, Signal.ORPHANED}
NOT_ASKED = {*(state.value for state in BreakerState), *(denial.value for denial in Denial), "window_too_small", "not_sent"}


def x0_nothing_is_raised(story: Story) -> None:
    assert story.error is None, repr(story.error)
    assert story.strays == []


def x1_calls_and_extras_are_capped(story: Story) -> None:
    play, sent = story.play, story.sent()
    providers = len(play.parts) + (play.smaller is not None)
    assert len(sent) <= providers + MOST_EXTRAS
    hedges = sum(granted for _, _, granted, _ in story.said("hedge"))
    extras = hedges + sum(max(0, len(story.sent(name)) - 1) for name in (*play.names, SMALLER))
    assert extras <= (MOST_EXTRAS if play.attempts < 2 else 0)
    for name in {entry[1] for entry in sent}:
        once = play.strategy == "race" and name != SMALLER
        assert len(story.sent(name)) <= 1 + (0 if once or play.part(name).gate == "probe" else play.part(name).max_retries)
        assert play.part(name).gate != "isolated"
    assert not {f"p{i}" for i, word in play.asked if word not in ("orphaned", "cancelled", "out_of_time")} & {entry[1] for entry in sent}


def x2_no_call_outlives_the_deadline(story: Story) -> None:
    play, ends_s = story.play, story.walk.ends_at_s
    untried = {name for name in play.names if play.part(name).window is None}
    for _, name, _, at_s, timeout_s in story.sent():
        assert at_s < ends_s - LEAST_CALL_S + SOON
        assert 0 < timeout_s <= min(ends_s - at_s, play.part(name).timeout_s) + SOON
        if play.strategy == "race" and name != SMALLER:
            assert timeout_s <= RACE_S
    assert story.ended_s <= max(ends_s, story.began_s + 10 * (play.books_s + play.gate_s)) + 5 * play.gate_s + SOON, untried


def x2_time_is_kept_for_those_who_may_still_be_asked(story: Story) -> None:
    play, before = story.play, []
    if play.strategy == "race" or play.asked:
        return
    for _, name, _, at_s, timeout_s in story.sent():
        before = [*before, name]
        if name != SMALLER and play.strategy == "ordered":
            left, others = story.walk.ends_at_s - at_s, _not_yet_heard_of(story, name)
            assert timeout_s <= left - min(RESERVE_S, left / (others + 1)) * others + SOON


def _not_yet_heard_of(story: Story, name: str) -> int:
    """Who comes after it in the order of the walk."""
    order = [reason.provider for reason in story.walk.reasons] + [call.provider for call in story.by_route]
    seen = set(order[: order.index(name)]) if name in order else set(story.play.names)
    return len(set(story.play.names) - seen - {name})


def x2_who_was_cut_short_by_us_is_told_apart(story: Story) -> None:
    timeouts = {entry[2]: entry[4] for entry in story.sent()}
    for call in story.walk.calls:
        most_s = RACE_S if story.play.strategy == "race" and call.provider != SMALLER else math.inf
        own = timeouts[str(call.id)] >= min(story.play.part(call.provider).timeout_s, most_s)
        assert call.signal is not (Signal.OUT_OF_TIME if own else Signal.TIMED_OUT)


def x3_x4_only_what_may_pass_is_asked_again_and_not_too_soon(story: Story) -> None:
    for name in {entry[1] for entry in story.sent()}:
        calls = [call for call in story.walk.calls if call.provider == name]
        for number, (one, two) in enumerate(itertools.pairwise(story.sent(name))):
            act = story.play.part(name).act(number)
            assert calls[number].signal is act.signal
            assert act.signal in AGAIN
            assert two[3] - one[3] >= act.seconds + (act.wait_s or 0) - SOON


def x3_nobody_is_asked_after_a_refusal_or_beyond_his_window(story: Story) -> None:
    play = story.play
    if play.strategy != "ordered":
        return
    for before, _ in itertools.combinations(story.by_route, 2):
        assert before.signal not in FINAL | {Signal.ANSWERED}
    for reason in story.walk.reasons:
        if reason.reason == "window_too_small":
            own = play.part(reason.provider).window
            long = {r.provider for r in story.walk.reasons if r.reason == "context_too_long"}
            assert own is not None
            assert any((play.part(name).window or 0) >= own for name in long)


def x3_who_has_no_larger_window_is_not_asked_after_one_was_too_small(story: Story) -> None:
    play, small = story.play, []
    for entry in story.diary:
        if entry[0] == "sent" and entry[1] != SMALLER and play.strategy != "race":
            own = play.part(entry[1]).window
            assert own is None or all(window is None or own > window for window in small)
        if entry[0] == "told" and entry[3].reason in ("context_too_long", "too_long"):
            small.append(play.part(entry[1]).window)


def doubtful(story: Story) -> bool:
    signals = {call.signal.value for call in story.walk.calls} | {word for _, word in story.play.asked}
    return story.play.on_unknown == "fail" and bool(signals & DOUBTFUL)


def x3_in_doubt_nobody_is_asked(story: Story) -> None:
    if story.play.on_unknown == "fail":
        for before, _ in itertools.combinations(story.walk.calls, 2):
            assert before.signal not in DOUBTFUL
        if any(word in DOUBTFUL for _, word in story.play.asked):
            assert story.sent() == []


def left_alone(play: Play) -> bool:
    """Nobody stands in the way of this walk but its providers."""
    return play.cancel is None and set(play.books) == {"open"} and play.hush_s > 1e6


def _could_answer(play: Play, name: str) -> bool:
    part, first = play.part(name), play.part(name).acts[0]
    fits = not play.shaped or first.content != UNFIT
    whole = first.finish_reason == "stop" or play.on_truncated == "accept"
    well = part.gate in ("well", "probe") and name not in {f"p{i}" for i, _ in play.asked}
    return well and first.signal is Signal.ANSWERED and not first.breaks and fits and whole and first.seconds <= 1


def x5_what_may_pass_is_asked_again(story: Story) -> None:
    """Of the only provider there is, when its wait is short and its second reply would be the answer."""
    play, part = story.play, story.play.parts[0]
    if len(play.parts) > 1 or len(part.acts) < 2 or part.max_retries < 1 or part.gate != "well":
        return
    first, again = part.acts[0], _could_answer(replace(play, parts=(replace(part, acts=part.acts[1:]),)), "p0")
    soon = first.seconds < part.timeout_s and (first.wait_s or 0) < 7 and first.seconds + (first.wait_s or 0) + 3 < play.remaining_s
    shut = first.signal is Signal.RATE_LIMITED and not first.wait_s  # its gate is shut for longer than a retry waits
    if first.signal in AGAIN and again and soon and not shut and play.attempts < 2 and left_alone(play) and not doubtful(story):
        assert isinstance(story.outcome, Answered)
        assert story.outcome.answer.degraded is None


def x5_who_would_answer_is_asked(story: Story) -> None:
    """Within the deadline, while nobody refuses the request and no room is waited for."""
    play = story.play
    acts = [act for part in play.parts for act in part.acts] if play.strategy != "race" else []
    refused = any(act.signal in FINAL for act in acts) or any(word in FINAL for i, word in play.asked if i >= 0)
    windows = any(part.window for part in play.parts) and (
        any(act.signal is Signal.CONTEXT_TOO_LONG for act in acts) or any(word == "context_too_long" for _, word in play.asked)
    )
    patient = play.lane is Lane.BULK and not play.overflow and any(part.gate in ROOM for part in play.parts)
    slack = 1 + 20 * (play.books_s + play.gate_s)
    free = left_alone(play) and not (refused or windows or patient or play.on_unknown == "fail")
    if free and play.remaining_s >= 2 * len(play.parts) + slack and any(_could_answer(play, name) for name in play.names):
        assert isinstance(story.outcome, Answered)
        assert story.outcome.answer.degraded is None


def x6_the_order_is_kept_and_everybody_left_out_has_a_reason(story: Story) -> None:
    play, walk = story.play, story.walk
    if story.outcome is None or any(word == "answered" or word in FINAL for i, word in play.asked if i >= 0):
        return
    done = {f"p{i}": word for i, word in play.asked if i >= 0 and word not in ("orphaned", "cancelled", "out_of_time")}
    own = [reason for reason in walk.reasons if reason.provider != SMALLER]
    heard = [reason.provider for reason in own]
    assert len(set(heard)) == len(heard)
    if play.strategy != "race":
        assert heard[: len(done)] == [name for name in play.names if name in done]
        winner = [call.provider for call in story.by_route if call.signal is Signal.ANSWERED][:1]
        if play.strategy == "ordered":
            visited = heard[len(done) :] + winner
            assert visited == _expected(story, [name for name in play.names if name not in done], len(visited))
    full_walk = isinstance(story.outcome, Exhausted) or (isinstance(story.outcome, Refused) and story.outcome.signal not in FINAL)
    if full_walk and left_alone(play):
        assert set(heard) == set(play.names)
    for reason in own:
        calls = [call for call in story.by_route if call.provider == reason.provider]
        if reason.provider in done:
            assert reason.reason == done[reason.provider]
        elif calls:
            assert (reason.reason, reason.http_status, reason.error_code) == (calls[-1].signal, calls[-1].http_status, calls[-1].error_code)
        else:
            assert reason.reason in NOT_ASKED
            assert reason.reason in ("window_too_small", "not_sent") or (reason.retry_after_s or 0) > 0


def _expected(story: Story, untried: list[str], count: int) -> list[str]:
    """The order of the route; after a failure that another one will most likely meet as well, that one comes last."""
    order = []
    while untried and len(order) < count:
        name, *untried = untried
        order.append(name)
        last = next((call for call in reversed(story.by_route) if call.provider == name), None)
        if last is not None:
            untried = sorted(untried, key=lambda other: _same_fate(story.play, last, name, other))
    return order


def _same_fate(play: Play, call, name: str, other: str) -> bool:
    here, there = play.part(name), play.part(other)
    if here.host != there.host:
        return False
    revoked = call.signal is Signal.UNAUTHORIZED and call.http_status == 401
    account = call.signal is Signal.QUOTA_EXHAUSTED or revoked
    return call.signal is Signal.UNREACHABLE or (account and here.account == there.account)


def x6_what_was_said_is_taken_as_it_was_meant(story: Story) -> None:
    play = story.play
    for name in {call.provider for call in story.walk.calls}:
        for number, call in enumerate(call for call in story.walk.calls if call.provider == name):
            act = play.part(name).act(number)
            unfit = (play.shaped and act.content == UNFIT) or (act.finish_reason == "length" and play.on_truncated == "next")
            meant = Signal.UNFIT if act.signal is Signal.ANSWERED and unfit else act.signal
            assert call.signal in {meant, Signal.TIMED_OUT, Signal.OUT_OF_TIME, Signal.CANCELLED}


RULES = [rule for name, rule in list(globals().items()) if name.startswith("x")]
