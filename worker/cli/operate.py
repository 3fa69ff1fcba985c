"""Commands that change what runs: retry, cancel, providers, lanes, keys."""

from __future__ import annotations

from typing import Literal

import click
from sqlalchemy import text

from worker import keys as api_keys
from worker import reads
from worker.cli.look import batch_id_of, selecting, selection, target
from worker.cli.screen import json_option, money, say, show_json, show_table
from worker.cli.session import with_ledger
from worker.config import load
from worker.errors import NotFound, UsageError
from worker.intervene import cancel as cancel_jobs
from worker.intervene import requeue, requeueable
from worker.job import JobState, Lane
from worker.resilience.gate import Status
from worker.selection import ALL
from worker.settings import read_settings
from worker.views import BatchView, JobView
from worker.wiring import Connections


@click.command()
@click.argument("name", metavar="[BATCH|JOB]", required=False)
@selecting(JobState.FAILED, JobState.EXPIRED, JobState.CANCELLED)
@click.option("--dry-run", is_flag=True, help="Only count them.")
@json_option
def retry(
    name: str | None,
    state: str | None,
    code: str | None,
    batch_name: str | None,
    chain: str | None,
    since: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Queues what failed, was cancelled or expired once more, with fresh attempts; answered jobs stay as they are.

    A batch or a job, or all that the options select: `backstop retry --code all_providers_failed --since 2h`.
    See `backstop jobs --dead` for what there is.

    May pay twice: a call may have been billed although its answer never came. Always possible for the codes worker_died (workers
    died holding the job: it may do it again) and billing_unknown; `backstop job ID` shows their calls.
    """
    which = selection(state, code, chain, since)
    if name is None and batch_name is None and which == ALL:
        raise UsageError("retry what? Name a batch or a job, or select jobs: --state, --code, --batch, --chain, --since")
    if name is not None and batch_name is not None:
        raise UsageError(f"retry {name} or --batch {batch_name}? Name one of them")

    async def again(open_: Connections) -> None:
        found = await target(open_.db, name) if name is not None else None
        job_ids = [found.id] if isinstance(found, JobView) else None
        batch_id = found.id if isinstance(found, BatchView) else await batch_id_of(open_.db, batch_name)
        counts = await requeueable(open_.db, job_ids=job_ids, batch_id=batch_id, which=which)
        say(f"to be queued: {sum(counts.values())}" + "".join(f", {count} {ended}" for ended, count in counts.items()))
        if dry_run:
            show_json({"would_requeue": counts}) if as_json else click.echo("nothing was queued")
            return
        count = await requeue(open_.db, job_ids=job_ids, batch_id=batch_id, which=which)
        show_json({"requeued": count}) if as_json else click.echo(f"{count} queued once more")

    with_ledger(again)


@click.command()
@click.argument("name", metavar="BATCH|JOB")
@json_option
def cancel(name: str, as_json: bool) -> None:
    """Cancels what has not ended: queued jobs at once, running ones within a heartbeat. An answer that comes first wins."""

    async def stop(open_: Connections) -> None:
        found = await target(open_.db, name)
        batch = isinstance(found, BatchView)
        done = await cancel_jobs(open_.db, batch_id=found.id) if batch else await cancel_jobs(open_.db, job_ids=[found.id])
        if as_json:
            show_json(done)
        else:
            click.echo(f"{done.cancelled} cancelled, {done.flagged} running ones told to stop")

    with_ledger(stop)


@click.command()
@click.argument("action", type=click.Choice(["open", "close", "reset"]), required=False)
@click.argument("name", required=False)
@json_option
def providers(action: Literal["open", "close", "reset"] | None, name: str | None, as_json: bool) -> None:
    """The health of every provider; or: open NAME (ask it no more), close NAME (ask it whatever happens), reset NAME."""
    configured = load(read_settings().config)
    if action and not name:
        raise UsageError(f"{action} which provider? One of: {', '.join(configured.providers)}")
    if action and name not in configured.providers:
        raise NotFound(f"no provider {name!r}; there are: {', '.join(configured.providers)}")

    async def look(open_: Connections) -> None:
        if action and name:
            wanted: Literal["open", "closed", "reset"] = "closed" if action == "close" else action
            status = await open_.gates.force(name, wanted)
            show_json(status) if as_json else click.echo(f"{name} is {status.state}")
            return
        statuses = await open_.gates.status(list(configured.providers))
        if any(status.local for status in statuses):
            say("Redis does not answer: what the workers know of the providers is not known here")
        today = {row.provider: row for row in await reads.providers_today(open_.db)}
        if as_json:
            show_json([{"breaker": status, "today": today.get(status.provider)} for status in statuses])
            return
        rows = []
        for status in statuses:
            day = today.get(status.provider)
            figures = (day.calls, day.failed, day.p50_ms, day.p95_ms, money(day.cost_usd)) if day else (0, 0, None, None, "0")
            again = f"{status.retry_after_s:.0f} s" if status.retry_after_s else None
            rows.append((status.provider, status.health, status.state, again, status.reason, _load(status), *figures))
        titles = ("provider", "health", "breaker", "asked again in", "why", "load", "calls today", "failed", "p50 ms", "p95 ms", "USD")
        show_table(titles, rows)

    with_ledger(look, configured)


def _load(status: Status) -> str:
    """Calls in flight, and what its limits leave now."""
    left = ((status.requests_left, "requests left"), (status.tokens_left, "tokens left"))
    said = [f"{status.in_flight} in flight", *(f"{count} {what}" for count, what in left if count is not None)]
    return ", ".join([*said, f"rate at {status.rate_multiplier:.0%}"] if status.rate_multiplier < 1 else said)


_LANES = text("""
SELECT l.name, l.paused, count(j.id) FILTER (WHERE j.state = 'queued') AS queued, count(j.id) FILTER (WHERE j.state = 'running') AS running
FROM lanes l LEFT JOIN jobs j ON j.lane = l.name AND j.state IN ('queued', 'running') GROUP BY l.name, l.paused ORDER BY l.name DESC
""")
_PAUSE = text("UPDATE lanes SET paused = :paused WHERE name = :name")


@click.command()
@click.argument("action", type=click.Choice(["pause", "resume"]), required=False)
@click.argument("name", type=click.Choice([lane.value for lane in Lane]), required=False)
@json_option
def lanes(action: str | None, name: str | None, as_json: bool) -> None:
    """The lanes and what waits in them; or: pause NAME (running jobs finish, no more are started), resume NAME."""
    if action and not name:
        raise click.UsageError(f"{action} which lane? One of: {', '.join(Lane)}")

    async def look(open_: Connections) -> None:
        async with open_.db.connect() as connection:
            if action:
                await connection.execute(_PAUSE, {"paused": action == "pause", "name": name})
            rows = (await connection.execute(_LANES)).mappings().all()
        if as_json:
            show_json([dict(row) for row in rows])
        else:
            show_table(
                ("lane", "state", "queued", "running"),
                ((r["name"], "paused" if r["paused"] else "open", r["queued"], r["running"]) for r in rows),
            )

    with_ledger(look)


@click.group()
def keys() -> None:
    """API keys: kept as hashes, shown once."""


@keys.command("create")
@click.argument("name")
@click.option("--tenant", default="default", show_default=True, help="Whose jobs the key submits and sees.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice([scope.value for scope in api_keys.Scope]),
    multiple=True,
    help="What the key may do; repeat it for several. Left out: everything.",
)
@click.option("--rpm", type=click.IntRange(1, api_keys.MOST_RPM), help="Requests it may make a minute. Left out: not limited.")
@json_option
def keys_create(name: str, tenant: str, scopes: tuple[str, ...], rpm: int | None, as_json: bool) -> None:
    """A new key, printed once."""
    chosen = [api_keys.Scope(scope) for scope in scopes or api_keys.Scope]

    async def create(open_: Connections) -> None:
        new = await api_keys.create(open_.db, name=name, tenant=tenant, scopes=chosen, rpm=rpm)
        if as_json:
            show_json({"secret": new.secret, "key": new.key})
        else:
            click.echo(new.secret)
            say("keep it: it is shown only this once")

    with_ledger(create)


@keys.command("list")
@json_option
def keys_list(as_json: bool) -> None:
    """All keys, by what may be shown of them."""

    async def look(open_: Connections) -> None:
        found = await api_keys.list(open_.db)
        if as_json:
            show_json(found)
        else:
            show_table(
                ("id", "name", "tenant", "key", "scopes", "rpm", "created", "last used", "revoked"),
                ((k.id, k.name, k.tenant, k.prefix, ",".join(k.scopes), k.rpm, k.created_at, k.last_used_at, k.revoked_at) for k in found),
            )

    with_ledger(look)


@keys.command("revoke")
@click.argument("which", metavar="ID|NAME")
@json_option
def keys_revoke(which: str, as_json: bool) -> None:
    """The key is refused from its next request on, for ever."""

    async def revoke(open_: Connections) -> None:
        key = await api_keys.revoke(open_.db, which)
        show_json(key) if as_json else click.echo(f"{key.name} ({key.prefix}…) is revoked")

    with_ledger(revoke)
