"""`python -m bench.throughput [--quick] [--json]`: jobs per second, CPU per job and what people wait for.

All contestants in one run, their rounds interleaved, on the same Postgres and Valkey, against the same stub without
latency; medians of the rounds. The machine is shared with whatever else runs on it, so read the ratios.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import click

from bench import processes
from worker.embedded.servers import running
from worker.errors import BackstopError
from worker.schema import upgrade

CONFIG = """
[providers.stub]
base_url = "{url}"
model = "stub"
price = {{ input = "0.28", output = "0.42" }}
[chains.default]
providers = ["stub"]
"""
PACKAGES = ("celery", "sqlalchemy", "psycopg", "redis", "httpx", "aiohttp", "uvloop")


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int
    jobs: int  # of Backstop, each round
    usual_jobs: int
    asked: int
    tickets: int


FULL = Size(rounds=3, jobs=10_000, usual_jobs=300, asked=300, tickets=100_000)
QUICK = Size(rounds=1, jobs=3_000, usual_jobs=60, asked=60, tickets=15_000)


@click.command()
@click.option("--quick", is_flag=True, help="One small round of each, under a minute.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON.")
@click.option("--only", type=click.Choice(["throughput", "people"]), help="Only that half.")
def main(quick: bool, as_json: bool, only: str | None) -> None:
    """Backstop beside a usual Celery worker: jobs per second, CPU per job, and what people wait for."""
    if not Path("/proc/self/stat").exists():
        raise click.ClickException("this benchmark reads /proc, so it runs on Linux only")
    with tempfile.TemporaryDirectory(prefix="backstop-bench-") as name:
        place = Path(name)
        place.chmod(0o755)  # root's Postgres runs as nobody
        try:
            figures = _measured(QUICK if quick else FULL, place, only)
        except (BackstopError, TimeoutError, RuntimeError) as error:
            raise click.ClickException(f"{error}\n{_last_words(place)}") from None
    click.echo(json.dumps(figures, indent=2) if as_json else table(figures))


def _measured(size: Size, place: Path, only: str | None) -> dict[str, Any]:
    with running(place / "data") as servers:
        asyncio.run(upgrade(servers.database_url))
        os.environ.update(
            DATABASE_URL=servers.database_url,
            REDIS_URL=servers.redis_url,
            USUAL_REDIS_URL=f"{servers.redis_url.removesuffix('/0')}/1",
            BACKSTOP_DATA=str(place / "data"),
            BACKSTOP_CONFIG=str(place / "backstop.toml"),
            BACKSTOP_LOG_FORMAT="json",
        )
        with processes.stub(os.environ) as url:
            (place / "backstop.toml").write_text(CONFIG.format(url=url))
            os.environ["STUB_URL"] = url
            figures: dict[str, Any] = {"machine": machine(), "size": asdict(size)}
            if only != "people":
                figures["contestants"] = _throughput(size, place, os.environ)
            if only != "throughput":
                from bench import people

                _say(f"people: {size.asked} questions idle, then beside {size.tickets:,} tickets")
                figures["people"] = asdict(people.measure(size.asked, size.tickets, place, os.environ))
            figures["warnings"] = _warnings(place)
            return figures


def _throughput(size: Size, place: Path, env: Mapping[str, str]) -> dict[str, dict[str, float]]:
    from bench import contestants, usual  # they read the environment

    usual.create_tables()
    turns: dict[str, Callable[[], contestants.Round]] = {
        "Backstop, one bulk worker": lambda: contestants.backstop(size.jobs, place, env),
        "usual, prefork 2": lambda: contestants.usual(size.usual_jobs, 2, place, env),
        "usual, prefork 8": lambda: contestants.usual(size.usual_jobs, 8, place, env),
        "usual, prefork 8, shared client": lambda: contestants.usual(2 * size.usual_jobs, 8, place, env, shared_client=True),
    }
    rounds: dict[str, list[contestants.Round]] = {name: [] for name in turns}
    for number in range(1, size.rounds + 1):
        for name, turn in turns.items():
            rounds[name].append(turn())
            last = rounds[name][-1]
            _say(f"round {number}: {name}: {last.jobs_per_s:.0f} jobs/s, {last.cpu_ms:.2f} ms CPU/job")
    return {
        name: {key: median(getattr(one, key) for one in found) for key in ("jobs_per_s", "cpu_ms", "rss_mb")}
        for name, found in rounds.items()
    }


def table(figures: Mapping[str, Any]) -> str:
    """The figures as a person reads them."""
    lines = [f"{key:<10} {value}" for key, value in figures["machine"].items()]
    if "contestants" in figures:
        lines += ["", *_contestants(figures["contestants"])]
    if "people" in figures:
        lines += ["", *_people(figures["people"])]
    lines += ["", f"warnings in the workers' logs: {figures['warnings'] or 'none'}"]
    return "\n".join(lines)


def _contestants(found: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
    best = next(iter(found.values()))
    lines = [f"{'zero latency':<34}{'jobs/s':>9}{'CPU ms/job':>12}{'RSS MB':>8}{'Backstop is':>13}"]
    for name, one in found.items():
        ratio = "" if one is best else f"{best['jobs_per_s'] / one['jobs_per_s']:.1f}x"
        lines.append(f"{name:<34}{one['jobs_per_s']:>9.0f}{one['cpu_ms']:>12.2f}{one['rss_mb']:>8.0f}{ratio:>13}")
    return lines


def _people(found: Mapping[str, Any]) -> Sequence[str]:
    lines = [f"{'one interactive job':<34}{'added ms: median':>18}{'p99':>8}{'in the ledger: median':>24}{'p99':>8}"]
    for name, key in (("idle", "idle"), ("beside bulk", "busy")):
        one = found[key]
        (added, added_p99), (settled, settled_p99) = one["added_ms"], one["settled_ms"]
        lines.append(f"{name:<34}{added:>18.1f}{added_p99:>8.1f}{settled:>24.1f}{settled_p99:>8.1f}")
    load = found["load"]
    early_mb, most_mb = load["producer_mb"]
    return [
        *lines,
        f"bulk meanwhile: {found['bulk_jobs_per_s']:.0f} jobs/s, {found['bulk_left']:,} left at the end",
        f"enqueue: {load['tickets']:,} tickets at {load['rows_per_s']:,.0f}/s; producer {early_mb:.0f} MB early on, "
        f"{most_mb:.0f} MB at most; Redis {load['redis_mb']:.1f} MB at most",
    ]


def machine() -> dict[str, str]:
    """What it ran on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start",
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }


def _warnings(place: Path) -> dict[str, int]:
    """Of Backstop's own logs, by event."""
    counted: Counter[str] = Counter()
    for log in (*place.glob("worker-*.log"), place / "api.log"):
        for line in log.read_text("utf-8", "replace").splitlines() if log.exists() else ():
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("level") in ("warning", "error", "critical"):
                counted[event["event"][:80]] += 1
    return dict(counted)


def _last_words(place: Path) -> str:
    return "\n".join(f"{log.name}: {log.read_text('utf-8', 'replace').strip()[-300:]}" for log in place.glob("*.log"))


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
