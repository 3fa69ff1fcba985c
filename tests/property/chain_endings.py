"""What holds of every story of a chain, whatever its script: how it ends and what it leaves behind, X7 to X15."""

import json
from dataclasses import replace
from decimal import Decimal

from chain_rules import DOUBTFUL, FINAL, SOON, doubtful, left_alone
from chain_story import Story, perform
from chainmodel import SECRET, SMALLER, Play
from scripted import CALL_USD

from worker.degrade import PATIENCE_S
from worker.hedge import DEARER
from worker.job import Lane
from worker.reach import WINDOW_S
from worker.resilience.gate import Denial
from worker.settlement import decide
from worker.signals import Signal, Verdict
from worker.step import LEAST_CALL_S, OVERTAKEN
from worker.walk import MAX_ATTEMPTS, Answered, Doubtful, Exhausted, OutOfTime, Parked, Refused

SOON_S = 1  # from when a job may be attempted again until it is
FULL = {Signal.RATE_LIMITED, Signal.SLOW_DOWN}
HOPELESS = {Signal.CONTEXT_TOO_LONG, Signal.UNFIT, Signal.UNSUPPORTED}
ISOLATING = {Signal.UNAUTHORIZED, Signal.QUOTA_EXHAUSTED, Signal.MODEL_NOT_FOUND}
SILENT = {"dns", "connect_timeout", "no_route"}
FAULTS = {
    Signal.MALFORMED, Signal.REQUEST_TIMEOUT, Signal.SERVER_ERROR, Signal.OVERLOADED, Signal.UNREACHABLE, Signal.DROPPED, Signal.TIMED_OUT,
}  # fmt: skip


def x10_what_is_paid_for_is_not_bought_again(story: Story) -> None:
    words = [word for i, word in story.play.asked if i >= 0]
    if story.play.cancel is None and ("answered" in words or FINAL & set(words)):
        assert story.sent() == []
        assert isinstance(story.outcome, Answered if "answered" in words else Refused)


def x7_the_first_answer_wins_and_a_failure_cancels_nobody(story: Story) -> None:
    if story.outcome is None or "error" in story.play.books:
        return
    won = [call for call in story.by_route if call.signal is Signal.ANSWERED]
    lost = [call for call in story.walk.calls if call.signal is Signal.CANCELLED]
    if won:
        assert isinstance(story.outcome, Answered)
        assert story.outcome.answer in [call.answer for call in won]
        assert story.outcome.answer is not None
    assert won or not lost
    assert {call.error_code for call in lost} <= {OVERTAKEN}
    if story.play.strategy != "ordered" and not story.play.asked and won and not story.play.gate_s:
        answers = [entry for entry in story.said("told") if entry[2] is Verdict.SUCCESS and entry[3].reason == "answered"]
        assert story.ended_s <= answers[0][5] + story.play.books_s  # a row that is being opened is waited for


def x7_nothing_leaks(story: Story) -> None:
    assert story.leaks == []
    assert set(story.in_flight.values()) == {0}
    allowed = [entry[2].lease for entry in story.said("admitted") if entry[2].allowed]
    assert sorted(allowed) == sorted(entry[4] for entry in story.said("told"))


def x8_hedges_are_allowed_elsewhere_and_not_too_dear(story: Story) -> None:
    play, flying, hedges = story.play, [], 0
    if play.strategy == "race":
        return
    granted = [(entry[1], entry[3]) for entry in story.said("hedge") if entry[2]]
    assert all([slow for slow, _ in granted].count(name) <= play.hedges for name in play.names)
    for entry in story.diary:
        if entry[0] == "sent":
            if flying:
                slow, hedges = flying[0], hedges + 1
                assert play.strategy == "hedge"
                assert slow in [name for name, _ in granted]
                assert play.part(slow).base_url != play.part(entry[1]).base_url
                one, two = Decimal(play.part(slow).price or 0), Decimal(play.part(entry[1]).price or 0)
                assert play.hedge_dearer or two <= one * DEARER
                assert entry[3] - story.began_s >= (play.p95 or 1e9) - SOON
            flying.append(entry[1])
            assert len(flying) <= 2
        if entry[0] == "told" and entry[1] in flying:
            flying.remove(entry[1])
    assert hedges <= len(granted)


