"""Commands that look at jobs: watch, results, jobs, job, costs."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from decimal import Decimal
from functools import reduce
from pathlib import Path
from uuid import UUID

import click
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import reads
from worker.cli.screen import Command, job_json, json_option, money, progress, say, show_json, show_table
from worker.cli.session import with_ledger
from worker.errors import NotFound, PartlyFailed, UsageError
from worker.export import ExportRow, replacing, write_csv, write_jsonl
from worker.job import JobState
from worker.reads import ago, uuid_or_none
from worker.selection import Selection
from worker.views import BatchView, CallView, CostKey, JobView
from worker.wiring import Connections

LOOK_S = 0.25
LOADING_S = 10.0  # a batch that is being submitted grows at least so often


async def batch_now(db: AsyncEngine, batch_id: UUID) -> BatchView:
    """The batch as it is now."""
    view = await reads.batch(db, batch_id)
    assert view is not None
    return view


async def follow(open_: Connections, batch_id: UUID, check: Callable[[], None] = lambda: None) -> BatchView:
    """The batch once all of its jobs have ended, with a bar until then. `check` may raise to give up."""
    with progress("answering ") as bar:
        task = bar.add_task("", total=None, note="")
        grew_s, total = time.monotonic(), -1
        while True:
            view = await batch_now(open_.db, batch_id)
            if view.total != total:
                grew_s, total = time.monotonic(), view.total
            if view.state == "loading" and view.unfinished == 0 and time.monotonic() - grew_s > LOADING_S:
                raise PartlyFailed(f"batch {view.name} is still being submitted, or that broke off: {view.total} rows so far")
            failed = view.failed + view.expired + view.cancelled
            note = f"[red]{failed} unanswered[/red]" if failed else ""
            bar.update(task, completed=view.total - view.unfinished, total=view.total, note=note)
            if view.state == "finished":
                return view
            check()
            await asyncio.sleep(LOOK_S)


async def target(db: AsyncEngine, name: str) -> BatchView | JobView:
    """The batch of that name or id, or the job of that id. Raises NotFound."""
    batch = await reads.batch(db, name)
    if batch is not None:
        return batch
    job_id = uuid_or_none(name)
    view = await reads.job(db, job_id) if job_id else None
    if view is None:
        raise NotFound(f"no batch or job {name!r}; see backstop jobs")
    return view


@click.command()
@click.argument("name", metavar="BATCH|JOB")
@json_option
def watch(name: str, as_json: bool) -> None:
    """Follows a batch or job until it has ended; exit 3 when something was not answered in full."""

    async def look(open_: Connections) -> None:
        found = await target(open_.db, name)
        if isinstance(found, BatchView):
            view = await follow(open_, found.id)
            show_json(view) if as_json else say_batch(view)
            if view.lacking:
                raise PartlyFailed("")
            return
        while not found.ended:
            await asyncio.sleep(LOOK_S)
            again = await reads.job(open_.db, found.id)
            assert again is not None
            found = again
        show_json(job_json(found)) if as_json else say_job(found)
        if found.lacking:
            raise PartlyFailed("")

    with_ledger(look)


@click.command()
@click.argument("name", metavar="BATCH|JOB")
@click.option("--format", "shape", type=click.Choice(["csv", "jsonl"]), help="Default: by the name of --out, else csv for tickets.")
@click.option("--out", type=click.Path(path_type=Path), help="A file instead of stdout: whole or not there.")
@json_option
def results(name: str, shape: str | None, out: Path | None, as_json: bool) -> None:
    """Writes what came out, failed jobs included; exit 3 while some have no full answer."""

    async def write(open_: Connections) -> None:
        found = await target(open_.db, name)
        if isinstance(found, JobView):
            show_json(job_json(found))
            if found.lacking:
                raise PartlyFailed("")
            return
        by_name = "jsonl" if as_json or (out and out.suffix in (".jsonl", ".ndjson")) or found.columns is None else "csv"
        await export(open_, found, out, shape or by_name)
        if out:
            say(f"results: {out}")
        if found.state == "loading":
            raise PartlyFailed(f"batch {found.name} is still being submitted, or that broke off: {found.total} rows so far")
        if found.lacking:
            raise PartlyFailed(f"{found.lacking} of {found.total} have no full answer")

    with_ledger(write)


async def export(open_: Connections, batch: BatchView, out: Path | None, shape: str) -> None:
    """All rows of the batch, in the order of its file, to `out` or stdout. Raises UsageError or BackstopError (disk full)."""
    rows = _rows(open_.db, batch.id)
    if shape == "csv" and batch.columns is None:
        raise UsageError(f"batch {batch.name} was made of OpenAI batch lines, which have no columns: use --format jsonl")
    if out is None:
        sys.stdout.reconfigure(encoding="utf-8", newline="")  # type: ignore[union-attr]
    if out is None and shape == "csv":
        await write_csv(rows, batch.columns or [], batch.fields, sys.stdout)
    elif out is None:
        await write_jsonl(rows, sys.stdout)
    else:
        with replacing(out) as file:
            await (write_csv(rows, batch.columns or [], batch.fields, file) if shape == "csv" else write_jsonl(rows, file))


async def _rows(db: AsyncEngine, batch_id: UUID) -> AsyncIterator[ExportRow]:
    after = -1
    while page := await reads.batch_results(db, batch_id, after):
        for row in page:
            yield row
        after = page[-1].ordinal or 0


def selecting(*states: JobState) -> Callable[[Command], Command]:
    """The options that name jobs by what they are; `selection` and `batch_id_of` make something of them."""
    options = (
        click.option("--state", type=click.Choice([state.value for state in states]), help="Only jobs in this state."),
        click.option("--code", help="Only jobs with this error code, as `backstop jobs --dead` shows it."),
        click.option("--batch", "batch_name", metavar="BATCH", help="Only jobs of this batch."),
        click.option("--chain", help="Only jobs of this chain."),
        click.option("--since", help="Only jobs that ended (or came, if they have not) so long ago or less: 30m, 2h, 7d."),
    )
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


def selection(state: str | None, code: str | None, chain: str | None, since: str | None) -> Selection:
    """Raises UsageError when `since` is no span of time."""
    return Selection(state=JobState(state) if state else None, code=code, chain=chain, since=None if since is None else ago(since))


async def batch_id_of(db: AsyncEngine, name: str | None) -> UUID | None:
    """The id of the batch that was named, None where none was. Raises NotFound."""
    if name is None:
        return None
    batch = await reads.batch(db, name)
    if batch is None:
        raise NotFound(f"no batch {name!r}")
    return batch.id


@click.command()
@selecting(*JobState)
@click.option("--dead", is_flag=True, help="What ended without an answer, counted by how and why.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1000))
@json_option
def jobs(
    state: str | None, code: str | None, batch_name: str | None, chain: str | None, since: str | None, dead: bool, limit: int, as_json: bool
) -> None:
    """Jobs, newest first; or, with --dead, why jobs were not answered."""
    which = selection(state, code, chain, since)

    async def look(open_: Connections) -> None:
        batch_id = await batch_id_of(open_.db, batch_name)
        if dead:
            letters = await reads.dead_letters(open_.db, which=which, batch_id=batch_id, limit=limit)
            show_json(letters) if as_json else show_table(
                ("state", "code", "providers", "jobs", "newest", "last ended"),
                ((d.state, d.code, d.providers, d.jobs, d.newest_id, d.last_at) for d in letters),
            )
            return
        found = await reads.jobs(open_.db, which=which, batch_id=batch_id, limit=limit)
        if as_json:
            show_json([job_json(one) for one in found])
            return
        show_table(
            ("job", "state", "code", "lane", "chain", "provider", "calls", "USD", "created"),
            ((j.id, j.state, (j.error or {}).get("code"), j.lane, j.chain, j.answer.provider if j.answer else None, j.calls,
              money(j.cost_usd), j.created_at) for j in found),
        )  # fmt: skip

    with_ledger(look)


@click.command()
@click.argument("job_id", metavar="ID")
@json_option
def job(job_id: str, as_json: bool) -> None:
    """One job: its state, its answer, and the timeline of the calls made for it."""

    async def look(open_: Connections) -> None:
        wanted = uuid_or_none(job_id)
        view = await reads.job(open_.db, wanted) if wanted else None
        if view is None:
            raise NotFound(f"no job {job_id!r}; see backstop jobs")
        calls = await reads.calls(open_.db, view.id)
        if as_json:
            show_json({"job": job_json(view), "calls": calls})
            return
        say_job(view)
        click.echo()
        show_table(
            ("at", "provider", "model", "attempt", "outcome", "HTTP", "code", "ms", "tokens in", "out", "USD", "billing"),
            (_timeline(view, call) for call in calls),
        )
        _say_estimated([call.cost_usd for call in calls if call.estimated])
        for reason in (view.error or {}).get("providers", []):
            click.echo(f"  {reason.get('provider')}: {reason.get('reason')} {reason.get('error_code') or ''}".rstrip())

    with_ledger(look)


def _timeline(view: JobView, call: CallView) -> tuple[object, ...]:
    at_s = ((call.started_at or call.opened_at) - view.created_at).total_seconds()
    return (
        f"+{at_s:.3f}s", call.provider, call.model, call.attempt, call.outcome or "under way", call.http_status, call.error_code,
        call.latency_ms, call.input_tokens, call.output_tokens, money(call.cost_usd),
        f"{call.billing}, estimated" if call.estimated else call.billing,
    )  # fmt: skip


def _say_estimated(costs: Sequence[Decimal | None]) -> None:
    """How much of a sum rests on tokens that we had to estimate; nothing when none does."""
    known = [cost for cost in costs if cost is not None]
    if costs:
        say(f"of which {money(sum(known, Decimal(0)) if known else None)} USD estimated: the provider counted no tokens")


@click.command()
@click.option("--by", type=click.Choice([key.value for key in CostKey]), default="provider", show_default=True)
@click.option("--since", default="7d", show_default=True, help="A number and m, h, d or w.")
@json_option
def costs(by: str, since: str, as_json: bool) -> None:
    """What the calls cost. `known` says how much of the possibly billed is: unknown costs are counted, never taken for zero."""
    begin = ago(since)

    async def look(open_: Connections) -> None:
        rows = await reads.costs(open_.db, CostKey(by), begin)
        if as_json:
            show_json(rows)
            return
        show_table(
            (by, "calls", "billed", "unknown", "tokens in", "out", "USD", "known"),
            ((r.key, r.calls, r.billed, r.unknown, r.input_tokens, r.output_tokens, money(r.cost_usd), f"{r.coverage:.1%}")
             for r in rows),
        )  # fmt: skip
        _say_estimated([row.estimated_usd for row in rows if row.estimated_calls])

    with_ledger(look)


def say_batch(view: BatchView) -> None:
    lesser = f" ({view.degraded} of them degraded)" if view.degraded else ""
    click.echo(
        f"batch {view.name} {view.state}: {view.succeeded} answered{lesser}, {view.failed} failed, {view.cancelled} cancelled, "
        f"{view.expired} expired, {view.unfinished} to go"
    )


def say_job(view: JobView) -> None:
    click.echo(f"job {view.id} {view.state} ({view.lane}, chain {view.chain}, {view.calls} calls, {money(view.cost_usd)} USD)")
    if view.answer is not None:
        click.echo(view.answer.content or "(tool calls)")
        if view.answer.degraded:
            say(f"(degraded: {view.answer.degraded})")
    elif view.error:
        click.echo(f"{view.error.get('code')}: {view.error.get('message')}")
