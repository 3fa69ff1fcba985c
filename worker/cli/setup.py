"""Commands that look at the set-up: db, doctor."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext

import click

from worker import events, schema
from worker.cli.screen import json_option, say, show_json, show_table
from worker.doctor import Finding, examine
from worker.embedded.servers import provided
from worker.errors import BackstopError
from worker.settings import read_settings


@click.group()
def db() -> None:
    """Brings the database schema up to date, or checks it."""


@db.command("upgrade")
@json_option
def db_upgrade(as_json: bool) -> None:
    """The schema is at the newest version; safe to run again, and from many places at once."""
    with provided(read_settings()) as settings:
        assert settings.database_url is not None
        asyncio.run(schema.upgrade(settings.database_url))
    show_json({"ok": True}) if as_json else say("the schema is up to date")


@db.command("check")
@json_option
def db_check(as_json: bool) -> None:
    """Says whether the schema is the one this code needs; exit 1 when not."""
    with provided(read_settings()) as settings:
        assert settings.database_url is not None
        lacking = asyncio.run(schema.pending(settings.database_url))
    if as_json:
        show_json({"ok": lacking is None, "problem": lacking})
    if lacking:
        raise BackstopError("" if as_json else lacking)
    if not as_json:
        click.echo("the schema is up to date")


@click.command()
@click.option("--repair", is_flag=True, help="Mend what is stuck in the ledger, where that is safe.")
@json_option
def doctor(repair: bool, as_json: bool) -> None:
    """Looks at everything that must be right before jobs can run, and at what is stuck; says how to mend what is not right.

    Exit 1 while anything is not. May run at any time, beside any number of workers: what is healthy is not touched.
    """
    settings = read_settings()
    # What goes wrong is said in words by the findings.
    events.configure(settings.model_copy(update={"log_level": "critical"}))
    with provided(settings) if repair else nullcontext():
        findings = asyncio.run(examine(settings, mend=repair))
    if as_json:
        show_json(findings)
    else:
        show_table(("", "what", "found", "remedy"), ((_mark(f), f.name, f.detail, f.remedy) for f in findings))
    if not all(finding.ok for finding in findings):
        raise BackstopError("")


def _mark(finding: Finding) -> str:
    if not finding.ok:
        return "failed"
    return "mended" if finding.mended else "ok"
