"""`/v1/files`: uploads and the files of data sets, as OpenAI's client knows them.

An upload is checked before the reply, so one that can't be trained on is refused with the lines
that are wrong. What it holds is kept and handed out as rows of TRL's form.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse

from feedback import uploads
from feedback.errors import BadRequest, Conflict, NotFound
from feedback.formats.records import Limits
from feedback.formats.rows import FORMATS
from feedback.reading import Abandoned, Effort
from feedback.tables import File
from feedback.uploads import Incoming, Quota, Upload
from server.access import visibility
from server.access.keyring import Caller
from server.access.visibility import append_audit, get_file
from server.endpoints.dependencies import CallerDep, GatewayDep, ReadSession
from server.endpoints.multipart import Form, receive_form
from server.gateway import Gateway
from server.http.intake import READERS
from server.http.replies import IGNORED_HEADER
from server.settings import GatewaySettings
from server.views.files import FileObject, view_file
from server.views.objects import Deleted, Page, page
from tuner.evaluation.evaluations import find_evaluation_on
from tuner.tuning import find_job_on

router = APIRouter(prefix="/v1/files", tags=["files"])

PURPOSE = "fine-tune"
JSON_LINES = "application/jsonl"

# They wait for the children that read; the loop's own threads are for work that chats wait for.
_READING = ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="upload")
_FIELDS = ("purpose", "format", "columns")
_IGNORED = ("expires_after", "expires_after[anchor]", "expires_after[seconds]")
_FORM_OVERHEAD_BYTES = 64 * 1024  # boundaries, headers and fields around the file
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": [PURPOSE]},
        "format": {
            "type": "string",
            "enum": list(FORMATS),
            "description": "Only needed where the content doesn't tell.",
        },
        "columns": {
            "type": "string",
            "description": "JSON object: our names of columns to the file's.",
        },
        "expires_after[anchor]": {"type": "string", "description": "Ignored: files are kept."},
        "expires_after[seconds]": {"type": "string", "description": "Ignored: files are kept."},
    },
}


@router.post(
    "",
    openapi_extra={
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
    },
)
async def create_file(
    request: Request, response: Response, caller: CallerDep, gateway: GatewayDep
) -> FileObject:
    """Upload training data; a file that can't be trained on is refused line by line."""
    settings, user = gateway.settings.gateway, caller.key.user
    with gateway.intake.admit(user):
        incoming = await asyncio.to_thread(_begin, gateway, user)
        try:
            most = settings.max_upload_bytes + _FORM_OVERHEAD_BYTES
            form = await receive_form(request, incoming.original, most=most)
            if ignored := _check_fields(form, settings):
                response.headers[IGNORED_HEADER] = ignored
            async with gateway.intake.turn(user):
                return await _read(request, gateway, caller, incoming, form)
        finally:
            await asyncio.shield(asyncio.to_thread(incoming.discard))


