"""Errors of the native routes, as RFC 9457 problems."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

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
    content = {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
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
    """The answer to a request that could not be served."""
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


def install(app: FastAPI) -> None:
    """Every error of this app leaves as a problem."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(BackstopError, _mistake)
    for kind in (OperationalError, InterfaceError, InternalError, PoolTimeout):
        app.add_exception_handler(kind, _database_away)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(request, error.status_code, str(error.detail), headers=error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Only where and why: pydantic's `input` would send the prompt back, and into logs.
    faults = [
        Fault(field=".".join(str(part) for part in fault["loc"])[:200], message=fault["msg"].removeprefix("Value error, "))
        for fault in error.errors()[:20]
    ]
    detail = "; ".join(f"{fault.field}: {fault.message}" for fault in faults[:3])
    return problem(request, 422, detail, errors=faults)


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
