"""Files as OpenAI's Files API has them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from api import examples
from api.auth import Reads, Submits
from api.envelope import MAX_FILE_BYTES
from api.form import FileForm
from api.openai_errors import OpenAIError, documented_openai
from api.parts import Opened
from api.spelling import Spelled
from worker import files
from worker.files import FileView, Purpose

EXPIRES_S = 30 * 86_400  # https://platform.openai.com/docs/api-reference/files/create: of a file for a batch, unless it says otherwise

_After = Spelled("^(file-[0-9a-f]{32})?$", "the id of a file")

router = APIRouter(prefix="/v1", tags=["openai"], responses=documented_openai(401, 403, 503))


class ExpiresAfter(BaseModel):
    """Counted from when the file is whole."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3_600, le=2_592_000)


class _Fields(BaseModel):
    """Of the form, beside the file."""

    purpose: Literal["batch"]
    expires_after: ExpiresAfter | None = None


class FileOut(BaseModel):
    """OpenAI's file object; times are Unix seconds."""

    model_config = ConfigDict(json_schema_extra={"example": examples.FILE})

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"
    expires_at: int | None

    @classmethod
    def of(cls, file: FileView) -> FileOut:
        return cls(
            id=file.wire_id,
            bytes=file.bytes,
            created_at=int(file.created_at.timestamp()),
            filename=file.filename,
            purpose=file.purpose,
            expires_at=int(file.expires_at.timestamp()) if file.expires_at else None,
        )


class FileList(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.page_of(examples.FILE)})

    object: Literal["list"] = "list"
    data: list[FileOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedOut(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": {"id": examples.FILE["id"], "object": "file", "deleted": True}})

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


_FORM_FIELDS = {"purpose", "expires_after[anchor]", "expires_after[seconds]"}
_FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary", "description": "JSON Lines, one request a line."},
                    "purpose": {"type": "string", "enum": ["batch"]},
                    "expires_after[anchor]": {"type": "string", "enum": ["created_at"], "description": "With seconds, or neither."},
                    "expires_after[seconds]": {"type": "integer", "minimum": 3_600, "maximum": 2_592_000},
                },
            },
            "example": {"file": json.dumps(examples.REQUEST_LINE) + "\n", "purpose": "batch"},
        }
    },
}


@router.post("/files", responses=documented_openai(400, 413), openapi_extra={"requestBody": _FORM})
async def upload_file(request: Request, caller: Submits, parts: Opened) -> FileOut:
    """Keeps the file, of 200 MiB at most, for 30 days unless `expires_after` says otherwise. It is there once it is whole.

    400 with code `storage_limit_exceeded`: the tenant's files have more than `BACKSTOP_MAX_FILES_GB`, or would have with this one.
    """
    await _check_room(parts, caller.tenant)
    form = FileForm(request.headers.get("content-type", ""))
    async with files.uploading(parts.db, caller.tenant) as upload:
        try:
            async for data in request.stream():
                await upload.write(form.feed(data))
                if upload.bytes > MAX_FILE_BYTES:
                    raise OpenAIError(413, f"file: larger than {MAX_FILE_BYTES} bytes, make several of it", param="file")
        except ClientDisconnect:
            raise OpenAIError(400, "the upload broke off: send it again") from None
        filename, fields = form.end(), _fields(form.fields)
        await upload.flush()
        await _check_room(parts, caller.tenant)  # of those uploaded side by side, the last to look sees all
        expires_s = fields.expires_after.seconds if fields.expires_after else EXPIRES_S
        return FileOut.of(await upload.finish(purpose=fields.purpose, filename=filename, expires_s=expires_s))


async def _check_room(parts: Opened, tenant: str) -> None:
    if await files.stored(parts.db, tenant) > parts.max_files_bytes:
        most = f"{parts.max_files_bytes / 1e9:g} GB"
        raise OpenAIError(400, f"your files have more than {most} with this one: delete some first", code="storage_limit_exceeded")


def _fields(given: dict[str, str]) -> _Fields:
    if unknown := given.keys() - _FORM_FIELDS:
        raise OpenAIError(400, f"{min(unknown)[:50]}: unknown field of the form", param=min(unknown)[:50])
    after = {name: given[f"expires_after[{name}]"] for name in ("anchor", "seconds") if f"expires_after[{name}]" in given}
    values: dict[str, Any] = {"purpose": given.get("purpose")} | ({"expires_after": after} if after else {})
    try:
        return _Fields.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        param = ".".join(str(part) for part in fault["loc"])
        if param == "purpose":
            raise OpenAIError(400, "purpose: expected 'batch', the only purpose a file can have here", param=param) from None
        raise OpenAIError(400, f"{param}: {fault['msg']}", param=param) from None


@router.get("/files", responses=documented_openai(400))
async def list_files(
    caller: Reads,
    parts: Opened,
    purpose: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str, _After, Query(description="The id of the last file of the page before.")] = "",
) -> FileList:
    """Uploaded files and those that batches have written, newest first unless `order` is `asc`."""
    cursor = files.from_wire(after)
    known = None if purpose is None else purpose.replace("\x00", "")
    page = await files.listed(parts.db, caller.tenant, limit=limit + 1, purpose=known, after=cursor, oldest_first=order == "asc")
    data = [FileOut.of(file) for file in page[:limit]]
    return FileList(data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=len(page) > limit)


@router.get("/files/{file_id}", responses=documented_openai(404))
async def retrieve_file(file_id: str, caller: Reads, parts: Opened) -> FileOut:
    return FileOut.of(await known_file(parts, file_id, caller.tenant))


@router.delete("/files/{file_id}", responses=documented_openai(404))
async def delete_file(file_id: str, caller: Submits, parts: Opened) -> DeletedOut:
    """A batch that has not read the file to its end yet fails, or is cancelled if some of it was submitted already."""
    found = files.from_wire(file_id)
    if found is None or not await files.delete(parts.db, found, caller.tenant):
        raise no_file(file_id)
    return DeletedOut(id=file_id)


@router.get("/files/{file_id}/content", response_class=StreamingResponse, responses=documented_openai(404))
async def file_content(file_id: str, caller: Reads, parts: Opened) -> StreamingResponse:
    """The bytes as they were uploaded, or written."""
    file = await known_file(parts, file_id, caller.tenant)
    headers = {"Content-Length": str(file.bytes)}
    return StreamingResponse(files.pieces(parts.db, file), media_type="application/octet-stream", headers=headers)


async def known_file(parts: Opened, file_id: str, tenant: str, param: str = "file_id") -> FileView:
    """The tenant's file of that id. Raises OpenAIError, a 404."""
    found: UUID | None = files.from_wire(file_id)
    file = await files.one(parts.db, found, tenant) if found else None
    if file is None:
        raise no_file(file_id, param)
    return file


def no_file(file_id: str, param: str = "file_id") -> OpenAIError:
    """The answer to an id that is none of the tenant's."""
    return OpenAIError(404, f"there is no file {file_id[:50]!r}", param=param)