def x11_a_lesser_answer_is_marked_and_only_given_when_it_is_time(story: Story) -> None:
    play, outcome = story.play, story.outcome
    if isinstance(outcome, Answered):
        answer = outcome.answer
        by = {call.answer: call.provider for call in story.walk.calls if call.answer}.get(answer)
        expected = (
            "static" if answer.provider == "static" else "cache" if answer.content == "kept" else "smaller" if by == SMALLER else None
        )
        assert answer.degraded == expected
        assert expected is None or expected in play.degrade
        if expected:
            assert not any(call.signal in FINAL | {Signal.ANSWERED} for call in story.by_route)
            unsent = any(reason.reason == "not_sent" and reason.provider != SMALLER for reason in story.walk.reasons)
            assert not unsent or story.walk.ends_at_s - story.ended_s < 3  # then it is too late for another attempt
            doubts = DOUBTFUL & {call.signal for call in story.by_route}
            assert play.on_unknown == "retry" or not doubts
    person, static = play.lane is Lane.INTERACTIVE, "static" in play.degrade
    if (static and person) or (static and play.attempts + 1 >= MAX_ATTEMPTS):
        assert not isinstance(outcome, Exhausted)
    if static:
        assert not isinstance(outcome, OutOfTime)
    if static and isinstance(outcome, Parked) and not outcome.ours and left_alone(play):
        left = story.walk.ends_at_s - story.ended_s
        assert outcome.retry_after_s < left
        assert not person or outcome.retry_after_s <= PATIENCE_S
    if isinstance(outcome, Exhausted):
        assert outcome.patient == ("park" in play.degrade)


def x11_a_lesser_answer_is_never_kept(story: Story) -> None:
    if story.kept is not None:
        full = [call.answer.content for call in story.by_route if call.answer]
        assert story.kept.answer.degraded is None
        assert story.kept.answer.content in ["kept", *full]


def x13_each_request_has_one_call_and_one_row(story: Story) -> None:
    sent, walk = [entry[2] for entry in story.sent()], story.walk
    assert len(set(sent)) == len(sent)
    assert sorted(sent) == sorted(str(call.id) for call in walk.calls)
    rows = [entry[2] for entry in story.said("opened")] + ([str(walk.claim.opened_id)] if walk.claim.opened_id else [])
    assert len(set(rows)) == len(rows)
    assert set(sent) <= set(rows)
    assert len(set(walk.unsent)) == len(walk.unsent)
    assert set(rows) - set(sent) <= {str(row) for row in walk.unsent}
    assert not set(sent) & {str(row) for row in walk.unsent}
    opened = walk.claim.opened_id
    for call in walk.calls:
        assert call.id != opened or call.provider == walk.claim.opened_provider
    mine = story.sent(walk.claim.opened_provider)
    assert opened is None or not mine or mine[0][2] == str(opened)
    if story.play.books[0] in ("gone", "error"):
        assert story.play.books[-1] == "open" or set(sent) <= {str(opened)}
    if story.play.strategy == "ordered" and left_alone(story.play) and not (story.play.books_s or story.play.gate_s):
        assert {entry[2] for entry in story.said("opened")} <= set(sent)  # no row is opened in vain
    for call in walk.calls:
        price = story.play.part(call.provider).price or 0
        unknown = DOUBTFUL | {Signal.MALFORMED, Signal.CONTENT_POLICY}
        billed = call.signal in (Signal.ANSWERED, Signal.UNFIT)
        assert call.cost_usd == (CALL_USD * price if billed else None if call.signal in unknown else 0), call


def x7_the_gate_is_told_what_happened(story: Story) -> None:
    """In the order of the calls; a machine that cannot reach anybody blames nobody."""
    ended = [call for call in story.walk.calls if call.signal is not Signal.CANCELLED]
    tells = [entry for entry in story.said("told") if entry[3].reason]
    given_up = [entry for entry in story.said("told") if entry[3].sent and not entry[3].reason]
    assert len(given_up) == len(story.walk.calls) - len(ended)
    silent: dict[int, float] = {}
    if story.play.gate_s:
        return
    for call, (_, name, verdict, ending, _, at_s) in zip(ended, tells, strict=True):
        assert call.provider == name
        mute = call.signal is Signal.UNREACHABLE and call.error_code in SILENT
        if mute:
            silent[story.play.part(name).host] = at_s
        elif call.signal is not Signal.OUT_OF_TIME:
            silent.clear()
        ours = mute and sum(at_s - at <= 5 for at in silent.values()) >= 2
        good = call.signal in (Signal.ANSWERED, Signal.UNFIT)
        bad = call.signal in FAULTS and not ours
        assert verdict is (Verdict.SUCCESS if good else Verdict.FAILURE if bad else Verdict.NEUTRAL), call.signal
        assert (ending.isolate_s > 0) == (call.signal in ISOLATING)
        assert ending.sent == (call.signal is not Signal.UNREACHABLE and not (call.signal is Signal.UNSUPPORTED and not call.http_status))
        assert ending.cost_usd == call.cost_usd
    lost = sum(story.ended_s - at <= 5 for at in silent.values()) >= 2
    if lost and left_alone(story.play) and not story.play.degrade and not story.play.asked:
        heard = {reason.reason for reason in story.walk.reasons} & set(Signal)
        park = Parked(WINDOW_S, new_walk=True)
        assert heard != {Signal.UNREACHABLE} or isinstance(story.outcome, Answered | OutOfTime) or story.outcome == park


