"""Commands that put jobs in: chat, enqueue."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import click

from worker import reads, template, tickets
from worker.batchlines import parse
from worker.cli.fleet import somebody_works
from worker.cli.look import batch_now, export, follow, say_batch
from worker.cli.screen import job_json, json_option, money, plain, progress, say, show_json
from worker.cli.session import with_ledger
from worker.config import Config, load
from worker.errors import BackstopError, PartlyFailed, UsageError, WaitTimedOut
from worker.job import ChatRequest
from worker.settings import Settings, read_settings
from worker.submit import Batch, NewJob, Row, add_rows, close_batch, open_batch, submit
from worker.template import Template
from worker.tickets import Source, Ticket
from worker.views import BatchView
from worker.waiting import Endings
from worker.wiring import Connections


@click.command()
@click.argument("text")
@click.option("--chain", default="default", show_default=True, help="Chain, provider or model to ask.")
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(0, 86_400),
    default=30.0,
    show_default=True,
    help="Seconds to wait for the answer; 0 prints the job's id.",
)
@json_option
def chat(text: str, chain: str, wait_s: float, as_json: bool) -> None:
    """Asks TEXT (or stdin, as -) and prints the answer."""
    if math.isnan(wait_s):
        raise UsageError("--wait: expected a number of seconds")
    settings = read_settings()
    load(settings.config).chain(chain)
    words = sys.stdin.read() if text == "-" else text
    if not words.strip():
        raise UsageError("there is nothing to ask: give a TEXT, or - and the text on stdin")
    job = NewJob(request=ChatRequest([{"role": "user", "content": words}]), chain=chain)

    async def ask(open_: Connections) -> None:
        if wait_s == 0:
            submitted = await submit(open_.db, open_.publish, job)
            show_json({"id": submitted.job_id}) if as_json else click.echo(submitted.job_id)
            return
        async with Endings(open_.db, open_.redis) as endings, somebody_works(open_, settings):
            submitted = await submit(open_.db, open_.publish, job)
            await endings.wait([submitted.job_id], wait_s)
            await _show_answer(open_, submitted.job_id, wait_s, as_json)

    with_ledger(ask)


async def _show_answer(open_: Connections, job_id: UUID, wait_s: float, as_json: bool) -> None:
    view = await reads.job(open_.db, job_id)
    assert view is not None
    if as_json:
        show_json(job_json(view))
    elif view.answer is not None:
        click.echo(view.answer.content or plain(view.answer.tool_calls))
        say(f"({view.answer.provider}, {view.answer.model}, {money(view.cost_usd)} USD, {view.calls} call(s))")
    if not view.ended:
        raise WaitTimedOut(f"no answer within {wait_s:g} s; it goes on: backstop job {job_id}")
    if view.answer is None:
        raise BackstopError(f"job {job_id} {view.state}: {(view.error or {}).get('message', '')}; see backstop job {job_id}")
    if view.lacking:
        raise PartlyFailed(f"nobody gave a full answer, this one is degraded: {view.answer.degraded}")


@click.command()
@click.argument("file")
@click.option("--prompt", "prompt", type=click.Path(path_type=Path), help="Template (TOML) that makes a prompt of each ticket.")
@click.option("--chain", default="default", show_default=True, help="Chain, provider or model to ask.")
@click.option("--batch", "name", help="Name of the batch; the same name and file go on where they broke off.")
@click.option("--id-column", help="Column whose value identifies a row in the results.")
@click.option("--wait", is_flag=True, help="Wait until every job has ended.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the results there (.csv or .jsonl); implies --wait.")
@click.option("--dry-run", is_flag=True, help="Read and check the whole file, show the first prompt, submit nothing.")
@json_option
def enqueue(
    file: str, prompt: Path | None, chain: str, name: str | None, id_column: str | None, wait: bool, out: Path | None,
    dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Submits every row of FILE (CSV, TSV, JSONL, gzipped or not; - is stdin) as a bulk job.

    OpenAI batch lines are taken as they are; everything else goes through a template.
    """
    settings = read_settings()
    configured = load(settings.config)
    configured.chain(chain)
    asking = template.load(prompt) if prompt else template.DEFAULT
    shape = _shape_of(out)
    with tickets.open_tickets(file) as source:
        _check_columns(source, asking, prompt, id_column, shape)
        rows = rows_of(source, asking, configured, chain, id_column)
        if dry_run:
            _dry_run(source, rows, as_json)
            return
        batch_name = name or _name_of(file)
        made_of = [Path(file).name, plain(asking), chain, id_column]

        async def load_all(open_: Connections) -> None:
            batch = await open_batch(open_.db, batch_name, fingerprint=made_of, columns=source.columns, fields=asking.fields)
            await load_batch(open_, batch, rows, source)
            if not (wait or out):
                view = await batch_now(open_.db, batch.id)
                show_json(view) if as_json else say_batch(view)
                say(f"watch it with: backstop watch {batch_name}")
                return
            view = await _ended(open_, settings, batch)
            if out and shape:
                await export(open_, view, out, shape)
                say(f"results: {out}")
            show_json(view) if as_json else say_batch(view)
            if view.lacking:
                raise PartlyFailed(f"{view.lacking} of {view.total} have no full answer: backstop results {batch_name}")

        with_ledger(load_all)


