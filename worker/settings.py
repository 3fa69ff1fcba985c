"""Where things are and how this process runs: the only reader of the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from worker.errors import UsageError

_SECRETS = Path("/run/secrets")


class Settings(BaseSettings):
    """Frozen; every field is an environment variable `BACKSTOP_<FIELD>`, the two URLs also go without the prefix.

    In a container, a file of that name under /run/secrets does as well; the environment wins.
    URLs left unset mean the embedded servers under `data`. Durations are seconds.
    """

    model_config = SettingsConfigDict(
        env_prefix="BACKSTOP_",
        frozen=True,
        extra="ignore",
        populate_by_name=True,
        secrets_dir=_SECRETS if _SECRETS.is_dir() else None,
    )

    database_url: str | None = Field(None, validation_alias=AliasChoices("database_url", "DATABASE_URL", "BACKSTOP_DATABASE_URL"))
    redis_url: str | None = Field(None, validation_alias=AliasChoices("redis_url", "REDIS_URL", "BACKSTOP_REDIS_URL"))
    data: Path = Path(".backstop")
    config: Path = Path("backstop.toml")
    log_format: Literal["auto", "console", "json"] = "auto"  # auto: console on a terminal, else json
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(str.lower)] = "info"

    webhooks_private: bool = False  # webhooks may lead to http:// and to addresses that are not on the Internet

    max_files_gb: float = Field(50.0, gt=0)  # files of one tenant, 10^9 bytes; the API refuses uploads beyond, batches still write theirs
    max_queued: int = Field(10_000, ge=1)  # interactive jobs of one tenant; the API refuses more with a 429

    # One worker process.
    bulk_slots: int = Field(400, ge=1, le=10_000)  # bulk jobs in flight at once
    interactive_slots: int = Field(100, ge=1, le=10_000)
    pack_size: int = Field(50, ge=1, le=100)  # bulk jobs that travel in one Celery message
    heartbeat_s: float = Field(1.0, gt=0)
    heartbeat_ttl_s: float = Field(10.0, gt=0)  # silent for longer: dead, its jobs go to others
    heartbeat_file: Path | None = None  # touched at every heartbeat, for a container's health check
    drain_s: float = Field(35.0, ge=0)  # after SIGTERM running calls may finish for so long
    dispatch_ttl_s: float = Field(30.0, gt=0)  # published but not claimed for so long: published again

    @field_validator("heartbeat_ttl_s")
    @classmethod
    def _outlives_heartbeats(cls, value: float, others: ValidationInfo) -> float:
        if value < 3 * others.data.get("heartbeat_s", 0):
            raise ValueError("must be at least three times BACKSTOP_HEARTBEAT_S")
        return value


def read_settings() -> Settings:
    """The environment's settings. Raises UsageError naming the variable."""
    try:
        return Settings()
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0]).upper()
        raise UsageError(f"environment variable BACKSTOP_{name.removeprefix('BACKSTOP_')}: {fault['msg']}") from None
