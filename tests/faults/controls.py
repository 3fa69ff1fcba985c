"""Negative controls: a story that holds, and its invariant that goes red when the one guard it is about is switched off.

A suite that stays green without its guards proves nothing. `make controls` plays every story twice, with the guard and without it,
and exits with code 1 when a control stays green without it, or is not green with it.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from baseline import measured
from checker import Verdict
from lab import Lab, a_lab
from server import Servers

from worker.cli.screen import say, show_table
from worker.dispatch import queue_name
from worker.job import Lane

JOBS = 10
BULK = queue_name(Lane.BULK)
PATIENT = {"providers.first": {"timeout_s": 300}}  # only what a story does ends a call early
# Every heartbeat comes, and looks as it does after a long outage of Postgres.
AN_HOUR_OLD = """
CREATE FUNCTION an_hour_old() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN NEW.seen_at := NEW.seen_at - interval '1 hour'; RETURN NEW; END $$
"""
DEAD = "SELECT FROM workers WHERE pid = :pid AND state = 'dead'"


def answers_after(ms: int) -> Mapping[str, Any]:
    return {"providers": {"first": {"model": "sim", "latency": {"ms": ms}}}}


@dataclass(frozen=True, slots=True)
class Control:
    """`story(lab, broken)` is played with `broken` as the sabotage, or "" for none; `red`: the invariant that it violates without `guard`.

    `answer_ms`: how long the vendor takes, so that what the story does falls into it.
    """

    guard: str
    protects: str
    red: str
    story: Callable[[Lab, str], Awaitable[None]]
    answer_ms: int = 500
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def options(self) -> Mapping[str, Any]:
        """Of `a_lab`."""
        return {"script": answers_after(self.answer_ms), "config": PATIENT, "environment": self.environment}


async def played(lab: Lab, control: Control, broken: str) -> list[Verdict]:
    """The verdicts once the story is over; all jobs have ended, but for the broken ones that never would."""
    await control.story(lab, broken)
    if control.red != "I1" or not broken:
        await lab.all_ended()
    return await lab.verdicts()


async def asks_for_all(lab: Lab, broken: str, name: str = "first", **how: Any) -> Any:
    """A worker that holds all jobs there are, and the vendor is at work on each of them."""
    (worker,) = await lab.workers(name, broken=broken, **how)
    await lab.submit_batch(JOBS)
    await lab.until_asked(JOBS)
    return worker


async def a_ghost_settles(lab: Lab, broken: str) -> None:
    ghost = await asks_for_all(lab, broken, "ghost")
    ghost.freeze()
    await lab.workers("other", broken=broken)
    await ghost.outlived()
    await lab.until_ended(JOBS)
    ghost.thaw()
    await lab.until("SELECT WHERE NOT EXISTS (SELECT FROM provider_calls WHERE outcome = 'orphaned')")  # it has booked its own


async def a_message_comes_twice(lab: Lab, broken: str) -> None:
    await asks_for_all(lab, broken)
    await lab.deliver([row.id for row in await lab.rows("SELECT id FROM jobs")])
    if broken:
        await lab.until_asked(2 * JOBS)


async def a_worker_is_killed(lab: Lab, broken: str) -> None:
    killed = await asks_for_all(lab, broken, "killed")
    await killed.kill()
    await lab.workers("other", broken=broken)
    await lab.until(DEAD, pid=killed.pid)
    await lab.submit_batch(JOBS)
    await lab.until_ended(JOBS)  # whoever else there is


async def redis_forgets_what_waits(lab: Lab, broken: str) -> None:
    (leader,) = await lab.workers("leader", broken=broken, lanes=[Lane.INTERACTIVE])
    await lab.until_true(lambda: leader.said("leading"))
    await lab.submit_batch(JOBS)
    while not await lab.redis.llen(BULK):  # noqa: ASYNC110 - the event is another process's
        await asyncio.sleep(0.01)
    await lab.redis.flushall()
    await lab.workers("consumer", broken=broken, lanes=[Lane.BULK])
    if broken:  # twice the TTL later they wait as they did
        await lab.until(f"SELECT FROM jobs WHERE dispatched_at < now() - interval '2 s' HAVING count(*) = {JOBS}")


async def a_worker_is_killed_while_it_asks(lab: Lab, broken: str) -> None:
    killed = await asks_for_all(lab, broken, "killed")
    await killed.kill()
    await lab.workers("other", broken=broken)


async def a_worker_wakes_up_before_it_asks(lab: Lab, broken: str) -> None:
    frozen = await lab.worker("frozen", broken=broken, failing="after_claim:stop")
    await frozen.live()
    await lab.submit_batch(JOBS)
    await lab.until_true(lambda: frozen.said("failed after_claim"))
    await lab.workers("other", broken=broken)
    await lab.until_ended(JOBS)
    frozen.thaw()
    await lab.until_true(lambda: frozen.said("settle_refused"))


async def heartbeats_seem_old(lab: Lab, broken: str) -> None:
    worker = await asks_for_all(lab, broken)
    await lab.rows(AN_HOUR_OLD)
    await lab.rows("CREATE TRIGGER old BEFORE UPDATE OF seen_at ON workers FOR EACH ROW EXECUTE FUNCTION an_hour_old()")
    if broken:
        await lab.until(DEAD, pid=worker.pid)
    else:
        await lab.all_ended()
    await lab.rows("DROP TRIGGER old ON workers")


async def a_worker_stops_while_postgres_is_away(lab: Lab, broken: str) -> None:
    stopped = await asks_for_all(lab, ",".join(filter(None, ["patience", broken])), "stopped")
    await lab.postgres.stop("immediate")
    await lab.until_true(lambda: not any(totals.unfinished for totals in lab.bill.totals().values()))
    await lab.until_true(lambda: stopped.said("settle_waits"))
    stopped.terminate()
    await stopped.ended()
    await lab.postgres.start()
    await lab.workers("next", broken=broken)


CONTROLS: Sequence[Control] = [
    Control("fence", "a late settle is refused", "I2", a_ghost_settles),
    Control("claim_guard", "a message that comes twice is obeyed once", "I5", a_message_comes_twice, answer_ms=1500),
    Control("rescue", "what a dead worker held goes to others", "I1", a_worker_is_killed),
    Control(
        "dispatch_ttl", "messages that Redis lost are sent again", "I1", redis_forgets_what_waits,
        environment={"BACKSTOP_DISPATCH_TTL_S": "1"},
    ),
    Control("intent", "a call is on the books before it is made", "I4", a_worker_is_killed_while_it_asks),
    Control("heartbeat_fence", "who may be held dead asks nobody", "I5", a_worker_wakes_up_before_it_asks),
    Control("deathwatch", "old heartbeats bury nobody who lives", "I5", heartbeats_seem_old, answer_ms=8000),
    Control(
        "spool", "paid answers outlive a worker that stops without Postgres", "I5", a_worker_stops_while_postgres_is_away,
        environment={"BACKSTOP_DRAIN_S": "1"},
    ),
]  # fmt: skip


async def _violated(control: Control, servers: Servers, broken: str) -> list[Verdict]:
    with tempfile.TemporaryDirectory(prefix="backstop-control-") as place:
        async with a_lab(Path(place), servers, **control.options) as lab, asyncio.timeout(120):
            return [verdict for verdict in await played(lab, control, broken) if not verdict.ok]


def compared(servers: Servers, guards: Sequence[str]) -> bool:
    """Prints the table; whether every control was green with its guard and red without it. A story that breaks off is neither."""
    rows, good = [], True
    for control in CONTROLS:
        if guards and control.guard not in guards:
            continue
        words = []
        for broken in ("", control.guard):
            try:
                violated = asyncio.run(_violated(control, servers, broken))
            except (AssertionError, TimeoutError, ExceptionGroup) as error:
                good = False
                words.append(f"broke off: {type(error).__name__} {str(error)[:200]}")
                continue
            names = [one.name for one in violated]
            good = good and (control.red in names if broken else not names)
            words.append(", ".join(f"{one.name} ({one.figure})" for one in violated) or "green")
        say(f"{control.guard}: with it {words[0]}, without it {words[1]}")
        rows.append((control.guard, control.protects, *words))
    show_table(["guard", "what it guards", "with it", "without it"], rows)
    return good


@click.command()
@click.argument("guards", nargs=-1, type=click.Choice([control.guard for control in CONTROLS]))
@click.option("--baseline", is_flag=True, help="Plain Celery beside Backstop under the same kills instead.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the baseline's kills.")
@click.option("--jobs", type=click.IntRange(100), default=2000, show_default=True, help="Of the baseline.")
def main(guards: Sequence[str], baseline: bool, seed: int, jobs: int) -> None:
    """Every guard is switched off once, and the suite has to notice."""
    with tempfile.TemporaryDirectory(prefix="backstop-controls-") as place:
        servers = Servers(Path(place))
        try:
            good = measured(servers, seed, jobs) if baseline else compared(servers, guards)
        finally:
            with suppress(ProcessLookupError):
                servers.end()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
