"""The long-running commands as processes: what they start, what they say, and that nothing of them is left."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import stage
from ports import free_port
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import cli
from worker.cli.children import PAUSES_S, Children
from worker.cli.fleet import somebody_works
from worker.embedded.servers import found
from worker.errors import BackstopError
from worker.job import new_id
from worker.settings import Settings
from worker.wiring import connections

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")

PATIENCE_S = 60
CONFIG = """
[providers.{name}]
base_url = "http://127.0.0.1:{port}/steady/v1"
model = "sim"
timeout_s = 30
[chains.default]
providers = ["{name}"]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """Where the commands run: nothing there, nothing set."""
    for name in os.environ.keys() & {"DATABASE_URL", "REDIS_URL"} | {n for n in os.environ if n.startswith("BACKSTOP_")}:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def command(*arguments: str, program: tuple[str, ...] = ("-m", "worker")) -> Iterator[subprocess.Popen[str]]:
    """A process; what it says is on `stderr`. It has ended when the block has."""
    with subprocess.Popen([sys.executable, *program, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def said(process: subprocess.Popen[str], words: str) -> str:
    """What the process said up to and with the line that holds `words`."""
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"ended with {process.wait()} without {words!r}: {''.join(lines)}")


def eventually(holds: Callable[[], bool]) -> bool:
    give_up_at = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < give_up_at:
        time.sleep(0.01)
    return holds()


def status(pid: int) -> tuple[str, int]:
    """State and parent of a process; of one that is gone, Z and 0."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return "Z", 0
    return state, int(parent)


def gone(pids: set[int]) -> bool:
    return all(status(pid)[0] == "Z" for pid in pids)


def descendants(pid: int) -> set[int]:
    parents = {int(place.name): status(int(place.name))[1] for place in Path("/proc").glob("[0-9]*")}
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def answer_of(api: str, key: str, question: str) -> dict[str, object]:
    body = {"messages": [{"role": "user", "content": question}]}
    headers = {"Authorization": f"Bearer {key}", "Prefer": "wait=30"}
    answer = httpx.post(f"{api}/v1/jobs", json=body, headers=headers, timeout=60, trust_env=False)
    assert answer.is_success, answer.text
    job: dict[str, object] = answer.json()
    return job


def test_up_starts_everything_stops_without_a_trace_keeps_its_data_and_ends_over_a_child_that_dies_again_and_again(place):
    api_port, flower_port, vendor_port = free_port(), free_port(), free_port()
    (place / "backstop.toml").write_text(CONFIG.format(name="steady", port=vendor_port))
    (place / "script.toml").write_text('[providers.steady]\nmodel = "sim"\n')
    api = f"http://127.0.0.1:{api_port}"
    flower = httpx.Client(base_url=f"http://127.0.0.1:{flower_port}", timeout=30, trust_env=False)
    up = ["up", "--port", str(api_port), "--flower-port", str(flower_port)]

    with command("simulate", "--port", str(vendor_port), "--script", "script.toml"), command(*up) as process, flower:
        words = said(process, "Ctrl-C stops everything")
        assert api in words
        assert str(flower.base_url) in words
        key = (place / ".backstop" / "api-key").read_text().strip()
        job = answer_of(api, key, "is anybody there?")
        assert job["state"] == "succeeded"
        login = (place / ".backstop" / "flower-login").read_text().strip()
        check_flower(flower, login, ask=lambda: answer_of(api, key, "and now?"))
        ours = descendants(process.pid)
        assert len(ours) > 8  # itself, two workers, API, beat, Flower, two servers and those who mind them
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
        assert gone(ours)

    with command(*up, "--no-flower") as process:
        said(process, "Ctrl-C stops everything")
        kept = httpx.get(f"{api}/v1/jobs/{job['id']}", headers={"Authorization": f"Bearer {key}"}, trust_env=False)
        assert kept.json()["result"] == job["result"]
        killed: set[int] = set()
        for _ in PAUSES_S:
            killed.add(kill(process, "beat", but=killed))
            assert "logs/beat.log" in said(process, "beat ended with code -9")
        assert httpx.get(f"{api}/livez", trust_env=False).is_success
        ours = descendants(process.pid)
        kill(process, "beat", but=killed)
        assert "5 times within 60 s" in said(process, "it is not started again")
        assert process.wait(PATIENCE_S) == 1
        assert gone(ours), "one died too often, so all have ended"


def kill(process: subprocess.Popen[str], role: str, but: set[int]) -> int:
    """The child with that word in its command was killed, as soon as there is one beside those of before."""

    def candidates() -> set[int]:
        return {pid for pid in descendants(process.pid) if role.encode() in words(pid)} - but

    assert eventually(lambda: bool(candidates()))
    (victim,) = candidates()
    os.kill(victim, signal.SIGKILL)
    return victim


def words(pid: int) -> list[bytes]:
    """The command of a process; none of one that is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


def test_a_worker_that_is_killed_under_up_is_started_again_and_every_job_is_answered(place, monkeypatch):
    port, vendor_port = free_port(), free_port()
    (place / "backstop.toml").write_text(CONFIG.format(name="steady", port=vendor_port))
    (place / "script.toml").write_text('[providers.steady]\nmodel = "sim"\nlatency = {ms = 200}\n')
    for name, value in {"HEARTBEAT_S": "0.2", "HEARTBEAT_TTL_S": "3", "BULK_SLOTS": "10", "PACK_SIZE": "5"}.items():
        monkeypatch.setenv(f"BACKSTOP_{name}", value)

    async def killed(db: AsyncEngine) -> None:
        batch, ids = await stage.a_batch(db, 60)
        running = "SELECT w.pid FROM workers w JOIN jobs j ON j.worker_id = w.id WHERE j.state = 'running'"
        pid = (await stage.until(db, running))[0].pid
        os.kill(pid, signal.SIGKILL)
        await stage.until(db, "SELECT FROM batches WHERE state = 'finished'")
        assert (await stage.batch(db, batch.id)).succeeded == len(ids)
        await stage.until(db, "SELECT FROM workers WHERE lanes = 'bulk' AND state = 'live' AND pid <> :pid", pid=pid)
        assert len(await stage.rows(db, "SELECT FROM results")) == len(ids)
        assert await stage.rows(db, "SELECT FROM provider_calls WHERE outcome = 'orphaned'")

    with (
        command("simulate", "--port", str(vendor_port), "--script", "script.toml"),
        command("up", "--port", str(port), "--no-flower") as process,
    ):
        said(process, "Ctrl-C stops everything")
        stage.play(str(found(place / ".backstop").database_url), killed)
        said(process, "worker-bulk ended with code -9")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0


def check_flower(flower: httpx.Client, login: str, ask: Callable[[], object]) -> None:
    """Behind a password and read-only; shows both workers, and messages in ids and counts."""
    assert flower.get("/api/workers").status_code == 401
    flower.auth = tuple(login.split(":"))  # type: ignore[assignment]
    assert eventually(lambda: len(flower.get("/workers?json=1").json()["data"]) == 2)
    names = [worker["hostname"] for worker in flower.get("/workers?json=1").json()["data"]]
    assert sorted(name.split("-")[0] for name in names) == ["bulk", "interactive"]
    # It shows what happens from when it listens; a job before that it does not know.
    assert eventually(lambda: bool(ask()) and "SUCCESS" in flower.get("/api/tasks").text)
    task = next(task for task in flower.get("/api/tasks").json().values() if task["state"] == "SUCCESS")
    assert task["name"] == "backstop.run_jobs"
    assert task["kwargs"] == f"{{'job_ids': ['{task['uuid']}']}}"
    assert task["result"] == "{'succeeded': 1}"
    assert flower.post(f"/api/task/revoke/{task['uuid']}").status_code == 403
    assert flower.post(f"/api/worker/shutdown/{names[0]}").status_code == 403


@pytest.mark.parametrize(
    ("config", "arguments", "complaint"),
    [
        (CONFIG.replace("model", "modell"), [], "unknown key providers.steady.modell, did you mean 'model'?"),
        (CONFIG.replace("model", 'api_key = "env:NOT_THERE"\nmodel'), [], "environment variable NOT_THERE is not set"),
        (CONFIG, ["--port", "{taken}"], "cannot be used (Address already in use): choose another with --port"),
        (CONFIG, ["--flower-port", "{taken}", "--port", "{free}"], "choose another with --flower-port"),
        (CONFIG, ["--host", "no.such.host.invalid"], "choose another with --port"),
    ],
)
def test_up_says_what_is_wrong_before_it_starts_anything(config, arguments, complaint, place, capsys):
    (place / "backstop.toml").write_text(config.format(name="steady", port=1))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"taken": taken.getsockname()[1], "free": free_port()}
        with pytest.raises(SystemExit) as ended:
            cli.main(["up", *(argument.format(**ports) for argument in arguments)])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not (place / ".backstop").exists()


