"""The client of a well-read tutorial, written anew from its description, with its faults.

Providers in order; a breaker in the memory of each process that opens for 60 s on a single 5xx and lets everybody back in at
once when they are over; `timeout` of requests, which bounds each read and not the call; no retry; a hang, a dropped connection
and a 429 leave the breaker as it is; what is neither of these ends the job although other providers are well.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import requests

OPEN_S = 60.0
TIMEOUTS_S = (10, 15, 20)


class ProviderError(Exception):
    """The provider answered with a 5xx or a 429."""


class NaiveClient:
    """One for a process; its threads share the breaker, which is kinder than the original."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = urls
        self._open_until = dict.fromkeys(urls, 0.0)
        self._lock = threading.Lock()

    def chat(self, prompt: str) -> str:
        """The answer. Raises RuntimeError when every provider failed or was shut, and whatever a strange reply raises."""
        errors: list[Exception] = []
        for url, timeout_s in zip(self._urls, TIMEOUTS_S, strict=True):
            if self._is_open(url):
                continue
            try:
                return _ask(url, prompt, timeout_s)
            except ProviderError as error:
                if str(error) != "429":
                    self._trip(url)
                errors.append(error)
            except (requests.Timeout, requests.ConnectionError) as error:
                errors.append(error)
        raise RuntimeError(f"all providers failed: {len(errors)} asked")

    def _is_open(self, url: str) -> bool:
        with self._lock:
            return time.time() < self._open_until[url]

    def _trip(self, url: str) -> None:
        with self._lock:
            self._open_until[url] = time.time() + OPEN_S


def _ask(url: str, prompt: str, timeout_s: float) -> str:
    body: dict[str, Any] = {"model": "sim", "messages": [{"role": "user", "content": prompt}]}
    response = requests.post(f"{url}/chat/completions", json=body, timeout=timeout_s)
    if response.status_code == 429 or response.status_code >= 500:
        raise ProviderError(str(response.status_code))
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"])
