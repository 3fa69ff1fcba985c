"""Who answers in the lab, and the configuration that tells the workers of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from worker.simulator.script import Script
from worker.simulator.server import Simulator

SCRIPT = {"providers": {"first": {"model": "sim", "latency": {"ms": 50}}}}


def configuration(script: Script, simulator: Simulator, more: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of backstop.toml: all vendors at their own prices, asked in order; `more` adds to its sections or makes new ones."""
    sections: dict[str, dict[str, Any]] = {
        f"providers.{name}": {
            "base_url": simulator.base_url(name),
            "model": provider.model,
            "price": {"input": str(provider.price.input), "output": str(provider.price.output)},
        }
        for name, provider in script.providers.items()
    }
    sections["chains.default"] = {"providers": list(script.providers)}
    for name, body in more.items():
        sections.setdefault(name, {}).update(body)
    return _toml(sections)


def _toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [line for name, body in sections.items() for line in (f"[{name}]", *(f"{key} = {_value(body[key])}" for key in body))]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(part)}" for key, part in value.items()) + " }"
    return json.dumps(value)
