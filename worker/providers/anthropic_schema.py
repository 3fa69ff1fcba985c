"""A JSON Schema as Anthropic's structured outputs take it: stricter in its objects, without most bounds.

The answer is held against the job's own schema afterwards (worker.validation), so bounds may be left out on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_KEPT = frozenset({
    "type", "properties", "required", "items", "enum", "const", "anyOf", "allOf", "$ref", "$defs", "definitions",
    "description", "title", "default",
})  # fmt: skip
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid")
_DEEPEST = 64


def closed(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema with every object closed and what is not known there left out; None when it cannot be said so.

    That is: objects of any keys, `not`, `if`, several in `allOf`, lists by position, references out of it, nesting past 64 levels.
    """
    return _closed(schema, _DEEPEST)


def _closed(schema: Any, levels: int) -> dict[str, Any] | None:
    if not isinstance(schema, dict) or not levels or not schema.keys().isdisjoint({"not", "if", "prefixItems", "patternProperties"}):
        return None
    if not str(schema.get("$ref", "#")).startswith("#"):
        return None
    found: dict[str, Any] = {}
    for name, value in schema.items():
        fitting = _keyword("anyOf" if name == "oneOf" else name, value, levels - 1)
        if fitting is None:
            return None
        found |= fitting
    if "properties" in schema or "object" in _types(schema):
        more = schema.get("additionalProperties", True)
        if not isinstance(more, bool) or (more and not found.get("properties")) or _has_objects(found.get("anyOf", ())):
            return None
        found["additionalProperties"] = False
    return found


def _has_objects(parts: Iterable[Mapping[str, Any]]) -> bool:
    """Closed twice, an object could have no key at all."""
    return any("properties" in part or "$ref" in part for part in parts)


def _keyword(name: str, value: Any, levels: int) -> dict[str, Any] | None:
    """What becomes of one keyword; {}: nothing, None: the schema cannot be said."""
    if name in ("properties", "$defs", "definitions"):
        inner = {key: _closed(part, levels) for key, part in value.items()} if isinstance(value, dict) else {"": None}
        return None if None in inner.values() else {name: inner}
    if name in ("anyOf", "allOf"):
        parts = [_closed(part, levels) for part in value] if isinstance(value, list) else [None]
        return None if None in parts or (name == "allOf" and len(parts) > 1) else {name: parts}
    if name == "items":
        item = _closed(value, levels)
        return None if item is None else {name: item}
    if name in _KEPT or (name == "format" and value in _FORMATS) or (name == "minItems" and value in (0, 1)):
        return {name: value}
    return {}


def _types(schema: Mapping[str, Any]) -> list[Any]:
    stated = schema.get("type")
    return stated if isinstance(stated, list) else [stated]
