"""Is it up, and can it work. Both answer without a key, and neither ever asks a provider."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from api.parts import Opened
from api.problems import documented, problem
from worker import schema
from worker.errors import Unreachable

_LIMIT_S = 1.0

_OK: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {"example": {"status": "ok"}}}}}

router = APIRouter(tags=["health"])


@router.get("/livez", responses=_OK)
async def livez() -> dict[str, str]:
    """This process serves requests."""
    return {"status": "ok"}


@router.get("/readyz", response_model=dict[str, str], responses={**_OK, **documented(503)})
async def readyz(request: Request, parts: Opened) -> Response:
    """Postgres has the schema this code needs and Redis answers, each within a second; else 503 with the reasons."""
    checks = await asyncio.gather(_postgres(parts.db.url), _redis(parts.redis))
    reasons = [reason for reason in checks if reason is not None]
    if reasons:
        return problem(request, 503, "; ".join(reasons), headers={"Retry-After": "1"}, reasons=reasons)
    return JSONResponse({"status": "ok"})


async def _postgres(url: URL) -> str | None:
    try:
        async with asyncio.timeout(_LIMIT_S):
            return await schema.pending(url.render_as_string(hide_password=False))
    except TimeoutError:
        return f"Postgres did not answer within {_LIMIT_S:g} s"
    except (Unreachable, SQLAlchemyError):
        return "Postgres does not answer"


async def _redis(redis: Redis) -> str | None:
    try:
        async with asyncio.timeout(_LIMIT_S):
            await redis.ping()
    except TimeoutError:
        return f"Redis did not answer within {_LIMIT_S:g} s"
    except (RedisError, OSError):
        return "Redis does not answer"
    return None
