"""What the routes work with, opened once by the app's lifespan.

What each request has to look up, its key and its job, those that come at the same time look up together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Request
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine

from api.admission import Admission
from api.follow import Looks
from worker.config import Config
from worker.dispatch import Publish
from worker.grouping import Group
from worker.keys import Caller
from worker.resilience.gate import Gates
from worker.views import JobView
from worker.waiting import Endings


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """`reports` are the connections for what may take long: lists and figures. They hold up one another, and no submission or poll."""

    config: Config
    db: AsyncEngine
    reports: AsyncEngine
    redis: Redis
    gates: Gates
    publish: Publish
    endings: Endings
    webhooks_private: bool
    max_files_bytes: float
    looks: Looks
    admission: Admission
    callers: Group[str, Caller | None]
    jobs: Group[UUID, JobView | None]


async def _parts(request: Request) -> Parts:  # a plain function would be run in a thread of its own
    parts = request.app.state.parts
    assert isinstance(parts, Parts)
    return parts


Opened = Annotated[Parts, Depends(_parts)]
