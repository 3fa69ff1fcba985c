"""Errors: RFC 9457 problems on the native routes, OpenAI's envelope on its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from api import openai_errors
from api.paths import path_of
from worker.errors import BackstopError, NotFound, Unreachable, Unreadable

MEDIA_TYPE = "application/problem+json"

_log = structlog.get_logger()


class Fault(BaseModel):
    field: str
    message: str


class Problem(BaseModel):
    """RFC 9457. `detail` says what is wrong and what to do; `errors` names the fields that cannot be used."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    errors: list[Fault] | None = None
    reasons: list[str] | None = None


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of the problems a route answers with."""
    schema = Problem.model_json_schema()
    fault = schema.pop("$defs")["Fault"]  # a reference would lead nowhere in the document this becomes a part of
    schema["properties"]["errors"]["anyOf"][0]["items"] = fault
    content = {MEDIA_TYPE: {"schema": schema}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def problem(
    request: Request,
    status: int,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    errors: list[Fault] | None = None,
    reasons: list[str] | None = None,
) -> Response:
    """The answer to a request that could not be served; on an OpenAI route in its envelope, where a 422 is a 400."""
    if openai_errors.speaks_openai(path_of(request.scope)):
        return _openai(status, detail, headers, errors)
    body = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        instance=request.url.path,
        request_id=request.state.request_id,
        errors=errors,
        reasons=reasons,
    )
    return Response(json.dumps(body.model_dump(exclude_none=True)), status, headers, MEDIA_TYPE)


def _openai(status: int, detail: str, headers: Mapping[str, str] | None, errors: list[Fault] | None) -> Response:
    """It names one field; of a body that is no object, none."""
    param = None
    if errors:
        place, _, name = errors[0].field.partition(".")
        param = name or None
        detail = f"{param or place}: {errors[0].message}"
    error = openai_errors.OpenAIError(400 if status == 422 else status, detail, param=param, headers=headers)
    return openai_errors.answer(error)


def install(app: FastAPI) -> None:
    """Every error of this app leaves as a problem, or in OpenAI's envelope."""
    app.add_exception_handler(openai_errors.OpenAIError, openai_errors.answered)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(BackstopError, _mistake)
    for kind in (OperationalError, InterfaceError, InternalError, PoolTimeout):
        app.add_exception_handler(kind, _database_away)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = str(error.detail)
    if detail == HTTPStatus.NOT_FOUND.phrase:  # Starlette's own, of a path without a route
        detail = f"there is no {request.method} {request.url.path[:200]} here"
        if openai_errors.speaks_openai(f"/v1{path_of(request.scope)}"):
            return openai_errors.answer(openai_errors.OpenAIError(404, f"{detail}: the base URL has to end with /v1"))
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(_methods(request))
        return problem(request, 405, f"{request.method[:20]} is not for this path; use {allowed}", headers={"Allow": allowed})
    if error.status_code == HTTPStatus.BAD_REQUEST:  # FastAPI's own, of a body that cannot be read
        detail = _unread(error.__cause__)
    return problem(request, error.status_code, detail, headers=error.headers)


def _unread(cause: BaseException | None) -> str:
    """Why a body is no JSON that can be read, in words that show nothing of it."""
    match cause:
        case json.JSONDecodeError():
            why = f"{cause.msg.rstrip(': ').removesuffix(' at')} at line {cause.lineno}, column {cause.colno}"
        case UnicodeDecodeError():
            why = f"byte {cause.start + 1} is no {cause.encoding.upper()}"
        case RecursionError():
            why = "nested too deeply"
        case ValueError():
            why = "a number of too many digits"
        case _:
            why = "it breaks off"
    return f"body: expected JSON: {why}"


def _methods(request: Request) -> list[str]:
    """What can be done at this path; the router itself names the methods of the first route only."""
    templates: dict[str, dict[str, Any]] = request.app.openapi()["paths"]
    fitting = [methods for path, methods in templates.items() if compile_path(path)[0].match(path_of(request.scope))]
    return sorted({method.upper() for methods in fitting for method in methods})


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Only where and why: pydantic's `input` would send the prompt back, and into logs.
    if isinstance(error.__cause__, json.JSONDecodeError):
        return problem(request, 400, _unread(error.__cause__))
    faults = [Fault(field=_place(fault["loc"]), message=_said(error.body, fault)) for fault in error.errors()[:20]]
    detail = "; ".join(f"{fault.field}: {fault.message}" for fault in faults[:3])
    return problem(request, 422, detail, errors=faults)


def _place(loc: Sequence[str | int]) -> str:
    """As `messages[0].content`, behind where it stands: body, query, path or header."""
    parts = [part for part in loc if part != "[key]"]  # so pydantic marks that of an entry its key is meant
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)[1:250]


def _said(body: object, fault: Mapping[str, Any]) -> str:
    if tuple(fault["loc"]) != ("body",):
        return str(fault["msg"]).removeprefix("Value error, ")
    # FastAPI leaves what does not come as JSON as it is.
    return "send it with Content-Type: application/json" if isinstance(body, bytes) else "expected a JSON object"


async def _known_parameters(request: Request) -> None:
    """A misspelled filter would be no filter. Raises RequestValidationError."""
    if not request.query_params:
        return
    route = request.app.openapi()["paths"][request.scope["route"].path][request.method.lower()]
    known = [parameter["name"] for parameter in route.get("parameters", ()) if parameter["in"] == "query"]
    said = f"unknown parameter; known are {', '.join(known)}" if known else "unknown parameter; none is known here"
    if faults := [{"type": "extra_forbidden", "loc": ("query", name), "msg": said} for name in request.query_params if name not in known]:
        raise RequestValidationError(faults)


KnownParameters = Depends(_known_parameters)


async def _mistake(request: Request, error: Exception) -> Response:
    match error:
        case NotFound():
            return problem(request, 404, str(error))
        case Unreachable():
            return problem(request, 503, str(error), headers={"Retry-After": "1"})
        case Unreadable():
            return problem(request, 500, str(error))
        case _:
            return problem(request, 422, str(error))


async def _database_away(request: Request, error: Exception) -> Response:
    _log.error("database_unreachable", error=type(error).__name__)
    return problem(request, 503, "Postgres does not answer at the moment: try again", headers={"Retry-After": "1"})
