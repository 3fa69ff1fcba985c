"""The picture of a soak, as SVG for light and dark: jobs that ended per second, and under them every fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from lab import Lab

WIDTH, LEFT, RIGHT, TOP = 960, 132, 20, 74
CURVE = 190  # height of the curve
ROW = 26  # height of a row of marks
STYLE = """
:root { color-scheme: light dark; }
.paper { fill: #ffffff; } .ink { fill: #1f2328; } .soft { fill: #656d76; } .line { stroke: #d0d7de; } .band { fill: #f6f8fa; }
.curve { fill: none; stroke: #0969da; stroke-width: 1.6; stroke-linejoin: round; } .area { fill: #0969da; opacity: .13; }
.workers { fill: #cf222e; } .postgres { fill: #8250df; } .redis { fill: #bc4c00; } .vendors { fill: #1a7f37; }
text { font: 12px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; } .title { font-size: 16px; font-weight: 600; }
@media (prefers-color-scheme: dark) {
.paper { fill: #0d1117; } .ink { fill: #e6edf3; } .soft { fill: #8d96a0; } .line { stroke: #30363d; } .band { fill: #161b22; }
.curve { stroke: #58a6ff; } .area { fill: #58a6ff; }
.workers { fill: #ff7b72; } .postgres { fill: #bc8cff; } .redis { fill: #ffa657; } .vendors { fill: #56d364; }
}
"""
ROWS = {
    "kills": ("workers", "workers killed"),
    "workers": ("workers", "frozen, replaced"),
    "postgres": ("postgres", "Postgres"),
    "redis": ("redis", "Redis"),
    "vendors": ("vendors", "vendors"),
}
_KILLS = frozenset({"kill one worker", "kill two workers", "kill three workers", "kill all workers", "cut the power of all"})
_BOTH = "cut the power of all"  # stands in three rows

_ENDED = """
SELECT floor(extract(epoch FROM finished_at) - :began)::int AS second, count(*) AS n FROM jobs WHERE finished_at IS NOT NULL GROUP BY 1
"""

Mark = tuple[str, str, float, float]  # row, what it was, from when to when


async def draw(lab: Lab, seed: int, *, sound: bool) -> str:
    """The whole run, from the first job to the last; `sound`: nothing that was promised was broken."""
    events = lab.history.events()
    began_s = next(event["wall_s"] for event in events if event["what"] == "accepted")
    ended = Counter({row.second: row.n for row in await lab.rows(_ENDED, began=began_s)})
    return picture(ended, list(marks(events, began_s)), seed, sound=sound)


def marks(events: Sequence[Mapping[str, Any]], began_s: float) -> Iterator[Mark]:
    """Each fault in its row. Kills are moments, everything else has an end."""
    began: dict[str, tuple[float, str]] = {}
    for event in events:
        at_s = event["wall_s"] - began_s
        match event["what"]:
            case "killed":
                yield "kills", event["worker"], at_s, at_s
            case "flushed":
                yield "redis", "FLUSHALL", at_s, at_s
            case "fault":
                began[event["name"]] = (at_s, event["against"])
            case "healed":
                since_s, against = began.pop(event["name"])
                if event["name"] == _BOTH:
                    yield from ((row, _BOTH, since_s, min(at_s, since_s + event.get("for_s", 2))) for row in ("postgres", "redis"))
                elif event["name"] not in _KILLS and "flush" not in event["name"]:
                    yield against, event["name"], since_s, at_s


def picture(ended: Mapping[int, int], faults: Sequence[Mark], seed: int, *, sound: bool) -> str:
    """`ended`: how many jobs in each second. `faults`: see `marks`."""
    length_s = max([*ended, *(int(end_s) for *_, end_s in faults), 1]) + 1
    most = max([*ended.values(), 1])
    top = _step(most / 4) * 4
    across = (WIDTH - LEFT - RIGHT) / length_s
    floor = TOP + CURVE
    height = floor + 40 + ROW * len(ROWS) + 14
    title = f"{sum(ended.values()):,} jobs under {len(faults)} faults" + (": all ended, none twice" if sound else "")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}" rx="6"/>',
        f'<text class="ink title" x="20" y="32">{escape(title)}</text>',
        f'<text class="soft" x="20" y="52">jobs ended per second, and what was broken meanwhile (seed {seed})</text>',
        *_grid(top, length_s, across, floor),
        *_curve(ended, top, length_s, across, floor),
        *_rows(faults, across, floor + 40),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _grid(top: int, length_s: int, across: float, floor: int) -> Iterator[str]:
    for share in range(5):
        y = floor - CURVE * share / 4
        yield f'<line class="line" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
        yield f'<text class="soft" x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{top * share // 4}</text>'
    for second in range(0, length_s + 1, 60 if length_s > 120 else 10):
        words = f"{second // 60} min" if length_s > 120 else f"{second} s"
        yield f'<text class="soft" x="{LEFT + second * across:.1f}" y="{floor + 20}" text-anchor="middle">{words}</text>'


def _curve(ended: Mapping[int, int], top: int, length_s: int, across: float, floor: int) -> Iterator[str]:
    """A step for each second."""
    levels = [floor - CURVE * ended.get(second, 0) / top for second in range(length_s)]
    path = (
        f"M{LEFT} {floor}"
        + "".join(f"V{level:.1f}H{LEFT + (second + 1) * across:.1f}" for second, level in enumerate(levels))
        + f"V{floor}"
    )
    yield f'<path class="area" d="{path}Z"/>'
    yield f'<path class="curve" d="{path}"/>'


def _rows(faults: Sequence[Mark], across: float, top: int) -> Iterator[str]:
    for number, (row, (kind, words)) in enumerate(ROWS.items()):
        y = top + number * ROW
        count = sum(of == row for of, *_ in faults)
        yield f'<rect class="band" x="{LEFT}" y="{y}" width="{WIDTH - LEFT - RIGHT}" height="{ROW - 6}" rx="3"/>'
        yield f'<text class="ink" x="{LEFT - 10}" y="{y + 14}" text-anchor="end">{escape(words)} <tspan class="soft">{count}</tspan></text>'
        for of, what, from_s, to_s in faults:
            if of == row:
                x, width = LEFT + from_s * across, max((to_s - from_s) * across, 2.5)
                name = f"{what}, {from_s:.0f} s" + (f" to {to_s:.0f} s" if to_s > from_s else "")
                place = f'x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="{ROW - 12}" rx="1"'
                yield f'<rect class="{kind}" {place}><title>{escape(name)}</title></rect>'


def _step(least: float) -> int:
    """A round number that is at least so much."""
    return next(step * 10**power for power in range(9) for step in (5, 10, 15, 20, 25, 30, 40) if step * 10**power >= least)
