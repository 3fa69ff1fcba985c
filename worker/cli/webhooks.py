"""Webhooks: who is told when jobs and batches end, and what was sent."""

from __future__ import annotations

from uuid import UUID

import click

from worker import webhooks as told
from worker.cli.screen import json_option, say, show_json, show_table
from worker.cli.session import with_ledger
from worker.errors import NotFound
from worker.settings import read_settings
from worker.wiring import Connections


@click.group()
def webhooks() -> None:
    """Who is told when jobs and batches end."""


@webhooks.command("create")
@click.argument("url")
@click.option("--tenant", default="default", show_default=True, help="Whose jobs are told.")
@click.option(
    "--event", "events", type=click.Choice(told.EVENTS), multiple=True, help="What is told; repeat it for several. Left out: all of it."
)
@json_option
def webhooks_create(url: str, tenant: str, events: tuple[told.Event, ...], as_json: bool) -> None:
    """A new webhook; the secret that signs what is sent is printed once."""
    private = read_settings().webhooks_private

    async def create(open_: Connections) -> None:
        new = await told.create(open_.db, tenant=tenant, url=url, events=events or told.EVENTS, private=private)
        if as_json:
            show_json({"secret": new.secret, "webhook": new.webhook})
        else:
            click.echo(new.secret)
            say(f"keep it: it is shown only this once; the webhook is {new.webhook.id}")

    with_ledger(create)


@webhooks.command("list")
@json_option
def webhooks_list(as_json: bool) -> None:
    """All webhooks, the newest first."""

    async def look(open_: Connections) -> None:
        found = await told.listed(open_.db)
        if as_json:
            show_json(found)
        else:
            show_table(
                ("id", "tenant", "url", "events", "created", "failing since", "disabled"),
                ((w.id, w.tenant, w.url, ",".join(w.events), w.created_at, w.failing_since, w.disabled_at) for w in found),
            )

    with_ledger(look)


@webhooks.command("delete")
@click.argument("which", metavar="ID")
@json_option
def webhooks_delete(which: str, as_json: bool) -> None:
    """Nothing more is sent there, and its log is gone."""

    async def delete(open_: Connections) -> None:
        webhook = await told.one(open_.db, _id(which))
        await told.delete(open_.db, webhook.id)
        show_json(webhook) if as_json else click.echo(f"{webhook.url} is told nothing more")

    with_ledger(delete)


@webhooks.command("deliveries")
@click.argument("which", metavar="ID")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most.")
@json_option
def webhooks_deliveries(which: str, limit: int, as_json: bool) -> None:
    """What was and is to be sent there, the newest first."""

    async def look(open_: Connections) -> None:
        webhook = await told.one(open_.db, _id(which))
        found = await told.deliveries(open_.db, webhook.id, limit=limit)
        if as_json:
            show_json(found)
            return
        show_table(
            ("id", "event", "of", "state", "attempts", "status", "error", "created", "next"),
            (
                (d.id, d.event, d.subject_id, d.state, d.attempts, d.http_status, d.error_code, d.created_at, _next(d))
                for d in found
            ),
        )  # fmt: skip

    with_ledger(look)


def _next(delivery: told.Delivery) -> object:
    return delivery.run_at if delivery.state == "pending" else None


def _id(spelled: str) -> UUID:
    try:
        return UUID(spelled)
    except ValueError:
        raise NotFound(f"no webhook {spelled[:100]!r}: see `backstop webhooks list`") from None
