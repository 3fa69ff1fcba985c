"""Files over HTTP: what is uploaded comes back as it was, in OpenAI's words, and what breaks off leaves nothing."""

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from api.form import FileForm
from api.openai_errors import OpenAIError
from worker import files

LINE = b'{"custom_id": "T-1", "body": {"messages": [{"role": "user", "content": "hi"}]}}\n'


def upload(stage, content=LINE, name="tickets.jsonl", headers=None, **fields):
    return stage.client.post("/v1/files", files={"file": (name, content)}, data={"purpose": "batch", **fields}, headers=headers)


def uploaded(stage, content=LINE, **fields):
    response = upload(stage, content, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def refused(response, status, message, param=None):
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert message in error["message"]
    return True


def form(*parts, end=b"--X--\r\n"):
    return b"".join(b"--X\r\n" + head + b"\r\n\r\n" + content + b"\r\n" for head, content in parts) + end


FILE = b'Content-Disposition: form-data; name="file"; filename="a.jsonl"'
PURPOSE = b'Content-Disposition: form-data; name="purpose"'


def post(stage, body, content_type="multipart/form-data; boundary=X"):
    return stage.client.post("/v1/files", content=body, headers={"Content-Type": content_type})


def nothing_is_left(stage):
    return stage.sql("SELECT FROM files") == [] and stage.sql("SELECT FROM file_chunks") == []


def test_an_uploaded_file_is_described_as_openai_does(stage):
    file = uploaded(stage)
    assert files.from_wire(file["id"]) is not None
    assert file == {
        "id": file["id"],
        "object": "file",
        "bytes": len(LINE),
        "created_at": file["created_at"],
        "filename": "tickets.jsonl",
        "purpose": "batch",
        "status": "processed",
        "expires_at": file["expires_at"],
    }
    assert file["expires_at"] - file["created_at"] in (2_592_000, 2_592_001)
    assert stage.client.get(f"/v1/files/{file['id']}").json() == file


@pytest.mark.parametrize("size", [0, 1, files.PIECE_BYTES - 1, files.PIECE_BYTES, files.PIECE_BYTES + 1, 3 * files.PIECE_BYTES + 7])
def test_content_comes_back_byte_by_byte_whatever_its_size(stage, size):
    content = (bytes(range(256)) * (size // 256 + 1))[:size]
    file = uploaded(stage, content)
    assert file["bytes"] == size
    response = stage.client.get(f"/v1/files/{file['id']}/content")
    assert response.content == content
    assert response.headers["content-length"] == str(size)
    pieces = [row.n for row in stage.sql("SELECT length(data) AS n FROM file_chunks ORDER BY seq")]
    assert all(n == files.PIECE_BYTES for n in pieces[:-1])
    assert sum(pieces) == size


def test_content_that_looks_like_a_boundary_is_content(stage):
    content = b"\r\n--\r\n--Y--\r\n-X\r\n\r\n--\r" * 1000
    assert post(stage, form((FILE, content), (PURPOSE, b"batch"))).status_code == 200
    (row,) = stage.sql("SELECT data FROM file_chunks")
    assert row.data == content


def test_fields_may_stand_before_or_behind_the_file(stage):
    for parts in ([(FILE, LINE), (PURPOSE, b"batch")], [(PURPOSE, b"batch"), (FILE, LINE)]):
        assert post(stage, form(*parts)).json()["bytes"] == len(LINE)


def test_a_file_says_how_long_it_is_kept(stage):
    file = uploaded(stage, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
    assert file["expires_at"] - file["created_at"] in (3_600, 3_601)


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"purpose": "fine-tune"}, "expected 'batch'", "purpose"),
        ({"purpose": "batch_output"}, "expected 'batch'", "purpose"),
        ({"purpose": ""}, "expected 'batch'", "purpose"),
        ({"expires_after[seconds]": "3600"}, "Field required", "expires_after.anchor"),
        ({"expires_after[anchor]": "created_at"}, "Field required", "expires_after.seconds"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}, "3600", "expires_after.seconds"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "soon"}, "integer", "expires_after.seconds"),
        ({"purpose": "x" * 2000}, "longer than 1024 bytes", "purpose"),
    ],
)
def test_a_field_that_cannot_be_used_is_named_and_nothing_is_kept(stage, fields, message, param):
    assert refused(upload(stage, **fields), 400, message, param)
    assert nothing_is_left(stage)


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (form((FILE, LINE)), "expected 'batch'", "purpose"),
        (form((PURPOSE, b"batch")), "file: missing", "file"),
        (form((PURPOSE, b"batch"), (b'Content-Disposition: form-data; name="file"', LINE)), "with a filename", "file"),
        (form((FILE, LINE), (FILE, LINE), (PURPOSE, b"batch")), "expected one file", "file"),
        (form((FILE.replace(b'"file"', b'"other"'), LINE)), "expected one file", "file"),
        (form((FILE, LINE), (PURPOSE, b"batch"), end=b""), "breaks off", None),
        (form(*[(PURPOSE, b"batch")] * 21), "more than 20 parts", None),
        (form((b"Content-Disposition: " + b"x" * 9000, LINE)), "no multipart form", None),
        (form((b"\x00\xff: x", LINE)), "no multipart form", None),
        (b"", "breaks off", None),
        (b"--Y\r\n", "no multipart form", None),
        (b"\x00" * 100, "no multipart form", None),
    ],
)
def test_a_body_that_is_no_form_with_one_file_is_refused_and_nothing_is_kept(stage, body, message, param):
    assert refused(post(stage, body), 400, message, param)
    assert nothing_is_left(stage)


