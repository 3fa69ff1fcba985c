"""Real servers for tests: one Postgres and one Valkey for the whole run, and for each test a database of its own."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from hypothesis import settings
from redis import Redis

from worker import schema
from worker.embedded.servers import Endpoints, running

settings.register_profile("backstop", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("backstop")

_TEMPLATE = "template_backstop"
_numbers = itertools.count(1)


def pytest_xdist_auto_num_workers() -> int:
    """Half as many again as there are cores: a test waits for other processes as often as it computes."""
    return (os.cpu_count() or 1) * 3 // 2


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    """Postgres and Valkey that nobody else uses, and that need not survive a power cut."""
    with running(tmp_path_factory.mktemp("servers"), durable=False) as endpoints:
        yield endpoints


@pytest.fixture(scope="session")
def _administrator(servers: Endpoints) -> Iterator[psycopg.Connection]:
    """A connection that makes databases; the template with the newest schema is there."""
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {_TEMPLATE}".encode())
        asyncio.run(schema.upgrade(_named(servers, _TEMPLATE)))
        yield connection


@pytest.fixture
def database_url(servers: Endpoints, _administrator: psycopg.Connection) -> Iterator[str]:
    """A database of this test's own, with the newest schema and no rows beyond those of the migrations."""
    name = f"test_{next(_numbers)}"
    _administrator.execute(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE} STRATEGY file_copy".encode())
    yield _named(servers, name)
    _administrator.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def redis_url(servers: Endpoints) -> str:
    """A Valkey that holds nothing."""
    with Redis.from_url(servers.redis_url) as client:
        client.flushall()
        client.config_resetstat()
    return servers.redis_url


def _named(servers: Endpoints, name: str) -> str:
    return urlunsplit(urlsplit(servers.database_url)._replace(path=f"/{name}"))