async def _ended(open_: Connections, settings: Settings, batch: Batch) -> BatchView:
    try:
        async with somebody_works(open_, settings) as children:
            return await follow(open_, batch.id, children.check)
    except asyncio.CancelledError:
        say(f"\nthe jobs of batch {batch.name} stay queued for the next worker: backstop watch {batch.name}, or cancel {batch.name}")
        raise


def _shape_of(out: Path | None) -> str | None:
    if out is None:
        return None
    if out.is_dir():
        raise UsageError(f"--out {out}: is a directory; name a file in it, as in {out / 'out.csv'}")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: there is no directory {out.parent}")
    return "jsonl" if out.suffix in (".jsonl", ".ndjson") else "csv"


def _check_columns(source: Source, asking: Template, prompt: Path | None, id_column: str | None, shape: str | None) -> None:
    if source.columns is None:
        if shape == "csv":
            raise UsageError("--out: OpenAI batch lines have no columns for a CSV; name a .jsonl file")
        if prompt:
            raise UsageError(f"{source.name} holds OpenAI batch lines, which carry their own prompts: leave out --prompt")
        return
    template.check(asking, source.columns)
    if id_column and id_column not in source.columns:
        raise UsageError(f"--id-column: {source.name} has no column {id_column!r}; there are: {', '.join(source.columns)}")


def rows_of(source: Source, asking: Template, configured: Config, chain: str, id_column: str | None) -> Iterator[Row]:
    for ticket in source:
        if ticket.line is not None:
            yield _from_line(ticket, configured, chain)
        else:
            yield _from_ticket(ticket, asking, chain, ticket.values.get(id_column) if id_column else None)


def _from_ticket(ticket: Ticket, asking: Template, chain: str, custom_id: str | None) -> Row:
    problem, request = ticket.problem, None
    if problem is None:
        try:
            request = asking.request(ticket)
        except ValueError as error:
            problem = str(error)
    return Row(ordinal=ticket.row, custom_id=custom_id, request=request, chain=chain, source=ticket.values, problem=problem)


def _from_line(ticket: Ticket, configured: Config, chain: str) -> Row:
    assert ticket.line is not None
    line = parse(ticket.line)
    problem = line.problem
    if line.model is not None and problem is None:
        try:
            configured.chain(line.model)
        except UsageError as error:
            problem = f"body.model: {error}"
    return Row(
        ordinal=ticket.row,
        custom_id=line.custom_id,
        request=None if problem else line.request,
        chain=line.model or chain,
        problem=problem,
    )


def _dry_run(source: Source, rows: Iterator[Row], as_json: bool) -> None:
    first: Row | None = None
    problems: list[tuple[int, str]] = []
    for row in rows:
        if row.request and first is None:
            first = row
        if row.problem:
            problems.append((row.ordinal, row.problem))
    counts = source.counts
    if as_json:
        example = first.request.to_json() if first and first.request else None
        show_json({"kind": source.kind, "encoding": source.encoding, "counts": counts, "unusable": len(problems), "first": example})
        return
    _say_read(source)
    for ordinal, problem in problems[:10]:
        say(f"row {ordinal} would fail: {problem}")
    if first and first.request:
        say(f"\nrow {first.ordinal} would be asked as:")
        for message in first.request.messages:
            click.echo(f"[{message['role']}]\n{message['content']}\n")
    say(f"nothing was submitted; {counts.rows - len(problems)} of {counts.rows} rows can be sent")


async def load_batch(open_: Connections, batch: Batch, rows: Iterator[Row], source: Source) -> None:
    """All rows are in, or said how many are when reading broke off; running the same command again goes on from there."""
    if batch.complete:
        say(f"batch {batch.name} is complete already: nothing was submitted again")
        return
    if batch.resumed:
        say(f"batch {batch.name} goes on where it broke off")
    added = 0
    try:
        with progress("submitting") as bar:
            task = bar.add_task("", total=None, note="")
            async for new in add_rows(open_.db, batch, rows):
                added += new
                bar.update(task, completed=added)
            bar.update(task, total=added)
    except BaseException:
        again = f"{added} rows were submitted before this; run it again with --batch {batch.name} to go on"
        say(again if added or batch.resumed else "nothing was submitted")
        raise
    await close_batch(open_.db, batch)
    _say_read(source)
    say(f"submitted {added} jobs as batch {batch.name}")


def _say_read(source: Source) -> None:
    counts, shape = source.counts, source.kind if source.delimiter is None else f"{source.kind} with {source.delimiter!r}"
    extra = f", {counts.empty} empty rows skipped" if counts.empty else ""
    extra += f", {counts.replaced} characters that cannot be stored replaced" if counts.replaced else ""
    say(f"read {counts.rows} rows of {source.name} ({shape}, {source.encoding}{extra})")


def _name_of(file: str) -> str:
    stem = "stdin" if file == "-" else Path(file).name.split(".")[0]
    return f"{stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