_PIECE = st.one_of(st.binary(max_size=40), st.sampled_from([b"--X", b"\r\n", b"--X--\r\n", FILE, PURPOSE, b": ", b"; ", b"\r\n\r\n"]))


@given(body=st.lists(_PIECE, max_size=30).map(b"".join), cut=st.integers(1, 50))
@example(body=form((FILE, LINE), (PURPOSE, b"batch")), cut=1)
def test_any_body_is_a_form_or_refused_and_its_file_is_the_same_however_it_is_cut(body, cut):
    def read(size):
        reading = FileForm("multipart/form-data; boundary=X")
        try:
            content = b"".join(reading.feed(body[start : start + size]) for start in range(0, len(body), size))
            return reading.end(), reading.fields, content
        except OpenAIError as error:
            return error.status

    assert read(cut) == read(max(1, len(body)))
    assert isinstance(read(cut), tuple) or read(cut) == 400


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "application/json",
        "multipart/mixed; boundary=X",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "b" * 300,
    ],
)
def test_a_content_type_that_is_no_form_is_refused(stage, content_type):
    assert refused(post(stage, form((FILE, LINE), (PURPOSE, b"batch")), content_type), 400, "", None)
    assert nothing_is_left(stage)


def test_a_file_that_is_too_large_is_refused_and_nothing_is_kept(stage, monkeypatch):
    monkeypatch.setattr("api.files.MAX_FILE_BYTES", 3 * files.PIECE_BYTES)
    assert refused(upload(stage, bytes(3 * files.PIECE_BYTES + 1)), 413, "3145728 bytes", "file")
    assert nothing_is_left(stage)
    assert uploaded(stage, bytes(3 * files.PIECE_BYTES))["bytes"] == 3 * files.PIECE_BYTES


def test_a_form_is_bounded_as_a_whole_too(stage, monkeypatch):
    monkeypatch.setattr("api.envelope.MAX_FILE_BYTES", 2 * files.PIECE_BYTES)
    assert refused(upload(stage, bytes(4 * files.PIECE_BYTES)), 413, "a request may have")
    assert nothing_is_left(stage)


def test_other_bodies_keep_their_bound(stage):
    response = stage.client.post("/v1/batches", content=b'{"metadata": "' + b"x" * (1 << 20) + b'"}')
    assert response.status_code == 413


def test_an_upload_that_breaks_off_leaves_nothing(stage):
    begun = form((PURPOSE, b"batch"), end=b"") + b"--X\r\n" + FILE + b"\r\n\r\n" + bytes(2 * files.PIECE_BYTES)
    bodies = [{"type": "http.request", "body": begun, "more_body": True}, {"type": "http.disconnect"}]
    pieces = []

    async def receive():
        pieces.append(stage.sql("SELECT FROM file_chunks"))
        return bodies.pop(0)

    async def send(message):
        pass

    headers = {**stage.client.headers, "content-type": "multipart/form-data; boundary=X"}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/files",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "app": stage.client.app,
    }
    stage.client.portal.call(stage.client.app, scope, receive, send)
    assert [len(found) for found in pieces] == [0, 2]
    assert nothing_is_left(stage)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("Übergröße ✓.jsonl", "Übergröße ✓.jsonl"),
        ("a" * 300, "a" * 255),
        ("nul\x00.jsonl", "nul\ufffd.jsonl"),
        ("..\\..\\x", "..\\..\\x"),
        ("", "upload"),
    ],
)
def test_a_filename_is_kept_as_far_as_it_can_be(stage, given, kept):
    head = b'Content-Disposition: form-data; name="file"; filename="' + given.replace("\\", "\\\\").encode() + b'"'
    assert post(stage, form((head, LINE), (PURPOSE, b"batch"))).json()["filename"] == kept


def test_files_are_listed_page_by_page_in_either_order(stage):
    made = [upload(stage, name=f"{n}.jsonl").json()["id"] for n in range(5)]
    for order, wanted in (("asc", made), ("desc", made[::-1])):
        seen, after = [], None
        while True:
            page = stage.client.get("/v1/files", params={"limit": 2, "order": order} | ({"after": after} if after else {})).json()
            seen += [file["id"] for file in page["data"]]
            assert (page["object"], page["first_id"], page["last_id"]) == ("list", page["data"][0]["id"], page["data"][-1]["id"])
            if not page["has_more"]:
                break
            after = page["last_id"]
        assert seen == wanted
    assert [file["id"] for file in stage.client.get("/v1/files").json()["data"]] == made[::-1]


