"""Which chain a job takes, and who in it will most likely be asked first. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from worker.config import ChainConfig, Config
from worker.errors import UsageError


def route(config: Config, chain: str) -> ChainConfig:
    """The chain of that name; a job whose chain has left the configuration takes the default one."""
    try:
        return config.chain(chain)
    except UsageError:
        return config.chain("default")


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