def x14_who_found_no_room_waits_for_the_first_that_has_some(story: Story) -> None:
    play, outcome, walk = story.play, story.outcome, story.walk
    if not isinstance(outcome, Parked) or not left_alone(play) or outcome.ours:
        return
    assert outcome.retry_after_s > 0
    reasons = [reason for reason in walk.reasons if reason.provider != SMALLER]
    if reasons and not walk.calls and not play.asked and all(reason.retry_after_s for reason in reasons):
        waits = {min(reason.retry_after_s or 0 for reason in reasons)}
        if play.lane is Lane.BULK and not play.overflow and reasons[-1].reason == Denial.LIMITED:
            waits.add(reasons[-1].retry_after_s or 0)  # it rather waits for that one
        assert outcome.retry_after_s in waits
    assert story.later is not None
    ending, diary = story.later
    asked = any(entry[0] == "sent" for entry in diary)
    assert asked or isinstance(ending, OutOfTime | Answered | Refused | Doubtful), (outcome, ending)


def x14_full_or_not_asked_is_parked_and_all_else_has_an_end(story: Story) -> None:
    play, outcome = story.play, story.outcome
    if outcome is None or play.degrade or not left_alone(play) or isinstance(outcome, Answered):
        return
    last = [Signal(word) for i, word in play.asked if i >= 0 and word not in ("orphaned", "cancelled", "out_of_time")]
    last += {call.provider: call.signal for call in story.by_route}.values()
    if isinstance(outcome, Parked) and not outcome.ours and play.strategy == "ordered":
        room = play.lane is Lane.BULK and story.walk.reasons[-1].reason == Denial.LIMITED
        assert room or set(last) <= FULL or (outcome.retry_after_s == WINDOW_S and set(last) <= {Signal.UNREACHABLE})
    if isinstance(outcome, Refused):
        assert outcome.signal in last
        assert outcome.signal in FINAL or set(last) <= HOPELESS
    if isinstance(outcome, Exhausted):
        words = {reason.reason for reason in story.walk.reasons}
        assert set(last) - FULL or "window_too_small" in words
        assert words - HOPELESS - {"window_too_small"}
        assert story.walk.ends_at_s - story.ended_s > LEAST_CALL_S or story.play.gate_s
    if any(signal in FINAL for signal in last):
        assert isinstance(outcome, Refused)
    assert isinstance(outcome, Doubtful | OutOfTime) or not doubtful(story) or FINAL & set(last)


def x14_without_the_books_the_job_waits(story: Story) -> None:
    play = story.play
    admitted = any(entry[2].allowed and entry[1] != SMALLER for entry in story.said("admitted"))
    if play.books == ("error",) and play.cancel is None and play.hush_s > 1e6 and admitted and not story.sent() and play.remaining_s > 1:
        assert isinstance(story.outcome, Parked)
        assert story.outcome.ours


def x15_nobodys_words_are_repeated(story: Story) -> None:
    told = [reason.to_json() for reason in story.walk.reasons]
    if story.outcome is not None:
        told.append(decide(story.outcome, story.walk).error)
    assert SECRET not in json.dumps([told, [repr(log) for log in story.logs], story.strays])


def check_rungs(story: Story) -> None:
    """X11: the same play on a chain without a ladder says when it is time for one; then the first rung that has something gives it."""
    play, outcome = story.play, story.outcome
    if not play.degrade or play.cancel is not None or outcome is None:
        return
    full = perform(replace(play, degrade=(), smaller=None))
    bare, left_s = full.outcome, full.walk.ends_at_s - full.ended_s
    if not _is_time(play, bare, left_s):
        assert type(outcome) is type(bare)
        assert story.sent(SMALLER) == []
        return
    rungs = [rung for rung in play.degrade if _has_something(story, rung)]
    if rungs:
        assert isinstance(outcome, Answered)
        assert outcome.answer.degraded == rungs[0]
    else:
        assert isinstance(outcome, Doubtful if doubtful(story) else type(bare))
    last = play.degrade.index(rungs[0]) if rungs else len(play.degrade)
    if story.sent(SMALLER):
        assert "smaller" in play.degrade[: last + 1]


def _is_time(play: Play, bare: object, left_s: float) -> bool:
    person = play.lane is Lane.INTERACTIVE
    match bare:
        case Exhausted():
            return person or play.attempts + 1 >= MAX_ATTEMPTS or min(300, 2 * 2**play.attempts) + SOON_S >= left_s
        case Parked(retry_after_s, ours=ours):
            return 1.2 * retry_after_s + SOON_S >= left_s or (person and not ours and retry_after_s > PATIENCE_S)
        case OutOfTime():
            return True
    return False


def _has_something(story: Story, rung: str) -> bool:
    if rung == "smaller":
        return any(call.provider == SMALLER and call.signal is Signal.ANSWERED for call in story.walk.calls)
    return rung == "static" or (rung == "cache" and story.play.kept and story.play.temperature <= 0.3)


ENDINGS = [rule for name, rule in list(globals().items()) if name.startswith("x")]
