"""The API as a client sees it, over real servers. A worker's part is played by SQL."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, create_engine, text
from starlette.testclient import TestClient

from api.app import create_app
from worker import database, keys
from worker.settings import Settings

CONFIG = """
[providers.a]
base_url = "http://127.0.0.1:1"
model = "m-a"
[chains.default]
providers = ["a"]
"""
ANSWER = {
    "content": "Hello!",
    "finish_reason": "stop",
    "provider": "a",
    "model": "m-a",
    "usage": {"input_tokens": 3, "output_tokens": 5, "cached_tokens": None, "reasoning_tokens": None},
    "tool_calls": None,
    "degraded": None,
}
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


@dataclass
class Stage:
    """A client with a key of tenant `default`, the published jobs, and the database behind it all."""

    client: TestClient
    ledger: Engine
    published: list[Any]
    database_url: str
    on_publish: Callable[..., None] = lambda *_: None

    def key(self, tenant: str = "default", **wanted: Any) -> dict[str, str]:
        async def created() -> str:
            db = database.engine(self.database_url)
            try:
                return (await keys.create(db, name="test", tenant=tenant, **wanted)).secret
            finally:
                await db.dispose()

        return {"Authorization": f"Bearer {asyncio.run(created())}"}

    def sql(self, statement: str, **values: Any) -> list[Any]:
        with self.ledger.begin() as connection:
            result = connection.execute(text(statement), values)
            return list(result) if result.returns_rows else []

    def succeed(self, job_id: str) -> None:
        """What a settle leaves behind, one call of $0.0001230 included."""
        answer = json.dumps(ANSWER)
        self.sql(
            """WITH r AS (INSERT INTO results (job_id, fence, answer) VALUES (:id, 1, CAST(:answer AS jsonb))),
               c AS (INSERT INTO provider_calls (id, job_id, fence, provider, model, outcome, billing, cost_usd, ended_at)
                     VALUES (:call, :id, 1, 'a', 'm-a', 'answered', 'billed', 0.0001230, now()))
               UPDATE jobs SET state = 'succeeded', finished_at = now(), worker_id = NULL WHERE id = :id""",
            id=UUID(job_id),
            answer=answer,
            call=uuid4(),
        )

    def submit(self, **body: Any) -> dict[str, Any]:
        response = self.client.post("/v1/jobs", json={**HELLO, **body})
        assert response.status_code == 202, response.text
        return response.json()


@pytest.fixture
def stage(database_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with played(database_url, redis_url, tmp_path, monkeypatch) as staged:
        yield staged


@pytest.fixture
def stage_without_redis(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with played(database_url, "redis://127.0.0.1:1/0", tmp_path, monkeypatch) as staged:
        yield staged


@cache
def description() -> dict[str, Any]:
    """The OpenAPI document: the same for every app, so that it is made once."""
    return create_app(Settings(config=Path(__file__).parents[2] / "backstop.toml")).openapi()


@contextmanager
def played(database_url: str, redis_url: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    config = data / "backstop.toml"
    config.write_text(CONFIG)
    chosen = Settings(database_url=database_url, redis_url=redis_url, config=config, data=data)
    ledger = create_engine(database.driver_url(database_url))
    app = create_app(chosen)
    app.openapi = description
    with TestClient(app, raise_server_exceptions=False) as client:
        staged = Stage(client, ledger, [], database_url)

        def publish(*message: Any) -> None:
            staged.published.append(message)
            staged.on_publish(*message)

        monkeypatch.setattr(client.app.state, "parts", replace(client.app.state.parts, publish=publish))
        client.headers.update(staged.key("default"))
        yield staged
    ledger.dispose()
