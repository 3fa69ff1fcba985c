"""Which chain a job takes, and who in it will most likely be asked first. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from uuid import UUID

from worker.config import ChainConfig, Config
from worker.errors import UsageError


def route(config: Config, chain: str) -> ChainConfig:
    """The chain of that name; a job whose chain has left the configuration takes the default one."""
    try:
        return config.chain(chain)
    except UsageError:
        return config.chain("default")


def warmed(chain: ChainConfig, job_id: UUID) -> ChainConfig:
    """The chain as this job walks it: for `warm_share` of all jobs one of the later providers comes first, always the same for a job."""
    draw = job_id.int & 0xFFFF_FFFF  # of the random end of a UUIDv7
    if draw >= chain.warm_share * 2**32:
        return chain
    first, *later = chain.providers
    warm = later[(job_id.int >> 32) % len(later)]
    return chain.model_copy(update={"providers": (warm, first, *(name for name in later if name != warm))})


def first_calls(config: Config, seems_closed: Callable[[str], bool]) -> Mapping[str, tuple[str, str]]:
    """For every name a job may carry as its chain: the provider (and model) that seems to be the first to be asked.

    Only a guess: a wrong one costs a call row that is removed again when the job settles.
    """
    first: dict[str, tuple[str, str]] = {}
    for name in (*(p.model for p in config.providers.values()), *config.providers, *config.chains):
        for provider in config.chain(name).providers:
            if seems_closed(provider):
                first[name] = (provider, config.providers[provider].model)
                break
    return first
