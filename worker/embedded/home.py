"""What a server's home is made of: locks that end with the process that holds them, and small private files."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

_LOOK_EVERY_S = 0.02


def take(path: Path, *, shared: bool = False, wait_s: float = 0) -> int | None:
    """A descriptor that holds the lock until it is closed everywhere, also in children that inherit it.

    None when others kept the lock for `wait_s` seconds. Taken alone, the lock names no holder yet.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    give_up_at = time.monotonic() + wait_s
    while not turn(descriptor, shared=shared):
        if time.monotonic() >= give_up_at:
            os.close(descriptor)
            return None
        time.sleep(_LOOK_EVERY_S)
    if not shared:
        os.ftruncate(descriptor, 0)
    return descriptor


def turn(descriptor: int, *, shared: bool) -> bool:
    """Whether the lock of an open descriptor is now shared, or exclusive. When it is not, it may hold none any more."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_held(path: Path) -> bool:
    """Whether some process holds the lock exclusively. A lock file that does not exist is held by nobody."""
    if not path.exists():
        return False
    descriptor = take(path, shared=True)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def holder(path: Path) -> int | None:
    """Process id that a held lock names; None when it is free, or names none yet."""
    if not is_held(path):
        return None
    content = path.read_text()
    return int(content) if content.isdigit() else None


def write_holder(descriptor: int, pid: int) -> None:
    """The lock's file names the process that holds it."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(pid).encode(), 0)


def write(path: Path, content: str) -> None:
    """The file holds `content`, whole or not at all, and only its owner reads it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:
        file.write(content)
    draft.replace(path)
