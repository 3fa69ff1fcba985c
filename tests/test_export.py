"""What leaves: tables no spreadsheet runs, lines the OpenAI SDK reads, files that are whole or as they were."""

import asyncio
import csv
import io
import json
import os
import stat
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.cost import Usage
from worker.errors import BackstopError, UsageError
from worker.export import COLUMNS, ExportRow, jsonl_line, replacing, write_csv, write_jsonl
from worker.job import Answer, JobState

JOB = UUID("01890a5d-ac96-774b-bcce-b302099a8057")  # a UUIDv7 of 30 June 2023
FORMULA = "=+-@\t\r\n＝＋－＠"


def answer(content, **changes):
    usage = Usage(input_tokens=10, output_tokens=5, cached_tokens=4)
    whole = {"finish_reason": "stop", "provider": "first", "model": "m-1", "usage": usage, **changes}
    return Answer(content=content, **whole)


def done(content, row=None, **changes):
    return ExportRow(job_id=JOB, state="succeeded", row=row, answer=answer(content), cost_usd=Decimal("0.000120000000"), **changes)


def failed(**changes):
    return ExportRow(job_id=JOB, state="failed", error={"code": "no_provider", "message": "all asked"}, **changes)


async def stream(rows):
    for row in rows:
        yield row


def table(rows, columns=(), fields=()):
    out = io.StringIO(newline="")
    asyncio.run(write_csv(stream(rows), columns, fields, out))
    out.seek(0)
    return list(csv.reader(out, strict=True))


def test_a_row_of_csv_holds_the_ticket_then_the_outcome_then_the_fields():
    said = '{"urgency": "high", "tags": ["a", "ü"], "n": 2, "none": null}'
    fields = ["urgency", "tags", "n", "none", "absent"]
    header, row = table([done(said, {"id": "1", "body": "b"})], ["id", "body"], fields)
    assert header == ["id", "body", *COLUMNS, *fields]
    assert row == ["1", "b", said, "succeeded", "first", "m-1", "", "0.00012", "", "high", '["a", "ü"]', "2", "", ""]


def test_a_failed_job_stands_in_the_csv_with_its_reason():
    _, row = table([failed(row={"id": "1"})], ["id", "gone"], ["urgency"])
    assert row == ["1", "", "", "failed", "", "", "", "", "no_provider: all asked", ""]


@pytest.mark.parametrize("content", ["no json", "[1]", "", None, "[" * 100_000])
def test_an_answer_that_is_not_the_json_asked_for_leaves_the_fields_blank(content):
    _, row = table([done(content)], [], ["urgency"])
    assert row[0] == (content or "")
    assert row[-1] == ""


def test_names_that_meet_are_told_apart():
    header, row = table([done('{"model": "x"}', {"answer": "mine", "state": "CA"})], ["answer", "state"], ["model"])
    assert len(set(header)) == len(header)
    named = dict(zip(header, row, strict=True))
    assert named["answer"] == "mine"
    assert named["state"] == "CA"
    assert named["answer_answer"] == '{"model": "x"}'
    assert named["state_answer"] == "succeeded"
    assert named["model"] == "m-1"
    assert named["model_answer"] == "x"


@pytest.mark.parametrize("cell", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1+1", "+49 30 1234", "-"])
def test_cells_a_spreadsheet_would_run_get_an_apostrophe(cell):
    header, row = table([done(cell, {cell: cell})], [cell])
    assert header[0] == row[0] == row[1] == f"'{cell}"


@pytest.mark.parametrize("cell", ["-5", "+3.5", "-1,234.50", "-1e9", "-12%", "a=b", " =1", "'=1", ""])
def test_plain_numbers_and_texts_stay_as_they_are(cell):
    _, row = table([done("x", {"a": cell})], ["a"])
    assert row[0] == cell


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)
RISKY = st.builds(str.__add__, st.sampled_from(list(FORMULA)), CELL)


@given(rows=st.lists(st.lists(CELL | RISKY, min_size=2, max_size=2), max_size=4), content=CELL | RISKY)
def test_any_csv_reads_back_and_begins_no_cell_with_a_formula(rows, content):
    written = table([done(content, {"a": a, "b": b}) for a, b in rows], ["a", "b"])[1:]
    assert len(written) == len(rows)
    for (a, b), row in zip(rows, written, strict=True):
        for was, cell in zip((a, b, content), row[:3], strict=True):
            assert cell in (was, f"'{was}")
            assert not cell.startswith(tuple(FORMULA)) or cell[1:].strip("0123456789.,eE+-%") == ""


