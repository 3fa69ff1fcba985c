"""How commands show things: tables that are plain in a pipe, JSON when asked, progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, TypeVar
from uuid import UUID

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from worker.views import JobView

Command = TypeVar("Command", bound=Callable[..., Any])

_MARKS = {
    "succeeded": "green", "healthy": "green", "live": "green", "ok": "green", "closed": "green", "answered": "green",
    "running": "cyan", "queued": "cyan", "degraded": "yellow", "half_open": "yellow", "draining": "yellow",
    "failed": "red", "expired": "red", "dead": "red", "open": "red", "isolated": "red", "forced_open": "red",
}  # fmt: skip


def json_option(command: Command) -> Command:
    """`--json`: the same as one JSON document on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def show_json(value: Any) -> None:
    """One JSON document on stdout; decimals and ids as strings."""
    click.echo(json.dumps(plain(value), ensure_ascii=False, indent=2))


def job_json(view: JobView) -> dict[str, Any]:
    """A job in the words of the REST API."""
    answer = view.answer
    result = answer and {
        "content": answer.content, "finish_reason": answer.finish_reason, "provider": answer.provider, "model": answer.model,
        "usage": answer.usage, "degraded": answer.degraded,
    }  # fmt: skip
    shown = {"result": result, "cost_usd": None if view.cost_usd is None else money(view.cost_usd)}
    return {name: value for name, value in asdict(view).items() if name not in ("answer", "cost_usd", "tenant")} | shown


def plain(value: Any) -> Any:
    """`value` in JSON's own types."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Decimal):
        return money(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return str(value)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Aligned on a terminal; tab-separated with a header line in a pipe."""
    cells = [[_cell(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        for line in ([*columns], *cells):
            click.echo("\t".join(line))
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for position, name in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[position]) for row in cells)
        whole = bool(cells) and all(len(row[position]) == 36 for row in cells)  # ids are there to be copied
        table.add_column(name, justify="right" if numeric else "left", overflow="fold", no_wrap=whole)
    for row in cells:
        table.add_row(*(Text(cell, style=_MARKS.get(cell, "")) for cell in row))
    Console().print(table)


def money(usd: Decimal | None) -> str:
    """Plain digits, no exponent; `?` stands for not known."""
    if usd is None:
        return "?"
    return format(usd.normalize(), "f") if usd else "0"


def say(words: str) -> None:
    """A line for people, on stderr."""
    click.echo(words, err=True)


def progress(words: str) -> Progress:
    """A bar on a terminal, nothing in a pipe. `words` stands before it; a total may come later."""
    columns: list[ProgressColumn] = [
        TextColumn(words), BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    ]  # fmt: skip
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Decimal):
        return money(value)
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, float):
        return f"{value:.1f}"
    return str(value).replace("\t", " ").replace("\n", " ")


def _is_number(cell: str) -> bool:
    return cell in ("-", "?") or cell.replace(".", "", 1).replace("%", "").lstrip("-").isdigit()
