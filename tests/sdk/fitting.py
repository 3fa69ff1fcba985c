"""A hook of schemathesis: requests that fit the schema also fit what no schema can say."""

from typing import Any
from uuid import uuid4

import schemathesis


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Of requests that are to be accepted, the Idempotency-Key is a new one, and the body one that can be answered."""
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    for name in [name for name in case.headers or () if name.lower() == "idempotency-key"]:
        case.headers[name] = uuid4().hex
    if isinstance(case.body, dict) and case.media_type == "application/json":
        case.body = {name: _fitting(name, value) for name, value in case.body.items() if name != "response_format"}


def _fitting(name: str, value: Any) -> Any:
    if name == "chain":
        return "default"  # one that there is
    if name == "action":
        return "reset"  # with its breaker open the only provider would answer nobody
    # To JSON Schema 1.0 is an integer, to OpenAI and to us it is none.
    return int(value) if isinstance(value, float) and value.is_integer() else value
