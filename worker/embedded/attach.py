"""For processes that are started by others and start no servers themselves: the URLs of those that run."""

from __future__ import annotations

from worker.embedded.servers import found
from worker.errors import Unreachable
from worker.settings import Settings


def attached(settings: Settings) -> Settings:
    """Settings whose URLs are set: the given ones, else those of the embedded servers that run now.

    Raises Unreachable naming what is missing.
    """
    if settings.database_url and settings.redis_url:
        return settings
    endpoints = found(settings.data)
    update = {
        "database_url": settings.database_url or endpoints.database_url,
        "redis_url": settings.redis_url or endpoints.redis_url,
    }
    for name, url in update.items():
        if not url:
            raise Unreachable(
                f"{name.upper()} is not set and no embedded server runs under {settings.data}: "
                "set it, or use `backstop up` or `backstop worker`, which bring their own"
            )
    return settings.model_copy(update=update)
