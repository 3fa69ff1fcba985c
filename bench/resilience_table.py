"""The figures of a run as a person reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TITLES = {
    "single": "one provider",
    "naive": "naive tutorial client",
    "litellm": "LiteLLM Router, defaults",
    "litellm-tuned": "LiteLLM Router, tuned",
    "ordered": "Backstop",
    "hedge": "Backstop, hedge",
}
_WIDE = 26
BUSY_MS = 100  # a process that begins jobs so late has not been given the CPU that it needs


def table(figures: Mapping[str, Any]) -> str:
    found = figures["contestants"]
    lines = [f"{key:<10} {value}" for key, value in figures["machine"].items()]
    return "\n".join([*lines, "", *_main(found), "", *_shares(found), "", *_scenes(found), "", *_notes(figures)])


def _main(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    heads = ("answered", "95 % above", "good seconds", "worst seed", "added p50", "p99 ms", "wasted/1000", "$/1000", "degraded")
    yield f"{'independent outages':<{_WIDE}}" + "".join(f"{head:>13}" for head in heads)
    for name, one in found.items():
        answered, bound = one["shares"]["0%"]
        cells = (
            _percent(answered), _percent(bound), _percent(one["good_seconds"]), _percent(one["worst_seed"]),
            f"{one['added_p50_ms']:.0f}", f"{one['added_p99_ms']:,.0f}", f"{one['wasted_per_1000']:.1f}", one["usd_per_1000"],
            f"{one['degraded']:.1%}",
        )  # fmt: skip
        yield f"{TITLES[name]:<{_WIDE}}" + "".join(f"{cell:>13}" for cell in cells)


def _shares(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    betas = list(next(iter(found.values()))["shares"])
    yield f"{'answered, common cause':<{_WIDE}}" + "".join(f"{beta:>13}{'95 % above':>13}" for beta in betas)
    for name, one in found.items():
        yield f"{TITLES[name]:<{_WIDE}}" + "".join(f"{_percent(share):>13}" for beta in betas for share in one["shares"][beta])


def _scenes(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    heads = ("dropped to next p99", "in call rows p99", "dead host, worst job", "in call rows", "full outage: req/job", "open to skipped")
    yield f"{'scenes, ms':<{_WIDE}}" + "".join(f"{head:>22}" for head in heads)
    for name, one in found.items():
        ours = "own_failovers" in one
        cells = (
            _count(one["failover_p99_ms"], one["failovers"]),
            _count(one["own_failover_p99_ms"], one["own_failovers"]) if ours else "",
            f"{one['dead_host_ms']:,.0f}",
            _number(one["own_dead_host_ms"]) if ours else "",
            f"{one['dark_requests_per_job']:.2f}",
            _number(one["lag_ms"]) if ours else "",
        )
        yield f"{TITLES[name]:<{_WIDE}}" + "".join(f"{cell:>22}" for cell in cells)


def _notes(figures: Mapping[str, Any]) -> Iterator[str]:
    dark = figures["dark"]
    yield f"nobody was well when a job came: {dark['independent']:.4%} independent, {dark['common']:.2%} when every outage is common"
    late = {TITLES[name]: one["begun_late_p99_ms"] for name, one in figures["contestants"].items()}
    if max(late.values()) > BUSY_MS:
        words = ", ".join(f"{name} {ms:,.0f} ms" for name, ms in late.items() if ms > BUSY_MS)
        yield f"THIS MACHINE WAS TOO BUSY, so these figures are no measure: jobs were begun late (p99) by {words}"
    yield "CPU seconds: " + ", ".join(f"{name} {spent:.0f}" for name, spent in figures["cpu_s"].items())


def _percent(value: float) -> str:
    return f"{value:.3%}"


def _count(value: float | None, of: int) -> str:
    return f"{_number(value)} of {of}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
