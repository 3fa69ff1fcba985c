"""Commands that look at the set-up: db, doctor."""

from __future__ import annotations

import asyncio

import click

from worker import database
from worker.cli.screen import json_option, say, show_json, show_table
from worker.doctor import examine
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
        asyncio.run(database.upgrade(settings.database_url))
    show_json({"ok": True}) if as_json else say("the schema is up to date")


@db.command("check")
@json_option
def db_check(as_json: bool) -> None:
    """Says whether the schema is the one this code needs; exit 1 when not."""
    with provided(read_settings()) as settings:
        assert settings.database_url is not None
        lacking = asyncio.run(database.pending(settings.database_url))
    if as_json:
        show_json({"ok": lacking is None, "problem": lacking})
    if lacking:
        raise BackstopError("" if as_json else lacking)
    if not as_json:
        click.echo("the schema is up to date")


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Looks at everything that must be right before jobs can run, and says how to mend what is not."""
    findings = asyncio.run(examine(read_settings()))
    if as_json:
        show_json(findings)
    else:
        show_table(("", "what", "found", "remedy"), (("ok" if f.ok else "failed", f.name, f.detail, f.remedy) for f in findings))
    if not all(finding.ok for finding in findings):
        raise BackstopError("")
