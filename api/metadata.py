"""What clients keep with a job."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

from pydantic import AfterValidator

from worker.batchlines import LARGEST_METADATA

_MAX_DEPTH = 32


def _check(value: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for JSON that Postgres would refuse, or that is larger or nests deeper than anyone means to."""
    nested: list[tuple[Any, int]] = [(value, 0)]
    while nested:
        item, depth = nested.pop()
        match item:
            case dict() | list() if depth >= _MAX_DEPTH:
                raise ValueError(f"nests deeper than {_MAX_DEPTH} levels")
            case dict():
                nested += [(part, depth + 1) for pair in item.items() for part in pair]
            case list():
                nested += [(part, depth + 1) for part in item]
            case float() if not math.isfinite(item):
                raise ValueError("holds NaN or Infinity, which JSON does not have")
            case str() if "\x00" in item or any("\ud800" <= character <= "\udfff" for character in item):
                raise ValueError("holds a NUL or half a surrogate pair, which cannot be stored")
    if len(json.dumps(value)) > LARGEST_METADATA:
        raise ValueError(f"is larger than {LARGEST_METADATA} characters of JSON")
    return value


Metadata = Annotated[dict[str, Any], AfterValidator(_check)]