def test_files_are_listed_by_purpose(stage):
    uploaded(stage)
    listed = {p: len(stage.client.get("/v1/files", params={"purpose": p}).json()["data"]) for p in ("batch", "batch_output", "x", "\x00")}
    assert listed == {"batch": 1, "batch_output": 0, "x": 0, "\x00": 0}
    empty = stage.client.get("/v1/files", params={"purpose": "x"}).json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "limit=x", "order=up", "after=nobody", "after=batch_" + "0" * 32])
def test_a_listing_that_cannot_be_is_refused(stage, query):
    assert refused(stage.client.get(f"/v1/files?{query}"), 400, "", query.partition("=")[0])


def test_a_deleted_file_is_gone_with_its_content(stage):
    file = uploaded(stage)
    assert stage.client.delete(f"/v1/files/{file['id']}").json() == {"id": file["id"], "object": "file", "deleted": True}
    assert nothing_is_left(stage)
    for response in (
        stage.client.get(f"/v1/files/{file['id']}"),
        stage.client.get(f"/v1/files/{file['id']}/content"),
        stage.client.delete(f"/v1/files/{file['id']}"),
    ):
        assert refused(response, 404, "there is no file", "file_id")


@pytest.mark.parametrize("file_id", ["nobody", "file-", "file-XYZ", "file-" + "0" * 32, "0" * 32, "%00", "file-%ff", "file-" + "0" * 5000])
def test_a_file_that_never_was_is_a_404(stage, file_id):
    for response in (stage.client.get(f"/v1/files/{file_id}"), stage.client.get(f"/v1/files/{file_id}/content")):
        assert refused(response, 404, "there is no file", "file_id")


def test_files_of_another_tenant_do_not_exist(stage):
    file, theirs = uploaded(stage), stage.key("them")
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert stage.client.request(method, f"/v1/files/{file['id']}{path}", headers=theirs).status_code == 404
    assert stage.client.get("/v1/files", headers=theirs).json()["data"] == []
    assert stage.client.get("/v1/files", headers=theirs, params={"after": file["id"]}).json()["data"] == []
    assert stage.client.get(f"/v1/files/{file['id']}").status_code == 200


def test_a_file_past_its_time_or_not_yet_whole_does_not_exist(stage):
    for change in ("expires_at = now()", "state = 'uploading'"):
        file = uploaded(stage)
        stage.sql(f"UPDATE files SET {change}")
        assert stage.client.get(f"/v1/files/{file['id']}").status_code == 404
        assert stage.client.get(f"/v1/files/{file['id']}/content").status_code == 404
        assert stage.client.delete(f"/v1/files/{file['id']}").status_code == 404
        assert stage.client.get("/v1/files").json()["data"] == []
        stage.sql("DELETE FROM files")


def test_a_download_whose_file_is_deleted_breaks_off(stage):
    file = uploaded(stage, bytes(4 * files.PIECE_BYTES))
    stage.sql("DELETE FROM file_chunks WHERE seq = 3")
    response = stage.client.get(f"/v1/files/{file['id']}/content")
    assert response.headers["content-length"] == str(4 * files.PIECE_BYTES)
    assert len(response.content) == 3 * files.PIECE_BYTES  # so that the client knows


def test_a_key_that_may_only_read_uploads_and_deletes_nothing(stage):
    file = uploaded(stage)
    stage.sql("UPDATE api_keys SET scopes = '{read}'")
    assert upload(stage).status_code == 403
    assert stage.client.delete(f"/v1/files/{file['id']}").status_code == 403
    assert stage.client.get(f"/v1/files/{file['id']}").status_code == 200


def allowing(stage, most):
    stage.client.app.state.parts = replace(stage.client.app.state.parts, max_files_bytes=most)


def test_a_tenants_files_have_so_many_bytes_at_most(stage):
    allowing(stage, 2 * len(LINE))
    first, _ = uploaded(stage), uploaded(stage)
    response = upload(stage)
    refused(response, 400, "delete some first")
    assert response.json()["error"]["code"] == "storage_limit_exceeded"
    assert len(stage.sql("SELECT FROM files")) == 2
    uploaded(stage, headers=stage.key("other"))
    stage.client.delete(f"/v1/files/{first['id']}")
    uploaded(stage)


def test_what_is_uploaded_at_the_same_time_counts(stage):
    allowing(stage, 2 * len(LINE))
    stage.sql(
        """INSERT INTO files (id, tenant, purpose, filename, state, bytes)
           VALUES (gen_random_uuid(), 'default', 'batch', '', 'uploading', :n)""",
        n=len(LINE) + 1,
    )
    refused(upload(stage), 400, "delete some first")


def test_with_no_room_left_nothing_is_read(stage):
    allowing(stage, len(LINE) - 1)
    stage.sql(
        """INSERT INTO files (id, tenant, purpose, filename, state, bytes)
           VALUES (gen_random_uuid(), 'default', 'batch_output', '', 'ready', :n)""",
        n=len(LINE),
    )
    refused(post(stage, b"no form at all"), 400, "delete some first")
