"""Real servers for tests: one Postgres and one Valkey for the whole run, and for each test a database of its own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from hypothesis import settings
from redis import Redis

from worker import database
from worker.embedded.servers import Endpoints, running

settings.register_profile("backstop", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("backstop")

_TEMPLATE = "template_backstop"
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    """Postgres and Valkey that nobody else uses, and that need not survive a power cut."""
    with running(tmp_path_factory.mktemp("servers"), durable=False) as endpoints:
        yield endpoints


@pytest.fixture(scope="session")
def _migrated(servers: Endpoints) -> Endpoints:
    """There is a template database with the newest schema."""
    _administer(servers, f"CREATE DATABASE {_TEMPLATE}")
    asyncio.run(database.upgrade(_named(servers, _TEMPLATE)))
    return servers


@pytest.fixture
def database_url(_migrated: Endpoints) -> Iterator[str]:
    """A database of this test's own, with the newest schema and no rows beyond those of the migrations."""
    name = f"test_{next(_numbers)}"
    _administer(_migrated, f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}")
    yield _named(_migrated, name)
    _administer(_migrated, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def redis_url(servers: Endpoints) -> str:
    """A Valkey that holds nothing."""
    with Redis.from_url(servers.redis_url) as client:
        client.flushall()
        client.config_resetstat()
    return servers.redis_url


def _administer(servers: Endpoints, statement: str) -> None:
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        connection.execute(statement.encode())


def _named(servers: Endpoints, name: str) -> str:
    return urlunsplit(urlsplit(servers.database_url)._replace(path=f"/{name}"))