@router.get("")
def list_files(
    caller: CallerDep,
    session: ReadSession,
    gateway: GatewayDep,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Page[FileObject]:
    """Uploads, and files of the data sets that the caller sees."""
    rows, has_more = visibility.list_files(
        session, caller, purpose=purpose, after=after, limit=limit, descending=order == "desc"
    )
    return page([view_file(row, gateway.settings.data) for row in rows], has_more)


@router.get("/{file_id}")
def get_one_file(
    file_id: str, caller: CallerDep, session: ReadSession, gateway: GatewayDep
) -> FileObject:
    """One file's facts."""
    return view_file(get_file(session, caller, file_id), gateway.settings.data)


@router.delete("/{file_id}")
def delete_file(file_id: str, caller: CallerDep, gateway: GatewayDep) -> Deleted:
    """Delete an upload. Releases that learned from it stay."""
    with gateway.database.write() as session:
        get_file(session, caller, file_id)
        row = uploads.lock_upload(session, file_id)
        if row is not None:
            job_id = find_job_on(session, file_id) or find_evaluation_on(session, file_id)
            if job_id is not None:
                raise Conflict(
                    f"{job_id} still needs {file_id}; cancel it, or wait for its end",
                    code="file_in_use",
                )
            append_audit(session, caller, "file_deleted", file_id, sha256=row.sha256)
            session.delete(row)
    uploads.remove_content(gateway.settings.data, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


@router.get(
    "/{file_id}/content",
    response_class=FileResponse,
    responses={200: {"content": {JSON_LINES: {"schema": {"type": "string"}}}}},
)
def get_content(
    file_id: str, caller: CallerDep, session: ReadSession, gateway: GatewayDep
) -> FileResponse:
    """The file itself: JSON lines."""
    row = get_file(session, caller, file_id)
    return FileResponse(
        _locate(gateway.settings.data, row),
        media_type=JSON_LINES,
        filename=row.filename,
    )


def _locate(data: Path, row: File) -> Path:
    """Where the file lies. Raises NotFound where it is not below the data directory."""
    path = uploads.find_content(data, row)
    if path is None:
        raise NotFound(f"the content of {row.id!r} is no longer there", code="content_missing")
    return path


def _begin(gateway: Gateway, user: str) -> Incoming:
    """Room for a file, where the user may keep another."""
    with gateway.database.read() as session:
        uploads.check_quota(session, user, _quota(gateway))
        uploads.remove_leftovers(session, gateway.settings.data)
    return uploads.begin(gateway.settings.data)


def _quota(gateway: Gateway) -> Quota:
    settings = gateway.settings.gateway
    return Quota(settings.max_stored_uploads, settings.max_stored_upload_bytes)


def _check_fields(form: Form, settings: GatewaySettings) -> str | None:
    """The field that is ignored, by its name. Raises BadRequest for what can't be meant."""
    purpose = form.fields.get("purpose")
    if purpose != PURPOSE:
        raise BadRequest(f"found purpose {purpose!r:.100}, expected {PURPOSE!r}", param="purpose")
    unknown = next((name for name in form.fields if name not in (*_FIELDS, *_IGNORED)), None)
    if unknown is not None:
        raise BadRequest(
            f"unknown field {unknown[:100]!r}; expected file, {', '.join(_FIELDS)}",
            param=unknown[:100],
        )
    if not any(name in form.fields for name in _IGNORED):
        return None
    if settings.strict:
        raise BadRequest(
            "expires_after has no effect: a file is kept until it is deleted; this gateway is "
            "strict",
            param="expires_after",
        )
    return "expires_after"


async def _read(
    request: Request, gateway: Gateway, caller: Caller, incoming: Incoming, form: Form
) -> FileObject:
    """Have the file read; that ends when the client goes away."""
    loop = asyncio.get_running_loop()
    reading = loop.run_in_executor(_READING, _accept, gateway, caller, incoming, form)
    leaving = asyncio.ensure_future(_wait_until_gone(request))
    either: set[asyncio.Future[Any]] = {reading, leaving}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not reading.done():
            incoming.reader.abandon()
            await asyncio.wait({reading})
    try:
        return reading.result()
    except Abandoned:
        raise BadRequest("the connection ended before the reply") from None


async def _wait_until_gone(request: Request) -> None:
    """Return when the client has closed the connection; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _accept(gateway: Gateway, caller: Caller, incoming: Incoming, form: Form) -> FileObject:
    """Check what arrived, keep it, and write its row."""
    settings = gateway.settings.gateway
    upload = uploads.accept(
        incoming,
        filename=form.filename,
        format=form.fields.get("format"),
        columns=_columns(form.fields.get("columns")),
        limits=Limits(bytes=settings.max_upload_bytes),
        effort=Effort(settings.upload_memory_bytes, settings.upload_timeout_seconds),
    )
    try:
        return _record(gateway, caller, upload)
    except BaseException:
        uploads.remove_content(gateway.settings.data, upload.id)
        raise


def _columns(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest("columns is no JSON", param="columns") from None


def _record(gateway: Gateway, caller: Caller, upload: Upload) -> FileObject:
    with gateway.database.write() as session:
        uploads.check_quota(session, caller.key.user, _quota(gateway), more=upload)
        row = uploads.create_file(session, upload, person_id=caller.person_id)
        append_audit(
            session,
            caller,
            "file_created",
            row.id,
            kind=upload.kind,
            rows=upload.rows,
            sha256=upload.sha256,
            original_sha256=upload.original_sha256,
        )
        return view_file(row, gateway.settings.data)
