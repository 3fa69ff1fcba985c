"""Scripts of faults, drawn by lot."""

from chain_visits import Visit
from chainmodel import FITS, UNFIT, Act, Part, Play
from hypothesis import strategies as st

from worker.job import Lane
from worker.signals import Signal

_PLAIN = sorted(set(Signal) - {Signal.OUT_OF_TIME, Signal.CANCELLED, Signal.ORPHANED, Signal.UNFIT, Signal.TIMED_OUT, Signal.ANSWERED})
_EARLIER = sorted(set(Signal) - {Signal.ANSWERED})
_seconds = st.sampled_from([0, 0, 0, 0.01, 0.3, 1.5, 3, 5, 30, 200])
_wait_s = st.sampled_from([None, None, None, 0, 0.2, 1, 5, 900])

_answers = st.builds(
    Act, seconds=_seconds, content=st.sampled_from([FITS, FITS, FITS, UNFIT]), finish_reason=st.sampled_from(["stop", "stop", "length"])
)
_unreachable = st.builds(
    Act, signal=st.just(Signal.UNREACHABLE), seconds=_seconds, code=st.sampled_from(["dns", "connect_timeout", "refused", "tls"])
)
_failures = st.builds(
    Act,
    signal=st.sampled_from(_PLAIN),
    seconds=_seconds,
    wait_s=_wait_s,
    status=st.sampled_from([401, 403]),
    code=st.sampled_from([None, "busy"]),
)
_broken = st.builds(Act, signal=st.just(Signal.DROPPED), code=st.just("provider_broke"), breaks=st.just(True), seconds=_seconds)
_acts = _answers | _unreachable | _failures | _failures | _failures | _broken

_parts = st.builds(
    Part,
    acts=st.lists(_acts, min_size=1, max_size=3).map(tuple),
    max_retries=st.integers(0, 5),
    timeout_s=st.sampled_from([1, 10, 60]),
    host=st.integers(0, 2),
    version=st.integers(1, 2),
    account=st.integers(0, 1),
    price=st.sampled_from([1, 1, 1, 3]),
    window=st.sampled_from([None, None, 8_000, 128_000]),
    gate=st.sampled_from(["well"] * 9 + ["isolated", "shut", "probe", "blocked", "full", "scarce"]),
)


# What befalls a walk besides its providers; most of them are left alone.
_trouble = st.sampled_from(
    [{}] * 12
    + [{"books": books} for books in (("gone",), ("error",), ("open", "error"), ("open", "gone"), ("error", "open"))]
    + [{"hush_s": seconds} for seconds in (0, 0.01, 1.2)]
    + [{"remaining_s": seconds} for seconds in (0.04, 0.5, 3)]
    + [{"cancel": (seconds, turns)} for seconds in (0, 0.01, 1) for turns in (0, 9, 20)]
)


@st.composite
def _drawn(draw):
    """A play; what is rare in it is drawn rarely, so that most walks get far."""
    parts = tuple(draw(st.lists(_parts, min_size=draw(st.integers(1, 3)), max_size=5)))
    strategy = draw(st.sampled_from(["ordered", "ordered", "hedge", "race"])) if len(parts) > 1 else "ordered"
    degrade = draw(st.sampled_from([(), ("smaller",), ("static",), ("cache",), ("cache", "smaller"), ("smaller", "static"), ("park",)]))
    asked = draw(st.sampled_from([0, 0, 0, 1])) * draw(st.lists(st.sampled_from(_EARLIER), min_size=1, max_size=len(parts)))
    attempts = draw(st.sampled_from([0, 0, 0, 1, 2, 9]))
    kept = "cache" in degrade and draw(st.booleans())
    settings = {
        "lane": draw(st.sampled_from(Lane)),
        "remaining_s": draw(st.sampled_from([20, 100, 5000])),
        "opened": draw(st.none() | st.integers(0, len(parts) - 1)),
        "on_unknown": draw(st.sampled_from(["retry", "retry", "retry", "fail"])) if strategy == "ordered" else "retry",
        "on_truncated": draw(st.sampled_from(["accept", "next"])),
        "overflow": draw(st.booleans()),
        "hedge_dearer": strategy == "hedge" and draw(st.booleans()),
        "p95": draw(st.sampled_from([1, 1, 4, None])) if strategy == "hedge" else None,
        "hedges": draw(st.sampled_from([10, 10, 1, 0])),
        "shaped": draw(st.sampled_from([True, False, False])),
        "temperature": draw(st.sampled_from([0, 0, 1])),
        "books_s": draw(st.sampled_from([0, 0, 0, 0.01])),
        "gate_s": draw(st.sampled_from([0, 0, 0, 0.002])),
        "seed": draw(st.integers(0, 9)),
    }
    return Play(
        parts=parts,
        smaller=draw(_parts) if "smaller" in degrade else None,
        strategy=strategy,
        degrade=degrade,
        attempts=attempts,
        asked=tuple((i, word.value) for i, word in enumerate(asked)),
        kept=kept,
        **settings | draw(_trouble),
    )


plays = _drawn()

visits = st.lists(
    st.builds(
        Visit,
        wait_s=st.sampled_from([0, 0, 1, 10, 55, 70, 590, 700]),
        tenant=st.sampled_from(["one", "one", "two"]),
        chain=st.sampled_from(["default", "default", "other"]),
        prompt=st.sampled_from(["hi", "hi", "ho"]),
        parameters=st.sampled_from([
            (("temperature", 0),), (("temperature", 0),), (("temperature", 0), ("user", "u")), (("temperature", 1),),
            (("temperature", 1), ("seed", 1)), (("n", 2), ("temperature", 0)), (("max_tokens", 5), ("temperature", 0)),
        ]),
        up=st.booleans(),
        takes_s=st.sampled_from([0, 0, 2]),
        finish_reason=st.sampled_from(["stop", "stop", "length"]),
    ),
    min_size=2,
    max_size=12,
)  # fmt: skip
