"""What the tickets of a file are, and what is said of a file that cannot be used."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from worker.errors import NotFound, UsageError
from worker.textfile import CHUNK_BYTES
from worker.tickets import Counts, Ticket, open_tickets

REAL_FILE = Path(__file__).resolve().parent.parent.parent / "shared/data/it_tickets_5431.csv"
DEMO_FILE = Path(__file__).resolve().parent.parent / "examples/tickets.csv"


def read(path, data=None):
    """The columns, tickets and counts of a file, which is written first when `data` is given."""
    if data is not None:
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    with open_tickets(str(path)) as source:
        tickets = list(source)
        return source, tickets, source.counts


def values(tickets):
    assert [t.problem for t in tickets] == [None] * len(tickets)
    return [t.values for t in tickets]


def refusal(path, data):
    with pytest.raises(UsageError) as caught:
        read(path, data)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path.parent), "")  # which holds the name of the test


def as_csv(rows, delimiter=",", end="\r\n"):
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL).writerows(rows)
    return out.getvalue()


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=30)
NAME = CELL.map(str.strip).filter(bool)


@st.composite
def tables(draw):
    header = draw(st.lists(NAME, min_size=1, max_size=5, unique=True))
    row = st.lists(CELL, min_size=len(header), max_size=len(header)).filter(lambda cells: any(map(str.strip, cells)))
    return header, draw(st.lists(row, max_size=6))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=tables(),
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    zipped=st.booleans(),
)
@example(table=(["0", "0\t0"], []), delimiter="|", end="\n", encoding="utf-8", zipped=False)  # the tab divides it too
def test_any_table_in_any_dialect_is_read_as_it_was_written(tmp_path, table, delimiter, end, encoding, zipped):
    header, rows = table
    assume(len(header) > 1 or delimiter == ",")  # one column has no delimiter to find
    data = as_csv([header, *rows], delimiter, end).encode(encoding)
    source, tickets, counts = read(tmp_path / "t.csv", gzip.compress(data) if zipped else data)
    assert source.columns == header
    assert values(tickets) == [dict(zip(header, row, strict=True)) for row in rows]
    assert counts == Counts(rows=len(rows), empty=0, replaced=0)
    assert source.kind == ("tsv" if delimiter == "\t" else "csv")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | CELL, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bodies=st.lists(st.dictionaries(NAME, JSON, min_size=1, max_size=4), min_size=1, max_size=5), ascii_=st.booleans())
def test_jsonl_values_are_texts_and_nested_ones_json(tmp_path, bodies, ascii_):
    lines = "\n".join(json.dumps(body, ensure_ascii=ascii_) for body in bodies)
    _, tickets, _ = read(tmp_path / "t.jsonl", lines)
    for ticket in tickets:
        body = bodies[ticket.row - 1]
        assert ticket.values.keys() == body.keys()
        for name, value in body.items():
            read_back = ticket.values[name]
            assert read_back == value if isinstance(value, str) else json.loads(read_back or "null") == value


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "id;title;body\n1;Büro;Der Drucker läuft nicht, bitte prüfen\n2;Accès;bloqué depuis le déjeuner\n"),
        ("cp1252", "id,body\n1,¿Cómo puedo cambiar la contraseña? Mi sesión caducó – está roto señor\n"),
        ("cp1252", "id,body\n1,Büro kaputt\n"),
        ("cp1251", "id,body\n1,Здравствуйте! Не могу войти в почту после смены пароля – помогите\n"),
        ("cp1250", "id,body\n1,Dzień dobry. Hasło wygasło wczoraj i nie mogę się zalogować. Żółć gęślą jaźń\n"),
        ("cp932", "id,body\n1,プリンターが動きません。至急ご確認をお願いします。\n"),
        ("gb18030", "id,body\n1,打印机无法使用，请尽快处理，谢谢。今天上午开始就一直报错\n"),
        ("utf-16-le", "id,body\n1,no mark at the beginning\n"),
        ("utf-16-be", "id,body\n1,no mark at the beginning\n"),
    ],
)  # fmt: skip
def test_older_encodings_are_recognised(tmp_path, encoding, text):
    _, tickets, _ = read(tmp_path / "t.csv", text.encode(encoding))
    assert [list(t.values.values()) for t in tickets] == list(csv.reader(text.splitlines()[1:], delimiter=text[2]))


def test_quotes_newlines_and_long_fields_survive(tmp_path):
    long = 'a "quoted", longish; text\n' * 8_000
    _, tickets, _ = read(tmp_path / "t.csv", as_csv([["id", "body"], ["1", long], ["2", "x"]]))
    assert len(long) > 200_000
    assert values(tickets) == [{"id": "1", "body": long}, {"id": "2", "body": "x"}]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_commas_in_the_text_do_not_hide_the_delimiter(tmp_path, delimiter):
    rows = [["id", "body"], ["1", "one, two, three"], ["2", "a, b"]]
    source, tickets, _ = read(tmp_path / "t.csv", "\n".join(delimiter.join(row) for row in rows))
    assert source.delimiter == delimiter
    assert tickets[0].values["body"] == "one, two, three"


def test_a_delimiter_under_which_the_header_breaks_is_not_taken(tmp_path):
    source, tickets, _ = read(tmp_path / "t.csv", '"x, y"|z\n1, 2|3\n4, 5|6\n')
    assert source.delimiter == "|"
    assert values(tickets) == [{"x, y": "1, 2", "z": "3"}, {"x, y": "4, 5", "z": "6"}]


def test_rows_keep_their_place_when_blank_ones_are_skipped(tmp_path):
    _, tickets, counts = read(tmp_path / "t.csv", "id,body\n1,a\n\n , \n2,b\n")
    assert [t.row for t in tickets] == [1, 4]
    assert counts == Counts(rows=2, empty=2, replaced=0)


def test_a_row_with_another_number_of_fields_says_so_and_harms_no_other(tmp_path):
    _, tickets, _ = read(tmp_path / "t.csv", "id,body\n1,a,b\n2\n3,c\n")
    assert tickets[0] == Ticket(1, {"id": "1", "body": "a"}, "expected 2 fields as in the header, found 3")
    assert tickets[1] == Ticket(2, {"id": "2"}, "expected 2 fields as in the header, found 1")
    assert tickets[2] == Ticket(3, {"id": "3", "body": "c"})


def test_a_quote_that_is_not_doubled_spoils_its_row_only(tmp_path):
    _, tickets, _ = read(tmp_path / "t.csv", 'id,body\n1,"say "hi" now"\n2,b\n')
    assert "line 2" in tickets[0].problem
    assert tickets[1] == Ticket(2, {"id": "2", "body": "b"})


def test_a_quote_never_closed_names_the_row_it_began_in(tmp_path):
    message = refusal(tmp_path / "t.csv", 'id,body\n1,"a\nb"\n2,"never closed\n3,c\n4,d\n')
    assert "t.csv, row 2:" in message
    assert "line 4" in message


def test_a_quote_never_closed_is_found_before_the_memory_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr("worker.tickets.MOST_CHARS", 1_000_000)
    message = refusal(tmp_path / "t.csv", 'id,body\n1,"' + "never closed\n" * 80_000)
    assert "row 1:" in message


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("worker.textfile.MOST_CHARS", 1_000_000)
    assert "a line of over" in refusal(tmp_path / "t.jsonl", '{"a": "' + "x" * 3 * CHUNK_BYTES)


def test_what_cannot_be_stored_is_replaced_and_counted(tmp_path):
    _, tickets, counts = read(tmp_path / "t.csv", "id,body\n1,a\x00b\ud800c\n")
    assert values(tickets) == [{"id": "1", "body": "a\ufffdb\ufffdc"}]
    assert counts.replaced == 2
    _, tickets, counts = read(tmp_path / "t.jsonl", r'{"i\u0000d": "a\ud83d", "smile": "\ud83d\ude00"}')
    assert values(tickets) == [{"i\ufffdd": "a\ufffd", "smile": "😀"}]
    assert counts.replaced == 2


def test_a_byte_that_does_not_fit_is_named_with_its_row(tmp_path):
    good = "".join(f"{n},ein schöner Tag\n" for n in range(1, 40_001)).encode()
    assert len(good) > CHUNK_BYTES
    message = refusal(tmp_path / "t.csv", b"id,body\n" + good + "40001,größer\n".encode("cp1252"))
    assert f"row 40001: byte 0xF6 at offset {len(good) + 8 + 8} is not utf-8" in message
    assert "iconv -f" in message


def test_damaged_utf8_is_not_taken_for_another_encoding(tmp_path):
    message = refusal(tmp_path / "t.csv", "id,body\n1,schön grün\n".encode() + b"2,sch\xc3n\n")
    assert "row 2: byte 0xC3" in message


def test_a_bad_byte_in_the_header_is_named(tmp_path):
    assert "header: byte 0xFF" in refusal(tmp_path / "t.csv", "grün,schön,".encode() + b"\xff\n1,2,3\n")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\n\n", "is empty"),
        (b"id,body,id\n1,2,3\n", "'id' stands there more than once"),
        (b"PK\x03\x04rest", "Excel"),
        (bytes(range(128, 256)) + b"\x00\x01", "not text"),
        (b'"id,body\n1,2\n', "never closed"),
        (b'"i"d,body\n1,2\n', "header: broken quoting"),
    ],
)
def test_files_that_cannot_be_used_say_why(tmp_path, data, said):
    assert said in refusal(tmp_path / "t.csv", data)


@pytest.mark.parametrize("text", ['[{"a": 1}]', '[\n  {"a": 1}\n]', '{\n  "a": 1\n}'])
def test_one_json_document_is_refused_with_a_way_out(tmp_path, text):
    assert "jq" in refusal(tmp_path / "t.json", text)


def test_a_header_alone_has_no_tickets(tmp_path):
    source, tickets, counts = read(tmp_path / "t.csv", "id,body\n")
    assert (source.columns, tickets, counts) == (["id", "body"], [], Counts(0, 0, 0))


def test_a_column_without_a_name_gets_one(tmp_path):
    source, tickets, _ = read(tmp_path / "t.csv", ", title ,\n0,a,\n")
    assert source.columns == ["column 1", "title", "column 3"]
    assert tickets[0].values == {"column 1": "0", "title": "a", "column 3": ""}


def test_a_bad_json_line_is_a_problem_of_its_row(tmp_path):
    deep = "[" * 100_000
    text = f'{{"a": "1"}}\n{{"a": secret}}\n[1]\n{{"a": NaN}}\n{{"a": {deep}\n\n{{"b": "2"}}\n'
    source, tickets, counts = read(tmp_path / "t.jsonl", text)
    assert [t.row for t in tickets] == [1, 2, 3, 4, 5, 7]
    assert [bool(t.problem) for t in tickets] == [False, True, True, True, True, False]
    assert not any("secret" in (t.problem or "") for t in tickets)
    assert source.columns == ["a", "b"]
    assert counts == Counts(rows=6, empty=1, replaced=0)


def test_openai_batch_lines_are_known_by_what_they_hold(tmp_path):
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}
    source, tickets, _ = read(tmp_path / "batch", json.dumps(line) + "\nnot json\n")
    assert (source.kind, source.columns, source.delimiter) == ("openai", None, None)
    assert tickets[0] == Ticket(1, {}, line=line)
    assert tickets[1].problem
    assert tickets[1].line is None


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_end_may_fall_between_two_chunks(tmp_path, end):
    beginning = f"id,body{end}1,"
    for before in (-1, 0, 1):
        long = "x" * (CHUNK_BYTES - len(beginning) + before - 1)
        _, tickets, counts = read(tmp_path / "t.csv", f"{beginning}{long}{end}2,b{end}")
        assert values(tickets) == [{"id": "1", "body": long}, {"id": "2", "body": "b"}]
        assert counts.empty == 0


def test_a_character_may_fall_between_two_chunks(tmp_path):
    beginning = "id,body\n1,"
    long = "x" * (CHUNK_BYTES - len(beginning) - 1) + "ü and on"
    source, tickets, _ = read(tmp_path / "t.csv", f"{beginning}{long}\n")
    assert source.encoding == "utf-8"
    assert values(tickets) == [{"id": "1", "body": long}]


def test_a_damaged_gzip_file_is_refused(tmp_path):
    whole = gzip.compress(as_csv([["id", "body"], *([n, os.urandom(20).hex()] for n in range(40_000))]).encode())
    garbled = whole[:10] + b"\xff" * 100 + whole[110:]
    for data in (whole[:-200_000], whole[:-8] + b"checksum", garbled, b"\x1f\x8bnot gzip"):
        assert "damaged" in refusal(tmp_path / "t.csv.gz", data)


def test_a_file_that_is_not_there_or_is_a_directory_is_refused(tmp_path):
    with pytest.raises(NotFound, match=r"nothing\.csv"):
        open_tickets(str(tmp_path / "nothing.csv"))
    with pytest.raises(UsageError, match="Is a directory"):
        open_tickets(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.touch(mode=0o000)
    with pytest.raises(UsageError, match="Permission"):
        open_tickets(str(path))


def test_stdin_is_read_when_the_path_is_a_dash():
    code = "from worker.tickets import open_tickets\nwith open_tickets('-') as s: print(s.name, [t.values for t in s])"
    data = gzip.compress(b"id,body\n1,a\n")
    ran = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert ran.stdout.decode().strip() == "stdin [{'id': '1', 'body': 'a'}]"


def test_memory_stays_flat_over_100_000_rows(tmp_path):
    path = tmp_path / "t.csv"
    with path.open("w") as out:
        out.write("id,title,body\n")
        out.writelines(f"{n},printer on fire,{'please send help ' * 10}\n" for n in range(100_000))
    assert path.stat().st_size > 16_000_000
    tracemalloc.start()
    try:
        with open_tickets(str(path)) as source:
            assert sum(1 for _ in source) == 100_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 2


@pytest.mark.skipif(not REAL_FILE.exists(), reason=f"{REAL_FILE.name} is not beside the project")
def test_the_file_of_real_tickets_is_read_whole():
    source, tickets, counts = read(REAL_FILE)
    assert source.columns[:2] == ["title", "body"]
    assert counts == Counts(rows=5431, empty=0, replaced=0)
    assert not any(t.problem for t in tickets)


def test_the_sample_of_the_demo_is_read_whole():
    source, tickets, counts = read(DEMO_FILE)
    assert source.columns == ["id", "title", "body", "language"]
    assert counts == Counts(rows=240, empty=0, replaced=0)
    assert len({t["id"] for t in values(tickets)}) == 240
    assert len({t["body"] for t in values(tickets)}) == 240
