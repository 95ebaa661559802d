"""/v1/files and /v1/batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request
from pydantic import ValidationError
from starlette.responses import FileResponse, Response

from gptoss.api.access.api_keys import tenant_of
from gptoss.api.batches.records import StoredBatch, StoredFile
from gptoss.api.batches.schema import BatchesQuery, BatchRequest, FilesQuery
from gptoss.api.batches.service import BatchService
from gptoss.api.batches.upload import FileFields, Upload, UploadLimits, receive
from gptoss.api.context import Context, ServerContext, caller_of
from gptoss.api.http.body import read_json_object
from gptoss.api.http.errors import Forbidden, InvalidRequest, NotFound, from_validation
from gptoss.api.http.openapi import json_body, object_of, query

router = APIRouter()
R = TypeVar("R", StoredFile, StoredBatch)
_TEXT = {"type": "string"}
_FORM = object_of(
    {"file": _TEXT, "purpose": {"const": "batch"}},
    {"expires_after[anchor]": {"const": "created_at"}, "expires_after[seconds]": {"type": "integer"}},
)
_UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}
_CONTENT: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {"schema": _TEXT}}}}


def get_service(request: Request) -> BatchService:
    """The server's batches. Raises NotFound if they are off."""
    service: BatchService | None = request.app.state.batches
    if service is None:
        raise NotFound(
            "Files and batches are off on this server: start it with --batch-dir, a folder for them.",
            None,
            "batches_off",
        )
    return service


Service = Annotated[BatchService, Depends(get_service)]


@router.post("/v1/files", openapi_extra=_UPLOAD)
async def upload_file(request: Request, context: Context, service: Service) -> dict[str, Any]:
    """Stores the input of a batch, as it arrives."""
    check_origin(request, context)
    store, owner, num_reserved = service.store, _owner(request), 0
    path = store.begin_upload(owner)

    def reserve(num_bytes: int) -> None:
        nonlocal num_reserved
        store.reserve(owner, num_bytes)
        num_reserved += num_bytes

    limits = UploadLimits(context.config.batch_max_file_bytes, context.config.body_timeout_s, reserve)
    try:
        upload = await receive(request, path, limits)
        try:
            file = _file_of(upload, owner, path.name, store.retention_s)
            await store.add_file(file)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    except BaseException:
        store.count_bytes(owner, -num_reserved)
        raise
    return file.shown()


def _file_of(upload: Upload, owner: str, file_id: str, retention_s: int) -> StoredFile:
    """The record of an upload. Raises InvalidRequest."""
    try:
        fields = FileFields.model_validate(upload.fields)
    except ValidationError as error:  # brackets are part of these fields' names
        raise from_validation(error, name_of=lambda location: str(location[0]) if location else None) from error
    if not upload.has_file:
        raise InvalidRequest("Missing required parameter: 'file'.", "file", "missing_required_parameter")
    if not upload.num_bytes:
        raise InvalidRequest("The file is empty.", "file", "empty_file")
    now = int(time.time())
    return StoredFile(
        id=file_id,
        owner=owner,
        bytes=upload.num_bytes,
        created_at=now,
        filename=upload.filename or "file",
        purpose="batch",
        expires_at=now + (fields.seconds or retention_s),
    )


def check_origin(request: Request, context: ServerContext) -> None:
    """Raises Forbidden if another web site makes a browser send a form, which needs no preflight request."""
    origin = request.headers.get("origin")
    if origin is None or origin in context.config.cors_origins or "*" in context.config.cors_origins:
        return
    if urlsplit(origin).netloc != request.headers.get("host"):
        raise Forbidden(f"Origin {origin[:100]!r} is not in cors_origins.", code="origin_not_allowed")


@router.get("/v1/files", openapi_extra=query(FilesQuery))
async def list_files(request: Request, service: Service) -> dict[str, Any]:
    page = FilesQuery.model_validate(dict(request.query_params))
    files = [
        file for file in service.store.files_of(_owner(request)) if page.purpose is None or file.purpose == page.purpose
    ]
    if page.order == "desc":
        files.reverse()
    shown, has_more = _page(files, page.after, page.limit)
    return _list([file.shown() for file in shown], has_more)


@router.get("/v1/files/{file_id}")
async def get_file(file_id: str, request: Request, service: Service) -> dict[str, Any]:
    return service.store.file(_owner(request), file_id).shown()


@router.get("/v1/files/{file_id}/content", response_class=Response, responses=_CONTENT)
async def get_file_content(file_id: str, request: Request, service: Service) -> Response:
    file = service.store.file(_owner(request), file_id)
    return FileResponse(service.store.content(file.id), media_type="application/octet-stream", filename=file.filename)


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, request: Request, service: Service) -> dict[str, Any]:
    file = service.store.file(_owner(request), file_id)
    await service.store.delete_file(file)
    return {"id": file.id, "object": "file", "deleted": True}


@router.post("/v1/batches", openapi_extra=json_body(BatchRequest))
async def create_batch(request: Request, context: Context, service: Service) -> dict[str, Any]:
    incoming = context.incoming(request)
    body = await read_json_object(request, incoming.sender, context.config, context.pool)
    asked = BatchRequest.model_validate(body)
    context.unknown_fields.check(body, asked, incoming.sender.client)
    return service.shown(await service.create(incoming.sender.tenant, asked))


@router.get("/v1/batches", openapi_extra=query(BatchesQuery))
async def list_batches(request: Request, service: Service) -> dict[str, Any]:
    page = BatchesQuery.model_validate(dict(request.query_params))
    shown, has_more = _page(service.store.batches_of(_owner(request)), page.after, page.limit)
    return _list([service.shown(batch) for batch in shown], has_more)


@router.get("/v1/batches/{batch_id}")
async def get_batch(batch_id: str, request: Request, service: Service) -> dict[str, Any]:
    return service.shown(service.store.batch(_owner(request), batch_id))


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(batch_id: str, request: Request, service: Service) -> dict[str, Any]:
    return service.shown(await service.cancel(_owner(request), batch_id))


def _owner(request: Request) -> str:
    return tenant_of(caller_of(request))


def _page(items: Sequence[R], after: str | None, limit: int) -> tuple[Sequence[R], bool]:
    """The items after the one with the id `after`, and whether there are more. Raises NotFound."""
    if after is not None:
        ids = [item.id for item in items]
        if after not in ids:
            raise NotFound(f"Nothing here has the id '{after[:100]}'.", "after", "item_not_found")
        items = items[ids.index(after) + 1 :]
    return items[:limit], len(items) > limit


def _list(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
