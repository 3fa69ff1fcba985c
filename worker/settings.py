"""Where things are and how this process runs: the only reader of the environment."""

from __future__ import annotations

from pathlib import Path

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Frozen; every field is an environment variable `BACKSTOP_<FIELD>`, the two URLs also go without the prefix.

    URLs left unset mean the embedded servers under `data`. Durations are seconds.
    """

    model_config = SettingsConfigDict(env_prefix="BACKSTOP_", frozen=True, extra="ignore", populate_by_name=True)

    database_url: str | None = Field(
        None, validation_alias=AliasChoices("database_url", "DATABASE_URL", "BACKSTOP_DATABASE_URL")
    )
    redis_url: str | None = Field(None, validation_alias=AliasChoices("redis_url", "REDIS_URL", "BACKSTOP_REDIS_URL"))
    data: Path = Path(".backstop")
    config: Path = Path("backstop.toml")
    log_format: str = "auto"  # auto (console on a terminal, else json) | console | json
    log_level: str = "info"

    # One worker process.
    bulk_slots: int = Field(400, ge=1, le=10_000)  # bulk jobs in flight at once
    interactive_slots: int = Field(100, ge=1, le=10_000)
    pack_size: int = Field(50, ge=1, le=100)  # bulk jobs that travel in one Celery message
    heartbeat_s: float = Field(1.0, gt=0)
    heartbeat_ttl_s: float = Field(10.0, gt=0)  # silent for longer: dead, its jobs go to others
    drain_s: float = Field(35.0, ge=0)  # after SIGTERM running calls may finish for so long
    dispatch_ttl_s: float = Field(30.0, gt=0)  # published but not claimed for so long: published again
