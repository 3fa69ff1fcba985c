"""The application: what it opens, which routes it has. `uvicorn api.app:create_app --factory` serves it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.middleware.exceptions import ExceptionMiddleware

import worker
from api import batches, chat, figures, file_batches, files, health, jobs, models, problems, webhooks
from api.admission import Admission
from api.auth import Doorkeeper
from api.envelope import Envelope, news
from api.follow import Looks
from api.parts import Parts
from worker import config, database, keys, reads, wiring
from worker.grouping import Group
from worker.settings import Settings, read_settings
from worker.waiting import Endings

MOST_REPORTS = 2  # connections


def create_app(settings: Settings | None = None, connections: wiring.Connections | None = None) -> FastAPI:
    """The API. Settings default to the environment's; connections that are given stay open when the app stops.

    Raises UsageError at once when the configuration cannot be used.
    """
    chosen = settings or read_settings()
    configured = config.load(chosen.config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            opened = connections
            if opened is None:
                opened = await stack.enter_async_context(wiring.connections(chosen, configured))
            app.state.parts = await _parts(stack, opened, configured, chosen)
            app.openapi()  # a quarter of a second that the first request with a query parameter would take from all others
            yield

    app = FastAPI(
        title="Backstop",
        summary="Chat jobs that must not fail: submit one, get its answer and what it cost.",
        version=worker.__version__,
        lifespan=lifespan,
        redoc_url=None,
    )
    problems.install(app)
    # From the inside out: what the doorkeeper raises is answered like what a route raises.
    app.add_middleware(Doorkeeper)
    app.add_middleware(ExceptionMiddleware, handlers=app.exception_handlers)
    app.add_middleware(Envelope)
    logging.getLogger("uvicorn.error").addFilter(news)
    for resource in (jobs, batches, figures, webhooks, files, file_batches, chat, models, health):
        app.include_router(resource.router)
    return app


async def _parts(stack: AsyncExitStack, opened: wiring.Connections, configured: config.Config, settings: Settings) -> Parts:
    door, reports = (_few(opened.db) for _ in range(2))  # whom the keys are for is known however busy all else is
    stack.push_async_callback(door.dispose)
    stack.push_async_callback(reports.dispose)
    return Parts(
        config=configured,
        db=opened.db,
        reports=reports,
        redis=opened.redis,
        gates=opened.gates,
        publish=opened.publish,
        endings=await stack.enter_async_context(Endings(opened.db, opened.redis)),
        webhooks_private=settings.webhooks_private,
        max_files_bytes=settings.max_files_gb * 1e9,
        looks=Looks(opened.db),
        admission=Admission(opened.db, settings.max_queued),
        callers=Group(partial(keys.verify_all, door)),
        jobs=Group(partial(reads.job_views, opened.db)),
    )


def _few(like: AsyncEngine) -> AsyncEngine:
    return database.engine(like.url.render_as_string(hide_password=False), most=MOST_REPORTS)
