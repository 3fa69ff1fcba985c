"""The environment, read once."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from worker.settings import Settings


@pytest.fixture(autouse=True)
def _bare(monkeypatch):
    for name in ("DATABASE_URL", "REDIS_URL", *(f"BACKSTOP_{field.upper()}" for field in Settings.model_fields)):
        monkeypatch.delenv(name, raising=False)


def test_with_nothing_set_everything_is_embedded_and_local():
    settings = Settings()
    assert (settings.database_url, settings.redis_url) == (None, None)
    assert (settings.data, settings.config) == (Path(".backstop"), Path("backstop.toml"))


@pytest.mark.parametrize("prefix", ["", "BACKSTOP_"])
@pytest.mark.parametrize("name", ["database_url", "redis_url"])
def test_the_urls_are_read_with_and_without_prefix(monkeypatch, prefix, name):
    monkeypatch.setenv(f"{prefix}{name.upper()}", "postgresql://x/y")
    assert getattr(Settings(), name) == "postgresql://x/y"


def test_the_plain_name_of_a_url_comes_first(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://plain/x")
    monkeypatch.setenv("BACKSTOP_DATABASE_URL", "postgresql://prefixed/x")
    assert Settings().database_url == "postgresql://plain/x"


def test_other_settings_need_their_prefix(monkeypatch):
    monkeypatch.setenv("CONFIG", "other.toml")
    monkeypatch.setenv("BACKSTOP_BULK_SLOTS", "7")
    assert Settings().config == Path("backstop.toml")
    assert Settings().bulk_slots == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BULK_SLOTS", "0"),
        ("BULK_SLOTS", "many"),
        ("PACK_SIZE", "101"),
        ("HEARTBEAT_S", "0"),
        ("HEARTBEAT_TTL_S", "1"),
        ("DRAIN_S", "-1"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_a_value_that_cannot_be_is_refused_when_it_is_read(monkeypatch, name, value):
    monkeypatch.setenv(f"BACKSTOP_{name}", value)
    with pytest.raises(ValidationError):
        Settings()


@pytest.mark.parametrize("level", ["debug", "INFO", "Warning", "error"])
def test_log_levels_go_in_any_case(monkeypatch, level):
    monkeypatch.setenv("BACKSTOP_LOG_LEVEL", level)
    assert Settings().log_level == level.lower()


def test_settings_cannot_change_under_way():
    with pytest.raises(ValidationError):
        Settings().bulk_slots = 3
