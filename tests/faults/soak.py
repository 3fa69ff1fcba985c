"""A soak: a fleet under load for minutes, under faults from a seed, and then the oracle. `make soak`, or with options

    PYTHONPATH=tests python tests/faults/soak.py --seed 7 --short --plot soak.svg

Exit code 1 when anything that was promised did not hold; then the seed and the history file are named.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from checker import Verdict, table, to_json
from crew import Crew
from crowd import Crowd
from figures import Figures, figures, machine
from lab import Lab, a_lab
from nemesis import FULL, SHORT, TTL_S, Nemesis, Size, plan
from server import Servers
from timeline import draw

from worker.cli.screen import plain, progress, say, show_table

LIMIT_S = 900.0  # hard
ROUNDS_S = 780.0  # no further round begins after that
RECOVERY_S = TTL_S + 2
QUIET_S = 120.0  # for what is left to do once nothing is broken any more
BOUNDS = {"rss": 400 * 2**20, "api_rss": 400 * 2**20, "redis_bytes": 50 * 2**20, "redis_depth": 1_000}
ENVIRONMENT = {
    "BACKSTOP_HEARTBEAT_S": "0.5",
    "BACKSTOP_HEARTBEAT_TTL_S": str(TTL_S),
    "BACKSTOP_BULK_SLOTS": "24",
    "BACKSTOP_INTERACTIVE_SLOTS": "8",
    "BACKSTOP_PACK_SIZE": "8",
}
SCRIPT = {
    "providers": {
        "first": {
            "model": "sim-small",
            "latency": {"median_ms": 300, "p99_ms": 1200},
            "faults": [
                {"kind": "status", "status": 500, "rate": 0.02},
                {"kind": "status", "status": 429, "rate": 0.005, "retry_after_s": 0.2},
                {"kind": "reset", "rate": 0.01},
                {"kind": "truncate", "rate": 0.003},
                {"kind": "malformed", "rate": 0.003},
                {"kind": "hang", "rate": 0.003, "seconds": 6},
                {"kind": "slow", "rate": 0.005, "seconds": 3},
            ],
        },
        "second": {
            "model": "sim-medium",
            "latency": {"median_ms": 300, "p99_ms": 1200},
            "price": {"input": "2", "output": "6"},
            "faults": [{"kind": "status", "status": 503, "rate": 0.02}, {"kind": "empty", "rate": 0.005}],
        },
        "third": {"model": "sim-large", "latency": {"ms": 400}, "price": {"input": "5", "output": "15"}},
    }
}
CONFIG = {f"providers.{name}": {"timeout_s": 2.5} for name in SCRIPT["providers"]}

Tell = Callable[[int, int, str], None]  # rounds played, jobs accepted, what happens now


@dataclass(frozen=True, slots=True)
class Outcome:
    size: Size
    figures: Figures
    verdicts: list[Verdict]

    def broken(self, *, timed: bool = True) -> list[str]:
        """The promises that were not kept; `timed`: those about seconds as well, which a starved machine may break."""
        found = self.figures
        worst_s = found["recovery, worst, s"]
        return [
            *(f"{one.name}: {one.detail}" for one in self.verdicts if not one.ok),
            *(f"{name}: {found[name]}" for name in _NONE if found[name]),
            *([f"recovery took {worst_s} s, promised are {RECOVERY_S:g} s"] if timed and (worst_s or 0) > RECOVERY_S else []),
            *([f"only {found[name]} {name}, planned were {most}" for name, most in _planned(self.size) if timed and found[name] < most]),
        ]


_NONE = (
    "workers that ended by themselves",
    "lost",
    "double results",
    "off the books",
    "billed twice where nobody was killed",
    "replies no API may give",
)


def _planned(size: Size) -> list[tuple[str, int]]:
    return [("rounds", size.rounds), ("jobs accepted", size.jobs)]


async def soak(lab: Lab, seed: int, size: Size, tell: Tell) -> Outcome:
    """Played to its end, whatever it came to. Raises AssertionError when jobs do not end, TimeoutError after `LIMIT_S`."""
    began_s = time.monotonic()
    rounds = plan(seed, size)
    lab.history.note("soak", seed=seed, rounds=[[strike.fault for strike in strikes] for strikes in rounds])
    tell(0, 0, "the workers come")
    async with asyncio.timeout(LIMIT_S), Crew(lab, size.workers) as crew, asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(crew.look_after())
        crowd = Crowd(lab, crew, seed, stops_s=began_s + ROUNDS_S)
        load = tasks.create_task(crowd.work(size.jobs))
        nemesis, played = Nemesis(lab, crew), 0
        while played < len(rounds) and time.monotonic() < began_s + ROUNDS_S:
            tell(played, crowd.accepted, ", ".join(strike.fault for strike in rounds[played]))
            await nemesis.play(rounds[played])
            played += 1
        tell(played, crowd.accepted, "what is left to do")
        crowd.calm.set()
        await load
        await lab.all_ended(QUIET_S)
        watching.cancel()
    found = await figures(lab, TTL_S)
    found |= {"rounds": played, "duration, s": round(time.monotonic() - began_s)}
    return Outcome(size, found, await lab.verdicts(bounds=BOUNDS))


@click.command()
@click.option("--seed", type=int, help="The same seed, the same plan. Default: any.")
@click.option("--jobs", type=click.IntRange(1), help="At least so many.")
@click.option("--short", is_flag=True, help="A minute instead of minutes.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Figures and verdicts, as JSON.")
@click.option("--out", type=click.Path(path_type=Path), help="For history, bill and logs. Default: a new temporary directory.")
@click.option("--plot", type=click.Path(path_type=Path), help="Jobs per second and all faults, as SVG.")
def main(seed: int | None, jobs: int | None, short: bool, json_file: Path | None, out: Path | None, plot: Path | None) -> None:
    """Thousands of jobs through workers that are killed, and servers that are broken, by a plan from a seed."""
    seed = random.randrange(10**6) if seed is None else seed
    size = SHORT if short else FULL
    size = replace(size, jobs=jobs or size.jobs)
    out = out or Path(tempfile.mkdtemp(prefix="backstop-soak-"))
    out.mkdir(parents=True, exist_ok=True)
    say(f"seed {seed}, at least {size.jobs} jobs, {size.rounds} rounds; history in {out}")
    leave(asyncio.run(_run(seed, size, out, json_file, plot)), seed, out)


def leave(broken: Sequence[str], seed: int, out: Path) -> None:
    """Ends the process with exit code 1 where something was broken, and says where to look."""
    for one in broken:
        say(f"broken: {one}")
    if broken:
        say(f"seed {seed}; the history is {out / 'history.jsonl'}")
        sys.exit(1)


async def _run(seed: int, size: Size, out: Path, json_file: Path | None, plot: Path | None) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="backstop-soak-") as place:
        servers = Servers(Path(place))
        try:
            async with a_lab(out, servers, script=SCRIPT | {"seed": seed}, config=CONFIG, environment=ENVIRONMENT) as lab:
                return await _played(lab, seed, size, json_file, plot)
        finally:
            servers.end()


async def _played(lab: Lab, seed: int, size: Size, json_file: Path | None, plot: Path | None) -> list[str]:
    try:
        with progress("rounds") as bar:
            task = bar.add_task("", total=size.rounds, note="")

            def tell(rounds: int, jobs: int, now: str) -> None:
                bar.update(task, completed=rounds, note=f"{jobs} jobs; {now}")
                if bar.disable:
                    say(f"round {rounds + 1} of {size.rounds}, {jobs} jobs accepted: {now}")

            outcome = await soak(lab, seed, size, tell)
    except TimeoutError:
        return [f"it did not end within {LIMIT_S:g} s"]
    except (AssertionError, ExceptionGroup) as error:
        return ["".join(traceback.format_exception(error))]
    about = {"seed": seed, **await machine(lab)}
    table(outcome.verdicts)
    print()
    show_table(["figure", "value"], [(name, _words(value)) for name, value in {**outcome.figures, **about}.items()])
    if json_file:
        document = {**about, "figures": outcome.figures, "verdicts": to_json(outcome.verdicts), "broken": outcome.broken()}
        _write(json_file, json.dumps(plain(document), ensure_ascii=False, indent=2) + "\n")
    if plot:
        _write(plot, await draw(lab, seed, sound=not outcome.broken()))
    if broken := outcome.broken():
        for kept in ("jobs", "provider_calls", "results", "workers"):
            lines = await lab.rows(f"SELECT row_to_json(t)::text AS line FROM {kept} t ORDER BY 1")
            _write(lab.directory / f"{kept}.jsonl", "".join(f"{row.line}\n" for row in lines))
    return broken


def _write(file: Path, content: str) -> None:
    file.write_text(content, "utf-8")


def _words(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items()) or "none"
    return value


if __name__ == "__main__":
    main()
