"""Ports for servers that are started by number, and only later than the number is chosen."""

import os
import random
import socket
from contextlib import suppress

_FIRST, _END = 20_000, 32_000  # below those that the kernel gives to clients, and to whoever asks it for any


def free_port() -> int:
    """A port of 127.0.0.1 that is nobody's. Test processes that run at once have each their own to choose from."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.randrange(_FIRST + process, _END, processes)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