@pytest.mark.parametrize(
    ("cost", "shown"),
    [("1E-12", "0.000000000001"), ("100", "100"), ("0E-12", "0"), ("1.500000000000", "1.5"), (None, "")],
)
def test_money_is_written_in_full_and_unknown_is_blank(cost, shown):
    row = ExportRow(job_id=JOB, state="succeeded", answer=answer("x"), cost_usd=Decimal(cost) if cost else None)
    assert table([row])[1][COLUMNS.index("cost_usd")] == shown


def test_an_answer_is_a_chat_completion_in_an_openai_line():
    line = json.loads(jsonl_line(done("hi", custom_id="c-1", ordinal=3)))
    assert (line["id"], line["custom_id"], line["error"]) == (str(JOB), "c-1", None)
    assert (line["response"]["status_code"], line["response"]["request_id"]) == (200, str(JOB))
    body = line["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["created"] == 1688096058
    assert body["model"] == "m-1"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hi", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert {k: body["usage"][k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        "prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15,
    }  # fmt: skip
    assert body["backstop"] == {"provider": "first", "degraded": None, "cost_usd": "0.00012"}


def test_tool_calls_and_unknown_usage_come_through():
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    row = ExportRow(job_id=JOB, state="succeeded", answer=answer(None, tool_calls=calls, usage=Usage()))
    body = json.loads(jsonl_line(row))["response"]["body"]
    assert body["choices"][0]["message"]["tool_calls"] == calls
    assert body["usage"] is None
    assert json.loads(table([row])[1][0]) == calls


@pytest.mark.parametrize("state", sorted(set(JobState) - {JobState.SUCCEEDED}))
def test_a_job_without_an_answer_stands_in_the_lines_with_an_error(state):
    line = json.loads(jsonl_line(ExportRow(job_id=JOB, state=state, ordinal=7)))
    assert line["custom_id"] == "7"
    assert line["response"] is None
    assert line["error"]["code"] == (state if state in ("failed", "cancelled", "expired") else "not_finished")


def test_the_error_of_a_failed_job_is_its_code_and_message_only():
    row = ExportRow(job_id=JOB, state="failed", error={"code": "c", "message": "m", "providers": [{"provider": "p"}]})
    assert json.loads(jsonl_line(row))["error"] == {"code": "c", "message": "m"}


@given(content=CELL | st.sampled_from(["a\u2028b", "a\x85b", "a\x1cb", "a\r\nb"]))
def test_a_line_is_one_line_to_everybody(content):
    line = jsonl_line(done(content))
    assert line.splitlines() == [line]
    assert json.loads(line)["response"]["body"]["choices"][0]["message"]["content"] == content


def test_lines_are_written_one_below_the_other():
    out = io.StringIO()
    asyncio.run(write_jsonl(stream([done("a"), failed()]), out))
    assert [bool(json.loads(line)["error"]) for line in out.getvalue().splitlines()] == [False, True]


def test_a_file_is_replaced_in_one_go_and_keeps_its_mode(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("old")
    path.chmod(0o640)
    with replacing(path) as out:
        out.write("new\r\n")
        out.flush()
        assert path.read_text() == "old"
    assert path.read_bytes() == b"new\r\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["out.csv"]


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    with replacing(tmp_path / "out.csv") as out:
        out.write("x")
    assert (tmp_path / "out.csv").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ConnectionRefusedError])
def test_after_an_error_the_file_is_as_it_was(tmp_path, error):
    path = tmp_path / "out.csv"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as out:  # noqa: PT012
        out.write("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.csv"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("real.csv")
    with replacing(tmp_path / "link.csv") as out:
        out.write("new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text() == "new"


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("old")
    code = (
        "import resource, sys; from pathlib import Path; from worker.export import replacing\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "with replacing(Path(sys.argv[1])) as out:\n"
        "    for _ in range(100_000): out.write('a line of the results\\n')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "BackstopError" in ran.stderr.splitlines()[-1]
    assert f"{path} cannot be written: File too large" in ran.stderr.splitlines()[-1]
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.csv"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device_is_one_clear_line_too():
    with pytest.raises(BackstopError, match="/dev/full cannot be written: No space left"), replacing(Path("/dev/full")) as out:
        out.write("x")


def test_what_is_no_regular_file_is_written_to_not_replaced():
    with replacing(Path("/dev/null")) as out:
        out.write("x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("name", [".", "absent/out.csv", "file/out.csv"])
def test_a_place_where_no_file_can_be_is_refused_at_once(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"), replacing(tmp_path / name):
        raise AssertionError("the block must not begin")
