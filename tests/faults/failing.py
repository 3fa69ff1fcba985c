"""The worker's Celery application with seams: `celery -A failing worker` fails where its environment says.

Production code knows nothing of it.

BACKSTOP_FAILPOINT  where and how it fails, comma-separated: `POINT:ACTION@N`, at the N-th passing (default 1),
                    as in `after_claim:kill@2`.
                    Points: see POINTS. Actions: kill, stop (SIGSTOP), exit, block:SECONDS (of whoever passes: the loop, nearly always),
                    raise:WHAT (an SQLSTATE such as 40P01, as SQLAlchemy raises it, or the name of a built-in exception).
BACKSTOP_SABOTAGE   guards that are off, comma-separated: see SABOTAGES.
BACKSTOP_POISON     a word: the worker dies where the request of a job with this word in it would be sent.

The first passing of each point is written to stderr, `passed POINT`, as is what is done there, `failed POINT ACTION`.
"""

from __future__ import annotations

import builtins
import inspect
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import sqlalchemy.exc
from sqlalchemy import text

from worker import attempt, calls, database, keeper, ledger, spool, step, wiring
from worker.app import app
from worker.deathwatch import DeathWatch
from worker.dispatch import Dispatcher
from worker.keeper import Keeper
from worker.providers.openai import OpenAICompatible
from worker.transport import Bell

__all__ = ["app"]

# Point: what is patched, and whether the point is passed before or after it.
POINTS: Mapping[str, tuple[Any, str, str]] = {
    "after_fetch": (attempt.Attempts, "run_pack", "before"),  # a message was fetched and acknowledged
    "before_claim": (attempt, "claim", "before"),
    "after_claim": (attempt, "claim", "after"),
    "before_open_call": (step.Steps, "_opened", "before"),
    "after_open_call": (step.Steps, "_opened", "after"),  # its row is on the books, by now or since the claim
    "before_request": (OpenAICompatible, "complete", "before"),
    "after_request": (OpenAICompatible, "complete", "after"),  # answered and paid for, booked nowhere
    "before_settle": (attempt, "settle", "before"),
    "after_settle": (attempt, "settle", "after"),  # committed, and nobody knows
    "before_statement": (database, "_rows", "before"),  # each of a worker's own: claim, open, settle
    "after_statement": (database, "_rows", "after"),
    "before_beat": (Keeper, "_beat_once", "before"),
    "after_dispatch_commit": (Dispatcher, "_send", "before"),
    "before_publish": (Bell, "publish", "before"),  # the leader's, in a thread of its own
    "after_publish": (Bell, "publish", "after"),
    "in_rescue": (keeper, "rescue", "before"),
}

_passed: Counter[str] = Counter()
_armed: dict[tuple[str, int], str] = {}


def pass_by(point: str) -> None:
    """Fails when it is the time for it."""
    _passed[point] += 1
    if _passed[point] == 1:
        _say(f"passed {point}")
    if action := _armed.get((point, _passed[point])):
        _say(f"failed {point} {action}")
        fail(action)


