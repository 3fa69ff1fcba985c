"""`python -m bench.resilience_plot RUN.json OUT.svg`, in the environment of the rivals: one world, drawn as it went.

The weather of the three providers as bands over time; below, for each contestant, every job by when it came and how long it took.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from bench.faultmodel import PROVIDERS
from bench.resilience_figures import is_good
from bench.resilience_plan import DEADLINE_S
from bench.resilience_table import TITLES

INK, QUIET, ANSWERED, LOST = "#1f2933", "#7b8794", "#2b6cb0", "#d64545"
WELL = "#dcebe0"
LATE_S = 5
ILL = {"outage": "#b83232", "brown-out": "#f0b429", "429 storm": "#8662c7"}
_STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.edgecolor": "#cbd2d9", "axes.labelcolor": QUIET,
    "xtick.color": QUIET, "ytick.color": QUIET, "svg.hashsalt": "backstop", "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def main(run_file: str, out: str) -> None:
    run = json.loads(Path(run_file).read_text())
    with mpl.rc_context(_STYLE):
        drawn(run, telling(run)).savefig(out, metadata={"Date": None} if out.endswith(".svg") else None, dpi=110)


def telling(run: Mapping[str, Any]) -> str:
    """The world without common cause in which the contestants lost most, and of those equal, the worst weather."""

    def told(world: str) -> tuple[int, float]:
        lost = sum(not is_good(job) for jobs in run["jobs"].values() for job in jobs if job["world"] == world)
        return lost, sum(one["to_s"] - one["from_s"] for one in run["worlds"][world]["episodes"])

    worlds: list[str] = [world for world in run["worlds"] if world.startswith("independent.")]
    return max(worlds, key=told)


def drawn(run: Mapping[str, Any], world: str) -> Figure:
    names = [name for name in TITLES if name in run["jobs"]]
    figure = Figure(figsize=(11, 1.9 + 1.2 * len(names)), layout="constrained")
    weather, *panels = figure.subplots(1 + len(names), 1, sharex=True, height_ratios=[1.1, *[1.0] * len(names)])
    length_s = run["figures"]["size"]["length_s"]
    episodes, arrivals = run["worlds"][world]["episodes"], run["worlds"][world]["arrivals"]
    _weather(weather, episodes, length_s)
    for axes, name in zip(panels, names, strict=True):
        jobs = [job for job in run["jobs"][name] if job["world"] == world]
        _shade(axes, episodes)
        _jobs(axes, name, jobs, arrivals)
    panels[-1].set_xlabel("seconds of the run")
    figure.supylabel("from arrival to answer", fontsize=9, color=QUIET)
    weather.set_xlim(0, length_s)
    title = f"Three providers in bad weather, and who answered  (seed {world.rpartition('.')[2]})"
    weather.set_title(title, loc="left", fontsize=12, pad=26)
    weather.legend(handles=_legend(), loc="lower left", bbox_to_anchor=(0, 1.0), ncols=6, frameon=False, fontsize=8, borderaxespad=0.2)
    return figure


def _weather(axes: Axes, episodes: Sequence[Mapping[str, Any]], length_s: float) -> None:
    for row, name in enumerate(PROVIDERS):
        axes.broken_barh([(0, length_s)], (row - 0.38, 0.76), color=WELL)
        for illness, colour in ILL.items():
            spells = [
                (one["from_s"], one["to_s"] - one["from_s"]) for one in episodes if (one["provider"], one["illness"]) == (name, illness)
            ]
            axes.broken_barh(spells, (row - 0.38, 0.76), color=colour)
    axes.set_yticks(range(len(PROVIDERS)), PROVIDERS)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)


def _shade(axes: Axes, episodes: Sequence[Mapping[str, Any]]) -> None:
    """Where the first provider is out: there a contestant has to do something."""
    for one in episodes:
        if one["provider"] == PROVIDERS[0] and one["illness"] == "outage":
            axes.axvspan(one["from_s"], one["to_s"], color=ILL["outage"], alpha=0.08, linewidth=0)


def _jobs(axes: Axes, name: str, jobs: Sequence[Mapping[str, Any]], arrivals: Sequence[float]) -> None:
    good = [job for job in jobs if is_good(job)]
    lost = [job for job in jobs if not is_good(job)]
    axes.scatter([arrivals[job["n"]] for job in good], [job["took_s"] for job in good], s=5, color=ANSWERED, linewidths=0, alpha=0.75)
    axes.scatter(
        [arrivals[job["n"]] for job in lost], [DEADLINE_S] * len(lost), s=22, marker="x", color=LOST, linewidths=1.1, clip_on=False
    )
    axes.set_yscale("log")
    axes.set_ylim(0.08, DEADLINE_S * 1.25)
    axes.set_yticks([0.1, 1, 10])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    axes.minorticks_off()
    axes.grid(axis="y", color="#eef1f4", linewidth=0.8)
    axes.set_axisbelow(True)
    late = sum(job["took_s"] > LATE_S for job in good)
    words = f"{len(lost)} of {len(jobs)} jobs without answer, {late} answered after more than {LATE_S} s"
    axes.set_title(TITLES[name], loc="left", fontsize=9, fontweight="bold", pad=6)
    axes.set_title(words, loc="right", fontsize=8.5, color=LOST if lost else QUIET, pad=6)


def _legend() -> list[Patch | Line2D]:
    marks: list[Patch | Line2D] = [Patch(color=WELL, label="well"), *(Patch(color=colour, label=name) for name, colour in ILL.items())]
    marks.append(Line2D([], [], marker="o", linestyle="", markersize=3, color=ANSWERED, label="answered"))
    marks.append(Line2D([], [], marker="x", linestyle="", markersize=5, color=LOST, label="no answer"))
    return marks


if __name__ == "__main__":
    main(*sys.argv[1:])
