"""A value that fits a JSON Schema, chosen by seed and with an eye on the ticket.

Known: `type`, `properties`, `required`, `items`, `prefixItems`, `enum`, `const`, `anyOf`, `oneOf`, `allOf`, local
`$ref`, the bounds of numbers, strings and arrays, `uniqueItems`, common `format`s. Others are not looked at.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Mapping
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Any

_WORD = re.compile(r"[^\W\d_]{3,}")
_BETWEEN = str.maketrans(dict.fromkeys(string.punctuation, " "))
_DEEP = 6  # from here on only what is required
_BOTTOM = 24
_FORMATS = {
    "date": "2025-01-15",
    "date-time": "2025-01-15T09:30:00Z",
    "time": "09:30:00Z",
    "email": "service.desk@example.com",
    "uri": "https://example.com/articles/1",
    "uuid": "5f0c7b52-6a3e-4d59-9a34-0d6f1a2b3c4d",
}


def words(text: str) -> list[str]:
    """The plain words of a text, letters only: nothing in them that a template, a spreadsheet or HTML could run."""
    return [word[:24] for word in _WORD.findall(text)]


@lru_cache(maxsize=4096)
def _label_words(label: str) -> frozenset[str]:
    return frozenset(word for word in label.lower().translate(_BETWEEN).split() if len(word) > 2)


def fit(schema: Any, *, ticket: str, sentence: str, seed: int) -> Any:
    """The value. `sentence` fills the strings; of an enum, what shares most words with `ticket` is taken."""
    return _Fitting(schema, ticket, sentence, seed).value(schema, "", 0)


class _Fitting:
    def __init__(self, root: Any, ticket: str, sentence: str, seed: int) -> None:
        self._root = root
        self._ticket = ticket
        self._sentence = sentence
        self._salt = blake2b(f"{seed}/{ticket}".encode(errors="replace"), digest_size=16).digest()

    @cached_property
    def _ticket_words(self) -> set[str]:
        return set(self._ticket.lower().translate(_BETWEEN).split())

    def value(self, schema: Any, path: str, depth: int) -> Any:
        if not isinstance(schema, Mapping) or depth > _BOTTOM:
            return None
        schema = self._resolved(schema, path, depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._choice(schema["enum"], path)
        match _type(schema):
            case "object":
                return self._object(schema, path, depth)
            case "array":
                return self._array(schema, path, depth)
            case "integer" | "number" as kind:
                return self._number(schema, path, whole=kind == "integer")
            case "boolean":
                return self._pick(2, path) == 1
            case "null":
                return None
        return self._string(schema)

    def _resolved(self, schema: Mapping[str, Any], path: str, depth: int) -> Mapping[str, Any]:
        """The schema with its references followed and one branch of its alternatives merged in."""
        for _ in range(_BOTTOM):
            if "$ref" in schema:
                schema = _merged(_without(schema, "$ref"), self._target(schema["$ref"]))
            elif "allOf" in schema:
                whole = _without(schema, "allOf")
                for part in schema["allOf"]:
                    whole = _merged(whole, part)
                schema = whole
            elif "anyOf" in schema or "oneOf" in schema:
                key = "anyOf" if "anyOf" in schema else "oneOf"
                schema = _merged(_without(schema, key), self._branch(schema[key], path, depth))
            else:
                break
        return schema

    def _branch(self, branches: list[Any], path: str, depth: int) -> Any:
        nulls = [branch for branch in branches if branch == {"type": "null"}]
        others = [branch for branch in branches if branch != {"type": "null"}]
        if depth >= _DEEP:
            plain = nulls or [branch for branch in others if "$ref" not in branch]
            return (plain or others)[0]
        return others[self._pick(len(others), path)] if others else nulls[0]

    def _target(self, reference: str) -> Any:
        found = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            found = found.get(name, {}) if isinstance(found, Mapping) else {}
        return found

    def _object(self, schema: Mapping[str, Any], path: str, depth: int) -> dict[str, Any]:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        names = required if depth >= _DEEP else list(dict.fromkeys([*properties, *required]))
        return {name: self.value(properties.get(name, {}), f"{path}/{name}", depth + 1) for name in names}

    def _array(self, schema: Mapping[str, Any], path: str, depth: int) -> list[Any]:
        first: list[Any] = schema.get("prefixItems", [])
        items = schema.get("items", {})
        least = schema.get("minItems", 0)
        usual = 0 if items is False else len(first) if first else 2
        wanted = min(max(least, least if depth >= _DEEP else usual), schema.get("maxItems", math.inf))
        found: list[Any] = []
        seen: set[str] = set()
        for at in range(int(wanted) * (20 if schema.get("uniqueItems") else 1)):
            item = self.value(first[at] if at < len(first) else items, f"{path}/{at}", depth + 1)
            mark = json.dumps(item, sort_keys=True)
            if len(found) < wanted and not (schema.get("uniqueItems") and mark in seen):
                found.append(item)
                seen.add(mark)
        return found

    def _number(self, schema: Mapping[str, Any], path: str, *, whole: bool) -> int | float:
        low, high = _bounds(schema)
        step = schema.get("multipleOf", 1 if whole else None)
        if step is None:
            exact = low + (high - low) * (self._pick(99, path) + 1) / 100
            return round(exact, 2) if low < round(exact, 2) < high else exact
        first, last = math.ceil(low / step), math.floor(high / step)
        first += first * step == schema.get("exclusiveMinimum")
        last -= last * step == schema.get("exclusiveMaximum")
        chosen = (first + self._pick(max(1, last - first + 1), path)) * step
        return int(chosen) if whole else chosen

    def _string(self, schema: Mapping[str, Any]) -> str:
        text = _FORMATS.get(schema.get("format", ""), self._sentence)
        return text[: schema.get("maxLength")].ljust(schema.get("minLength", 0), ".")

    def _choice(self, values: list[Any], path: str) -> Any:
        shared = [sum(map(len, self._ticket_words & _label_words(str(value)))) for value in values]
        best = [value for value, score in zip(values, shared, strict=True) if score == max(shared)]
        return best[self._pick(len(best), path)]

    def _pick(self, count: int, path: str) -> int:
        digest = blake2b(path.encode(errors="replace"), digest_size=8, key=self._salt).digest()
        return int.from_bytes(digest, "big") % count


def _type(schema: Mapping[str, Any]) -> str:
    named = schema.get("type")
    if isinstance(named, list):
        return next((kind for kind in named if kind != "null"), "null")
    if isinstance(named, str):
        return named
    signs = {
        "properties": "object",
        "required": "object",
        "items": "array",
        "prefixItems": "array",
        "minItems": "array",
    }
    signs |= dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), "number")
    return next((kind for key, kind in signs.items() if key in schema), "string")


def _bounds(schema: Mapping[str, Any]) -> tuple[float, float]:
    """Of a number; where the schema leaves one open, a span of 100 from zero."""
    lows = [schema[key] for key in ("minimum", "exclusiveMinimum") if key in schema]
    highs = [schema[key] for key in ("maximum", "exclusiveMaximum") if key in schema]
    if lows:
        low = max(lows)
        return low, min(highs) if highs else low + 100
    high = min(highs) if highs else 100
    return min(0, high - 100) if high <= 0 else 0, high


def _merged(schema: Mapping[str, Any], part: Any) -> Mapping[str, Any]:
    if not isinstance(part, Mapping):
        return schema
    merged = {**schema, **part}
    if "properties" in schema and "properties" in part:
        merged["properties"] = {**schema["properties"], **part["properties"]}
    if "required" in schema and "required" in part:
        merged["required"] = list(dict.fromkeys([*schema["required"], *part["required"]]))
    return merged


def _without(schema: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return {name: value for name, value in schema.items() if name != key}
