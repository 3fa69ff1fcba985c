"""Texts of a fixed form. OpenAPI shows the form as a pattern; whoever sends something else reads in words what is expected."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Header
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from worker.submit import IDEMPOTENCY_KEY, IDEMPOTENCY_KEY_IS


@dataclass(frozen=True, slots=True)
class Spelled:
    """Marks a text that has to be as `pattern`, which is anchored, has it. `expected` says so in words."""

    pattern: str
    expected: str

    def _check(self, value: str) -> str:
        if re.fullmatch(self.pattern, value) is None:
            raise ValueError(f"expected {self.expected}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "pattern": self.pattern}


NoNul = Spelled(r"^[^\x00]*$", "a text without NUL characters")
IdempotencyKey = Annotated[Annotated[str, Spelled(f"^{IDEMPOTENCY_KEY.pattern}$", IDEMPOTENCY_KEY_IS)] | None, Header()]
Span = Annotated[str, Spelled(r"^[0-9]{1,4}[mhdw]$", "a number and m, h, d or w, as in 7d")]
