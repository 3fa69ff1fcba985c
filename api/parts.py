"""What the routes work with, opened once by the app's lifespan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.config import Config
from worker.dispatch import Publish
from worker.resilience.gate import Gates
from worker.waiting import Endings


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    config: Config
    db: AsyncEngine
    redis: Redis
    gates: Gates
    publish: Publish
    endings: Endings


def _parts(request: Request) -> Parts:
    parts = request.app.state.parts
    assert isinstance(parts, Parts)
    return parts


Opened = Annotated[Parts, Depends(_parts)]
