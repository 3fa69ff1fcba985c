"""What OpenAPI says of answers that come bit by bit: what a line is, or an event (`itemSchema`, as OpenAPI 3.2 has it)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

_REFERENCE = "#/components/schemas/{model}"


def documented_lines(line: type[BaseModel], example: str) -> dict[int | str, dict[str, Any]]:
    """A stream of NDJSON, each line of it a `line`."""
    content = {"application/x-ndjson": {"schema": {"type": "string"}, "itemSchema": _schema(line), "example": example}}
    return {200: {"description": f"Lines of JSON, each a {line.__name__}", "content": content}}


def documented_events(example: str, *told: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """A stream of events; the data of each is one of what is `told`."""
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": [_schema(one) for one in told]}}
    text = {"type": "string"}
    event = {"type": "object", "required": ["event", "data", "id"], "properties": {"event": text, "data": data, "id": text}}
    names = " or ".join(one.__name__ for one in told)
    stream = {"description": f"Events with a {names}", "content": {"text/event-stream": {"itemSchema": event, "example": example}}}
    return {200: stream, 204: {"description": "`Last-Event-ID` was the last one there is: do not ask again."}}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """Whole, for no route's answer is this model alone. What it is made of stands in the document: it is part of a job as well."""
    schema = model.model_json_schema(mode="serialization", ref_template=_REFERENCE)
    schema.pop("$defs", None)
    return schema
