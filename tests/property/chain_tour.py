"""Scripts that come past the guards which others seldom find; each is short, and most are about one guard."""

from chain_visits import Visit
from chainmodel import UNFIT, Act, Part, Play

from worker.job import Lane
from worker.signals import Signal as S

PERSON = Lane.INTERACTIVE
BUSY, LOST, FULL, SLOW = Act(S.OVERLOADED), Act(S.DROPPED), Act(S.RATE_LIMITED), Act(seconds=9)
FAILED, LATE = Act(S.SERVER_ERROR), Act(S.SERVER_ERROR, seconds=5)
MUTE, HERE, NOBODY = Act(S.UNREACHABLE, code="dns"), Act(S.UNREACHABLE, code="refused"), Act(S.UNREACHABLE, code="connect_timeout")
WELL = Part()


def once(*acts: Act, **more) -> Part:
    return Part(acts or (Act(),), max_retries=0, **more)


def hedging(*parts: Part, **more) -> Play:
    return Play(parts, **{"strategy": "hedge", "p95": 1, "hedges": 10} | more)


ELSEWHERE = Part((Act(seconds=0.5),), host=1)
_ASKED = (
    Play((WELL, WELL), asked=((0, "answered"),)),
    Play((WELL, WELL), asked=((0, "content_policy"),)),
    Play((WELL,), asked=((0, "timed_out"),), on_unknown="fail"),
    Play((once(BUSY), WELL), asked=((1, "orphaned"),), on_unknown="fail"),
    Play((WELL, WELL), asked=((0, "cancelled"),)),
    Play((WELL, WELL), asked=((0, "context_too_long"),)),
    Play((once(BUSY, window=8_000), Part(window=8_000)), asked=((0, "context_too_long"),)),
    Play((once(BUSY), once(LOST)), on_unknown="fail", asked=((0, "overloaded"),)),
)
_ENDINGS = (
    Play((once(LOST),), on_unknown="fail"),
    Play((once(Act(S.REQUEST_TIMEOUT)),), on_unknown="fail"),
    Play((Part((Act(S.REQUEST_TIMEOUT), Act())),), on_unknown="fail"),
    Play((once(Act(S.CONTEXT_TOO_LONG), window=8_000), Part(window=4_000), Part(window=128_000))),
    Play((once(Act(S.CONTEXT_TOO_LONG), window=8_000), Part(window=4_000))),
    Play((once(Act(S.UNSUPPORTED)), once(Act(content=UNFIT))), shaped=True),
    Play((once(Act(finish_reason="length")), WELL), on_truncated="next"),
    Play((once(Act(content=UNFIT)), WELL), shaped=True),
    Play((once(Act(S.RATE_LIMITED, wait_s=5)), Part(gate="blocked"))),
    Play((once(Act(S.RATE_LIMITED, wait_s=30)), once(Act(S.SLOW_DOWN, wait_s=20)))),
    Play((Part(gate="shut"), Part(gate="blocked"))),
    Play((once(FULL), once(FULL))),
    Play((Part(gate="full"), WELL)),
    Play((Part(gate="full"), WELL), overflow=True),
    Play((Part(gate="full"), WELL), lane=PERSON),
    Play((Part(gate="scarce"), WELL), lane=PERSON),
    Play((once(SLOW, timeout_s=60),), remaining_s=3),
    Play((once(SLOW, timeout_s=60), once(SLOW)), remaining_s=3),
    Play((once(LATE), WELL), hush_s=2),
    Play((WELL,), books=("error",)),
    Play((once(BUSY), WELL), books=("open", "error")),
    Play((WELL, WELL), books=("gone",)),
    Play((once(BUSY), WELL), books=("open", "gone")),
    Play((WELL,), remaining_s=0.5, books_s=0.48),
    Play((WELL,), remaining_s=0.04),
)
_STEPS = (
    Play((Part((FAILED,), max_retries=5),)),
    Play((Part((FAILED,), max_retries=5),), attempts=2),
    Play((Part((FAILED, FAILED, Act())),)),
    Play((Part((Act(S.CONFLICT), Act()), gate="probe"),)),
    Play((Part((Act(S.RATE_LIMITED, wait_s=5), Act())),)),
    Play((Part((Act(S.RATE_LIMITED, wait_s=5), Act()), timeout_s=1),), remaining_s=5.02),
    Play((Part((Act(S.SERVER_ERROR), SLOW), timeout_s=60), WELL), remaining_s=3),
    Play((Part((Act(seconds=30),), timeout_s=60), WELL, WELL), remaining_s=20),
    Play((Part((Act(S.SLOW_DOWN, wait_s=0.1),), max_retries=3),)),
    Play((Part((FULL, Act()), max_retries=1),)),
    Play((Part((Act(breaks=True, signal=S.DROPPED, code="provider_broke"),)), WELL)),
    Play((once(BUSY), WELL), opened=0),
    Play((once(BUSY), WELL), opened=1),
    Play((Part((FAILED, Act())), WELL), opened=0),
    Play((Part(gate="isolated"), WELL), opened=1),
    Play((Part(gate="isolated"), WELL), opened=0),
    *(Play((Part((Act(seconds=5),)),), cancel=(1, turns), opened=0) for turns in (0, 1)),
    *(Play((WELL,), books_s=0.01, cancel=(0.005, turns)) for turns in (0, 2)),
    *(Play((WELL,), cancel=(0, turns)) for turns in range(12)),
    Play((once(Act(S.UNAUTHORIZED, status=401)), Part((BUSY,), max_retries=0), Part(host=1))),
    Play((once(Act(S.UNAUTHORIZED, status=403)), once(BUSY), Part(host=1))),
    Play((once(Act(S.QUOTA_EXHAUSTED)), once(BUSY), once(LOST, account=1), once(LOST, host=1))),
    Play((once(Act(S.QUOTA_EXHAUSTED)), once(BUSY), once(LOST, host=1), once(BUSY))),
    Play((once(Act(S.UNREACHABLE, code="tls")), once(BUSY), once(LOST, host=1))),
)
_REACH = (
    Play((once(MUTE), once(NOBODY, host=1), once(BUSY, host=2))),
    Play((once(MUTE), once(NOBODY, host=1))),
    Play((once(BUSY, host=2), once(MUTE), once(NOBODY, host=1))),
    Play((once(HERE), once(MUTE, host=1), once(HERE, host=2))),
    Play((once(HERE), once(HERE, host=1))),
    Play((once(MUTE), once(BUSY, host=1), once(NOBODY, host=2))),
    Play((once(MUTE), once(Act(S.UNREACHABLE, code="dns", seconds=8), host=1, timeout_s=60))),
    Play((once(MUTE), once(MUTE, version=2))),
)
# fmt: off
_HEDGES = (
    hedging(once(SLOW), ELSEWHERE),
    hedging(once(Act(S.CONTEXT_TOO_LONG), window=8_000), once(SLOW), Part(host=1, window=4_000)),
    hedging(once(SLOW), once(BUSY, host=1), once(host=2)),
    hedging(once(Act(S.OVERLOADED, seconds=3)), once(BUSY, host=1), once(host=2)),
    hedging(once(SLOW), Part()),
    hedging(once(SLOW), Part((Act(),), version=2)),
    hedging(once(SLOW), Part(host=1, price=3)),
    hedging(once(SLOW), Part(host=1, price=3), hedge_dearer=True),
    hedging(once(SLOW), ELSEWHERE, hedges=0),
    hedging(once(SLOW), ELSEWHERE, attempts=2),
    hedging(once(SLOW), ELSEWHERE, p95=4),
    hedging(once(SLOW), once(Act(seconds=5), host=1), cancel=(0.5, 0)),
    hedging(once(SLOW), once(Act(seconds=5), host=1), cancel=(2, 0)),
    hedging(once(Act(S.OVERLOADED, seconds=3)), Part((FAILED,), host=1, max_retries=5), p95=2),
    hedging(Part((LATE, Act()), max_retries=5), once(Act(S.OVERLOADED, seconds=1), host=1)),
    *(hedging(Part((Act(S.SERVER_ERROR, seconds=0.3),) * 4, max_retries=5), once(SLOW, host=1), seed=seed) for seed in range(3)),
    hedging(Part((FAILED, FAILED, LATE, LATE, LATE), max_retries=5), once(BUSY, host=1)),
    hedging(Part((FAILED, FAILED, FAILED, SLOW), max_retries=5), once(Act(seconds=20), host=1), seed=3),
    hedging(
        once(Act(S.OVERLOADED, seconds=3)), once(BUSY, host=1), once(Act(S.OVERLOADED, seconds=3)), once(BUSY, host=1),
        Part((FAILED,), host=2, max_retries=5),
    ),
    *(Play((once(BUSY), once(Act(seconds=2), host=1), once(SLOW, host=2)), strategy="race", cancel=cancel) for cancel in (None, (1, 0))),
    Play((once(Act(seconds=200), timeout_s=60), once(BUSY, host=1)), strategy="race", remaining_s=100),
    Play((Part((FAILED,)), Part((FAILED,), host=1)), strategy="race"),
    Play((once(Act(S.CONTENT_POLICY)), once(Act(seconds=1), host=1)), strategy="race"),
)
_LADDERS = (
    *(Play((once(BUSY),), smaller=small, degrade=("smaller", "static"), lane=PERSON) for small in (WELL, once(BUSY))),
    *(Play((once(Act(word)),), degrade=("static",), lane=PERSON) for word in (S.CONTENT_POLICY, S.CONTEXT_TOO_LONG, S.DROPPED)),
    Play((once(LOST),), degrade=("static",), lane=PERSON, on_unknown="fail"),
    Play((once(BUSY),), smaller=once(LOST), degrade=("smaller",), lane=PERSON, on_unknown="fail"),
    Play((once(BUSY), WELL), smaller=WELL, degrade=("smaller",), asked=((-1, "content_policy"),)),
    Play((once(BUSY),), degrade=("static",), attempts=9, remaining_s=5000),
    Play((once(LATE),), smaller=WELL, degrade=("smaller",), lane=PERSON, on_unknown="fail", remaining_s=4),
    *(Play((once(BUSY),), degrade=("static",), attempts=attempts) for attempts in (0, 8, 9)),
    *(Play((once(BUSY),), degrade=("cache", "park"), kept=kept, lane=PERSON) for kept in (True, False)),
    *(Play((once(BUSY),), degrade=("cache",), kept=True, temperature=t, lane=PERSON) for t in (0, 1)),
    *(Play((once(Act(S.SLOW_DOWN, wait_s=wait_s)),), degrade=("static",), lane=PERSON) for wait_s in (1, 2, 3)),
    Play((once(Act(S.SLOW_DOWN, wait_s=30)),), degrade=("static",), remaining_s=20),
    Play((WELL,), degrade=("static",), lane=PERSON, books=("error",), remaining_s=0.5),
    Play((WELL,), degrade=("static",), lane=PERSON, hush_s=0, remaining_s=0.5),
    Play((once(SLOW, timeout_s=60),), degrade=("static",), remaining_s=3),
    Play((once(BUSY),), smaller=WELL, degrade=("cache", "smaller"), lane=PERSON),
)
# fmt: on
TOUR = (*_ASKED, *_ENDINGS, *_STEPS, *_REACH, *_HEDGES, *_LADDERS)

ILL, WARM = {"up": False}, {"parameters": (("temperature", 1),)}
VISITS = tuple(
    (list(visits), fresh)
    for visits in (
        (Visit(), Visit(1, **ILL)),
        (Visit(), Visit(1, tenant="two", **ILL), Visit(1, chain="other", **ILL), Visit(1, prompt="other", **ILL)),
        (Visit(), Visit(1, tenant="two"), Visit(1, chain="other")),
        (Visit(**WARM), Visit(1, **WARM), Visit(1, **WARM, **ILL)),
        (Visit(prompt="ho", **ILL), Visit(1, prompt="ho", **ILL)),
        (Visit(finish_reason="length"), Visit(1, **ILL)),
        (Visit(), Visit(590, **ILL), Visit(20, **ILL)),
        (Visit(), Visit(50), Visit(20)),
        (Visit(takes_s=2), Visit(0, takes_s=2), Visit(0, takes_s=2)),
    )
    for fresh in (False, True)
)
