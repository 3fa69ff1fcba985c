"""Errors of the OpenAI-compatible routes, in OpenAI's envelope: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict

# What an OpenAI client may call, here or not. /v1/batches/{name_or_id}/results and /events are native.
_RESOURCES = (
    "assistants|audio|chat|completions|containers|conversations|embeddings|evals|files|fine_tuning|images|models|moderations|realtime"
    "|responses|threads|uploads|vector_stores|videos"
)
_ROUTES = re.compile(rf"/v1/(?:(?:{_RESOURCES})(?:/.*)?|batches(?:/[^/]+(?:/cancel)?)?/?)", re.DOTALL)
# https://platform.openai.com/docs/guides/error-codes
_TYPES: Mapping[int, str] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES: Mapping[int, str] = {401: "invalid_api_key", 429: "rate_limit_exceeded"}

# The SDK asks again after 408, 409, 429 and 5xx, unless the answer says otherwise.
FINAL: dict[str, str] = {"x-should-retry": "false"}


class OpenAIError(Exception):
    """What the SDK raises as an exception by `status`. `param` is the field at fault, `code` a word for programs.

    An error that would come again is given the headers `FINAL`.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code or _CODES.get(status)
        self.param = param
        self.headers = headers

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        return ErrorEnvelope(error=ErrorOut(message=self.message, type=self.type, param=self.param, code=self.code)).model_dump()


_EXAMPLE: dict[str, Any] = {
    "message": "temperature: expected a number from 0 to 2",
    "type": "invalid_request_error",
    "param": "temperature",
    "code": None,
}


class ErrorOut(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": {"error": _EXAMPLE}})

    error: ErrorOut


def speaks_openai(path: str) -> bool:
    """Whether an error of this path leaves in OpenAI's envelope; all others are problems."""
    return _ROUTES.fullmatch(path) is not None


def documented_openai(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of the errors a route answers with."""
    described = {status: HTTPStatus(status).phrase for status in statuses} | {"default": "An error"}  # or FastAPI adds its own 422
    return {status: {"description": description, "model": ErrorEnvelope} for status, description in described.items()}


def answer(error: OpenAIError) -> Response:
    return Response(json.dumps(error.body()), error.status, error.headers, "application/json")


async def answered(request: Request, error: Exception) -> Response:
    """The exception handler."""
    assert isinstance(error, OpenAIError)
    return answer(error)
