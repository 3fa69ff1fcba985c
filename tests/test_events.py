"""Lines on stderr: structured, one an event, nothing secret in them."""

import json
import subprocess
import sys

import pytest

from worker.events import origin

SPEAK = """
import logging, structlog
from worker.events import configure
from worker.settings import Settings
configure(Settings())
log = structlog.get_logger("worker.x")
log.info("claimed", job_id="1", jobs=2)
log.debug("unheard")
logging.getLogger("elsewhere").warning("by %s", "others")
logging.getLogger("httpx").info("POST https://key@example.org")
"""


def spoken(**env: str) -> tuple[str, list[str]]:
    done = subprocess.run([sys.executable, "-c", SPEAK], env={"PATH": "", **env}, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout, done.stderr.splitlines()


def test_away_from_a_terminal_each_event_is_a_line_of_json_on_stderr():
    out, lines = spoken()
    assert out == ""
    ours, theirs = map(json.loads, lines)
    assert ours.pop("timestamp").endswith("Z")
    assert ours == {"event": "claimed", "level": "info", "job_id": "1", "jobs": 2}
    assert (theirs["event"], theirs["level"]) == ("by others", "warning")


def test_on_request_lines_are_for_people():
    _, lines = spoken(BACKSTOP_LOG_FORMAT="console")
    assert "claimed" in lines[0]
    assert not lines[0].startswith("{")


def test_the_level_is_obeyed_but_clients_stay_quiet():
    _, lines = spoken(BACKSTOP_LOG_LEVEL="DEBUG")
    assert [json.loads(line)["event"] for line in lines] == ["claimed", "unheard", "by others"]
    _, lines = spoken(BACKSTOP_LOG_LEVEL="warning")
    assert [json.loads(line)["event"] for line in lines] == ["by others"]


def test_an_origin_says_where_but_not_what():
    with pytest.raises(KeyError) as raised:
        {}["the secret prompt"]
    where = origin(raised.value)
    assert where.startswith("test_events.py:")
    assert where.endswith("test_an_origin_says_where_but_not_what")
    assert "secret" not in where


def test_an_origin_ends_with_the_innermost_frame():
    with pytest.raises(json.JSONDecodeError) as raised:
        json.loads("{")
    assert origin(raised.value).split(" > ")[-1].startswith("decoder.py:")