def fail(action: str) -> None:
    match action.split(":"):
        case ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["stop"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        case ["exit"]:
            os._exit(1)
        case ["block", seconds]:
            time.sleep(float(seconds))
        case ["raise", what]:
            raise error(what)
        case _:
            _refuse(f"no action {action!r}")


def error(what: str) -> Exception:
    """As the driver's error reaches our code, with its SQLSTATE; or a built-in exception by name."""
    if not (len(what) == 5 and what.isalnum() and what[0].isdigit()):
        made: Exception = getattr(builtins, what)("failpoint")
        return made
    origin = psycopg.errors.lookup(what)("failpoint")
    kind = next(getattr(sqlalchemy.exc, base.__name__) for base in type(origin).__mro__ if hasattr(sqlalchemy.exc, base.__name__))
    raised: Exception = kind(None, None, origin)
    return raised


def arm(plan: str) -> None:
    """Every point is in place, and those of the plan fail."""
    for one in filter(None, plan.split(",")):
        place, _, nth = one.partition("@")
        point, _, action = place.partition(":")
        if point not in POINTS or not action:
            _refuse(f"no point {one!r}")
        _armed[point, int(nth or 1)] = action
    for point, (owner, name, when) in POINTS.items():
        setattr(owner, name, _passing(getattr(owner, name), point, when))


def _passing(original: Callable[..., Any], point: str, when: str) -> Callable[..., Any]:
    @wraps(original)
    async def asynchronous(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            pass_by(point)
        result = await original(*args, **kwargs)
        if when == "after":
            pass_by(point)
        return result

    @wraps(original)
    def synchronous(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            pass_by(point)
        result = original(*args, **kwargs)
        if when == "after":
            pass_by(point)
        return result

    return asynchronous if inspect.iscoroutinefunction(original) else synchronous


def poison(word: str) -> None:
    complete = OpenAICompatible.complete

    @wraps(complete)
    async def deadly(self: OpenAICompatible, request: Any, **kwargs: Any) -> Any:
        if word in json.dumps(request.messages):
            _say("poisoned")
            os.kill(os.getpid(), signal.SIGKILL)
        return await complete(self, request, **kwargs)

    _replace(OpenAICompatible, "complete", deadly)


def no_fence() -> None:
    """A settle no longer looks whether the job is still its own, and still running."""
    _rewrite(ledger, "_SETTLE", {
        "JOIN ending e ON e.id = j.id AND e.fence = j.fence\n    WHERE": "JOIN ending e ON e.id = j.id\n    WHERE",
        "AND j.state = 'running' ORDER BY": "ORDER BY",
        "JOIN ending e ON e.id = h.id AND e.fence = h.fence": "JOIN ending e ON e.id = h.id",
        "RETURNING j.id, j.fence, j.state": "RETURNING j.id, e.fence, j.state",
    })  # fmt: skip


def no_claim_guard() -> None:
    """A message that comes twice is obeyed twice: what runs already is claimed as well."""
    _rewrite(ledger, "_CLAIM", {"AND state = 'queued' AND run_at": "AND state IN ('queued', 'running') AND run_at"})


def no_rescue() -> None:
    """The leader leaves the jobs of the dead where they are."""

    async def nobody(*_: Any, **__: Any) -> list[Any]:
        return []

    _replace(keeper, "rescue", nobody)


def no_dispatch_ttl() -> None:
    """Nobody looks for messages that were lost, or whether Redis has forgotten them."""

    async def nothing(_: Any) -> None:
        pass

    _replace(Dispatcher, "look_for_losses", nothing)
    _replace(Dispatcher, "_check_epoch", nothing)


def no_intent() -> None:
    """Calls get their row when they are settled, not before the request leaves."""
    settle, open_calls = attempt.settle, calls.open_calls

    async def late(db: Any, settlements: Sequence[ledger.Settlement], **how: Any) -> Any:
        booked = [(one, call) for one in settlements for call in one.calls]
        rows = [calls.NewCall(id=c.id, job_id=s.job_id, fence=s.fence, provider=c.provider, model=c.model) for s, c in booked]
        await open_calls(db, rows)
        return await settle(db, settlements, **how)

    async def never(_: Any, wanted: Sequence[calls.NewCall]) -> Sequence[bool]:
        return [True] * len(wanted)

    _rewrite(ledger, "_CLAIM", {"ON f.chain = c.chain WHERE": "ON f.chain = c.chain WHERE false AND"})
    _replace(attempt, "settle", late)
    _replace(wiring, "open_calls", never)


def no_heartbeat_fence() -> None:
    """A worker that cannot say that it lives goes on calling."""
    _replace(Keeper, "may_call", lambda _self, _claim: True)


def no_deathwatch() -> None:
    """Who lives is told by how old the heartbeat is, as the clock has it."""

    def by_age(self: DeathWatch, heartbeats: Mapping[Any, datetime], _now_s: float) -> Mapping[Any, datetime]:
        oldest = datetime.now(UTC) - timedelta(seconds=self._ttl_s)
        return {worker: beat for worker, beat in heartbeats.items() if beat < oldest}

    _replace(DeathWatch, "look", by_age)


def no_spool() -> None:
    """What Postgres would not take before a worker had to stop is gone with it."""
    _replace(spool, "write", lambda directory, _settlements: Path(directory))


def no_patience() -> None:
    """At a shutdown Postgres gets a moment to take what was paid for."""
    _replace(attempt, "LAST_SETTLE_S", 0.5)


SABOTAGES: Mapping[str, Callable[[], None]] = {
    "fence": no_fence,
    "claim_guard": no_claim_guard,
    "rescue": no_rescue,
    "dispatch_ttl": no_dispatch_ttl,
    "intent": no_intent,
    "heartbeat_fence": no_heartbeat_fence,
    "deathwatch": no_deathwatch,
    "spool": no_spool,
    "patience": no_patience,
}


def _rewrite(module: Any, name: str, fragments: Mapping[str, str]) -> None:
    """The statement without its guard; each fragment has to be there, once."""
    sql = getattr(module, name).text
    for fragment, instead in fragments.items():
        if sql.count(fragment) != 1:
            _refuse(f"{module.__name__}.{name} has {sql.count(fragment)} times: {fragment}")
        sql = sql.replace(fragment, instead)
    setattr(module, name, text(sql))


def _replace(owner: Any, name: str, instead: Any) -> None:
    if not hasattr(owner, name):
        _refuse(f"{owner.__name__} has no {name}")
    setattr(owner, name, instead)


def _refuse(why: str) -> NoReturn:
    raise SystemExit(f"failing: {why}")


def _say(words: str) -> None:
    os.write(2, f"{words}\n".encode())  # past Celery, which makes log lines of what is printed


def prepare(environment: Mapping[str, str]) -> None:
    """The process fails as this environment says."""
    for name in filter(None, environment.get("BACKSTOP_SABOTAGE", "").split(",")):
        if name not in SABOTAGES:
            _refuse(f"no guard {name!r}; there are: {', '.join(SABOTAGES)}")
        SABOTAGES[name]()
        _say(f"off {name}")
    if word := environment.get("BACKSTOP_POISON"):
        poison(word)
    arm(environment.get("BACKSTOP_FAILPOINT", ""))


prepare(os.environ)
