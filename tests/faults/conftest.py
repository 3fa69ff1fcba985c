"""The fault laboratory as a fixture: servers once for the run, everything else anew for each test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, a_lab
from server import Servers


@pytest.fixture(scope="session")
def lab_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """A Postgres and a Valkey that faults may befall."""
    servers = Servers(tmp_path_factory.mktemp("lab"))
    yield servers
    servers.end()


@pytest.fixture
def laboratory(tmp_path: Path, lab_servers: Servers) -> Callable[..., None]:
    """Plays a story in an open lab: `laboratory(story, timeout_s=100, **options of a_lab)`."""

    def played(story: Callable[[Lab], Awaitable[None]], *, timeout_s: float = 100, **options: Any) -> None:
        async def inside() -> None:
            async with a_lab(tmp_path, lab_servers, **options) as lab, asyncio.timeout(timeout_s):
                await story(lab)

        asyncio.run(inside())

    return played
