"""Mistakes a user can mend, each with the exit code it ends a command with. They are shown as one line, without a trace.

BackstopError
├── UsageError       2   what was typed, configured or put into a file; of it TooMany
├── PartlyFailed     3   done, but not every job was answered
├── WaitTimedOut     4   not finished within the time given
├── NotFound         5   no such job, batch, provider, file
├── Unreadable       1   a row of the ledger that this version did not write
├── KeyReused        1   an idempotency key that stands for another request
└── Unreachable     69   a server that must be there is not
"""

from __future__ import annotations


class BackstopError(Exception):
    """The message says what is wrong, where (row, field, setting), and what to do."""

    exit_code = 1


class UsageError(BackstopError):
    exit_code = 2


class PartlyFailed(BackstopError):
    exit_code = 3


class WaitTimedOut(BackstopError):
    exit_code = 4


class NotFound(BackstopError):
    exit_code = 5


class Unreadable(BackstopError):
    """Says which row's part it is, and nothing of what stands there."""


class Unreachable(BackstopError):
    exit_code = 69


class TooMany(UsageError):
    """A tenant has as many of something as it may."""


class KeyReused(BackstopError):
    """An idempotency key belongs to another request."""
