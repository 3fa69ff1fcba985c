"""`python -m bench.resilience [--short] [--json] [--svg FILE]`: what jobs meet when providers misbehave.

Backstop beside a single provider, the naive tutorial client and LiteLLM's Router: the same jobs at the same moments, the same
weather at the same time, each contestant with simulated providers of its own and all in one run. docs/resilience.md has the
fault model and the figures.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from bench import processes, resilience_fleet, resilience_stage
from bench.faultmodel import dark_share
from bench.resilience_figures import contestant, quantile
from bench.resilience_plan import FULL, SHORT, WARM_UP, WARM_UP_S, Plan
from bench.resilience_stage import Rival
from bench.resilience_table import table
from bench.throughput import machine
from worker.embedded.servers import running
from worker.errors import BackstopError
from worker.schema import upgrade
from worker.settings import Settings
from worker.wiring import connections

RIVALS = ("single", "naive", "litellm", "litellm-tuned")
STRATEGIES = ("ordered", "hedge")
LEAD_S = 20.0  # from the last preparation to the world's second 0: the weather is told, everybody warms up


@click.command()
@click.option("--short", is_flag=True, help="Fewer and shorter worlds, about two minutes: to see that it works.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON.")
@click.option("--seed", default=0, show_default=True, help="Of the first world; the others count on from it.")
@click.option("--svg", type=click.Path(path_type=Path), help="Draw the most telling world into this file.")
@click.option("--rivals", type=click.Path(path_type=Path), default=Path(".venv-rivals/bin/python"), show_default=True)
@click.option("--hedge/--no-hedge", default=True, show_default=True, help='Also Backstop with strategy = "hedge".')
def main(short: bool, as_json: bool, seed: int, svg: Path | None, rivals: Path, hedge: bool) -> None:
    """Backstop beside others in bad weather: who answers, how late, at what price."""
    if not rivals.exists():
        raise click.ClickException(f"no {rivals}: `make bench-resilience` sets it up")
    plan = Plan.of(SHORT if short else FULL, seed)
    with tempfile.TemporaryDirectory(prefix="backstop-bench-") as name:
        place = Path(name)
        place.chmod(0o755)  # root's Postgres runs as nobody
        try:
            found = _played(plan, STRATEGIES if hedge else STRATEGIES[:1], rivals.absolute(), place)
        except (BackstopError, TimeoutError, RuntimeError) as error:
            raise click.ClickException(f"{error}\n{_last_words(place)}") from None
        if svg:
            (place / "run.json").write_text(json.dumps(found))
            subprocess.run([str(rivals), "-m", "bench.resilience_plot", str(place / "run.json"), str(svg)], check=True)
    figures = found["figures"]
    click.echo(json.dumps(figures, indent=2) if as_json else table(figures))


def _played(plan: Plan, strategies: Sequence[str], python: Path, place: Path) -> dict[str, Any]:
    with running(place / "data") as servers, resilience_stage.dead_host() as dead_url:
        asyncio.run(upgrade(servers.database_url))
        os.environ.update(
            DATABASE_URL=servers.database_url,
            REDIS_URL=servers.redis_url,
            BACKSTOP_DATA=str(place / "data"),
            BACKSTOP_CONFIG=str(place / "backstop.toml"),
            BACKSTOP_LOG_FORMAT="json",
        )
        names = [*RIVALS, *strategies]
        _say(f"{len(plan.played)} worlds, {len(plan.jobs(0)):,} jobs for each of {', '.join(names)}; {plan.length_s / 60:.0f} minutes")
        with resilience_stage.simulators(names, plan, place, os.environ) as urls:
            ours = {name: resilience_stage.base_urls(plan, urls[name], dead_url) for name in strategies}
            (place / "backstop.toml").write_text(resilience_fleet.configuration(ours))
            theirs = {name: urls[name] for name in RIVALS}
            with (
                resilience_fleet.workers(place, os.environ) as pids,
                resilience_stage.rivals(python, plan, theirs, dead_url, place) as rivals,
            ):
                return asyncio.run(_play(plan, strategies, urls, rivals, pids))


async def _play(plan: Plan, strategies: Sequence[str], urls: dict[str, str], rivals: dict[str, Rival], pids: list[int]) -> dict[str, Any]:
    async with connections(Settings()) as open_:
        await resilience_fleet.until_live(open_, pids)
        began = time.time() + LEAD_S
        for rival in rivals.values():
            rival.begin(began)
        await asyncio.gather(*(resilience_stage.let_weather_begin(url, plan, began) for url in urls.values()))
        if time.time() > began - WARM_UP_S:
            raise RuntimeError("this machine is too busy: the weather was not told in time")
        telling = asyncio.create_task(_tell(plan, began))
        await asyncio.gather(
            *(resilience_fleet.play(open_, plan, turn, strategy, began) for turn, strategy in enumerate(strategies, len(rivals)))
        )
        jobs = {name: await rival.ended(60) for name, rival in rivals.items()}
        telling.cancel()
        cpu_s = {name: rival.cpu_s() for name, rival in rivals.items()} | {"backstop": sum(map(processes.cpu_s, pids))}
        jobs |= {strategy: await resilience_fleet.ended(open_, strategy) for strategy in strategies}
        bills = {name: await resilience_stage.bill(url) for name, url in urls.items()}
        figures = {
            "machine": machine(),
            "size": asdict(plan.size),
            "dark": {kind: dark_share_of(plan, kind) for kind in ("independent", "common")},
            "cpu_s": cpu_s,
            "contestants": {name: contestant(plan, jobs[name], bills[name]) for name in (*RIVALS, *strategies)},
        }
        for strategy in strategies:
            gaps_ms, dead_ms = await resilience_fleet.failovers_ms(open_, strategy), await resilience_fleet.dead_host_ms(open_, strategy)
            figures["contestants"][strategy] |= {
                "own_failovers": len(gaps_ms),
                "own_failover_p99_ms": quantile(gaps_ms, 0.99) if gaps_ms else None,
                "own_dead_host_ms": max(dead_ms, default=None),
            }
        return {"figures": figures, "jobs": jobs, "worlds": _worlds(plan)}


def dark_share_of(plan: Plan, kind: str) -> float:
    """How often nobody at all was well when a job came, in worlds of this kind."""
    chosen = [world for world in plan.played if world.name.startswith(f"{kind}.")]
    counted = sum(len(world.arrivals) for world in chosen)
    return sum(dark_share(world.episodes, world.arrivals) * len(world.arrivals) for world in chosen) / counted


def _worlds(plan: Plan) -> dict[str, Any]:
    return {
        world.name: {"episodes": [one.to_json() for one in world.episodes], "arrivals": list(world.arrivals)}
        for world in plan.played
        if world.name != WARM_UP
    }


async def _tell(plan: Plan, began: float) -> None:
    while True:
        await asyncio.sleep(30)
        _say(f"{time.time() - began:.0f} of {plan.length_s:.0f} s; load {os.getloadavg()[0]:.1f}")


def _last_words(place: Path) -> str:
    return "\n".join(f"{log.name}: {log.read_text('utf-8', 'replace').strip()[-300:]}" for log in place.glob("*.log"))


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