def test_celery_itself_says_in_one_line_what_is_wrong_with_the_configuration(place, database_url, redis_url, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)
    (place / "backstop.toml").write_text(CONFIG.format(name="steady", port=1).replace("model", "modell"))
    with command("-A", "worker.app", "worker", program=("-m", "celery")) as process:
        assert process.stderr is not None
        words = process.stderr.read()
        assert process.wait(PATIENCE_S) == 2
    assert "did you mean 'model'?" in words
    assert "Traceback" not in words


def test_a_revoke_through_celery_cancels_a_running_job(place, database_url, redis_url, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (place / "backstop.toml").write_text(CONFIG.format(name="silent", port=silent.getsockname()[1]))

        async def revoked(db: AsyncEngine) -> None:
            job_id = await stage.a_job(db)
            with command("-A", "worker.app", "worker", program=("-m", "celery")) as worker:
                job = await reached(db, job_id, "running")
                control = [sys.executable, "-m", "celery", "-A", "worker.app", "control", "revoke", str(job.delivery_id)]
                done = await asyncio.to_thread(subprocess.run, control, capture_output=True, text=True, check=True)
                assert "cancelled" in done.stdout
                await reached(db, job_id, "cancelled")
                worker.terminate()
                assert await asyncio.to_thread(worker.wait, PATIENCE_S) == 0

        stage.play(database_url, revoked)


async def reached(db: AsyncEngine, job_id: UUID, state: str) -> Any:
    """The job, as soon as it is in that state."""
    while (job := await stage.job(db, job_id)).state != state:  # noqa: ASYNC110 - a row raises no event
        await asyncio.sleep(0.05)
    return job


STARTER = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also when the tests run under nohup
from worker.cli.children import PAUSES_S, Children
from worker.cli.fleet import somebody_works
with Children(Path("logs")) as children:
    children.start("vendor", ["simulate", "--port", sys.argv[1]])
    print(children.pids()["vendor"], file=sys.stderr, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_children_end_with_the_command_that_started_them(stop, place):
    with command(str(free_port()), program=("-c", STARTER)) as process:
        child = int(said(process, "\n"))
        process.send_signal(stop)
        process.wait(PATIENCE_S)
        assert eventually(lambda: gone({child}))


def test_a_child_that_ends_is_named_with_the_last_line_it_wrote(place):
    with socket.create_server(("127.0.0.1", 0)) as taken, Children(place / "logs") as children:
        children.start("flower", ["flower", "--port", str(taken.getsockname()[1])], {"REDIS_URL": "redis://127.0.0.1:1/0"})
        process = children.pids()["flower"]
        assert eventually(lambda: status(process)[0] == "Z")
        with pytest.raises(BackstopError, match=r"flower ended with code 69: .*DATABASE_URL is not set.*flower\.log"):
            children.check()


def test_beat_and_flower_refuse_to_run_without_a_broker(place, capsys):
    (place / "backstop.toml").write_text(CONFIG.format(name="steady", port=1))
    with pytest.raises(SystemExit) as ended:
        cli.main(["flower", "--port", str(free_port())])
    assert ended.value.code == 69
    assert "DATABASE_URL is not set" in capsys.readouterr().err


@pytest.mark.parametrize(("silent_s", "lives"), [(0, True), (60, False)])
def test_a_worker_that_was_killed_is_not_taken_for_one_that_works(silent_s, lives, place, database_url, redis_url):
    (place / "backstop.toml").write_text(CONFIG.format(name="steady", port=1))
    settings = Settings(database_url=database_url, redis_url=redis_url)

    async def asked() -> list[str]:
        async with connections(settings) as open_:
            await stage.rows(
                open_.db,
                "INSERT INTO workers (id, host, pid, lanes, slots, state, seen_at)"
                " VALUES (:id, 'h', 1, 'bulk', 1, 'live', now() - make_interval(secs => :silent_s))",
                id=new_id(),
                silent_s=silent_s,
            )
            async with somebody_works(open_, settings) as children:
                return list(children.pids())

    assert asyncio.run(asked()) == ([] if lives else ["worker"])
