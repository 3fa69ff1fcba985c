"""`backstop config`: checks or shows backstop.toml."""

from __future__ import annotations

import click

from worker import config as configuration
from worker.cli.screen import json_option, say, show_json, show_table
from worker.errors import BackstopError
from worker.settings import read_settings
from worker.wiring import unpriced


@click.group()
def config() -> None:
    """Checks or shows backstop.toml."""


@config.command("check")
@json_option
def config_check(as_json: bool) -> None:
    """Reads the file and every key it names; says what is wrong and where."""
    settings = read_settings()
    checked = configuration.load(settings.config)
    missing = [*_missing_keys(checked), *unpriced(checked)]
    if as_json:
        show_json({"ok": not missing, "problems": missing, "without_effect": checked.not_yet(), "notes": checked.notes()})
    else:
        for name in checked.not_yet():
            say(f"note: {name} is read but has no effect in this version")
        for note in checked.notes():
            say(f"note: {note}")
    if missing:
        raise BackstopError("\n".join(missing))
    if not as_json:
        click.echo(f"{settings.config} is fine: {len(checked.providers)} providers, {len(checked.chains)} chains")


@config.command("show")
@json_option
def config_show(as_json: bool) -> None:
    """The configuration with all defaults filled in; keys stay names of variables."""
    checked = configuration.load(read_settings().config)
    if as_json:
        show_json(checked.model_dump(mode="json"))
        return
    show_table(
        ("provider", "base_url", "model", "key", "timeout_s", "max_retries", "price in/out per 1M"),
        (
            (name, p.base_url, p.model, p.api_key, p.timeout_s, p.max_retries,
             f"{p.price.input}/{p.price.output}" if p.price else "looked up")
            for name, p in checked.providers.items()
        ),
    )  # fmt: skip
    click.echo()
    show_table(("chain", "strategy", "providers"), ((n, c.strategy, " -> ".join(c.providers)) for n, c in checked.chains.items()))


def _missing_keys(checked: configuration.Config) -> list[str]:
    missing = []
    for name, provider in checked.providers.items():
        try:
            provider.key()
        except BackstopError as error:
            missing.append(f"providers.{name}.api_key: {error}")
    return missing
