"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as in vLLM; off unless `lora_dir` is set."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import PlainTextResponse, Response

from gptoss.api.context import Context, ServerContext
from gptoss.api.http.body import read_json_object
from gptoss.api.http.errors import Forbidden, InvalidRequest, NotFound
from gptoss.api.http.fields import Strict
from gptoss.api.http.openapi import json_body
from gptoss.engine.client.adapters import Adapters, folder_below
from gptoss.engine.client.errors import EngineDeadError, EngineError
from gptoss.engine.model.lora_file import AdapterError, AdapterFile

router = APIRouter()
T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)
_running: set[asyncio.Task[None]] = set()


class LoadAdapterRequest(Strict):
    lora_name: str
    lora_path: str


class UnloadAdapterRequest(Strict):
    lora_name: str
    lora_int_id: int | None = None


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse, openapi_extra=json_body(LoadAdapterRequest))
async def load_lora_adapter(request: Request, context: Context) -> Response:
    """Loads an adapter from a folder below `lora_dir`; its name is then a model."""
    folder = _enabled(context)
    body = await _read(LoadAdapterRequest, request, context)
    await context.engine.wait_ready(context.engine.engines[0].policy.ready_wait_s)
    adapters = context.engine.adapters
    _check_name(adapters, body.lora_name)
    try:
        file = await asyncio.to_thread(_read_below, adapters, folder, body)
    except AdapterError as error:
        raise InvalidRequest(_sentence(error), "lora_path", "invalid_adapter") from None
    await _to_the_end(_load(context, body.lora_name, file))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, openapi_extra=json_body(UnloadAdapterRequest))
async def unload_lora_adapter(request: Request, context: Context) -> Response:
    """Unloads an adapter: new requests do not find it; waits for those that use it."""
    _enabled(context)
    body = await _read(UnloadAdapterRequest, request, context)
    try:
        served = context.engine.adapters.end(body.lora_name)
    except AdapterError as error:
        raise NotFound(_sentence(error), "lora_name", "model_not_found") from None
    await _to_the_end(_unload(context, served.id))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _enabled(context: ServerContext) -> Path:
    """Returns the folder for adapters. Raises Forbidden if there is none."""
    folder = context.config.lora_dir
    if folder is None:
        raise Forbidden("Adapters are not loaded at run time: start the server with --lora-dir.", None, "lora_disabled")
    return folder


async def _read(kind: type[B], request: Request, context: ServerContext) -> B:
    incoming = context.incoming(request)
    raw = await read_json_object(request, incoming.sender, context.config, context.pool)
    body = kind.model_validate(raw)
    incoming.unknown_fields.check(raw, body, incoming.sender.client)
    return body


def _check_name(adapters: Adapters, name: str) -> None:
    try:
        adapters.check_name(name)
    except AdapterError as error:
        raise InvalidRequest(_sentence(error), "lora_name", "invalid_value") from None


def _read_below(adapters: Adapters, folder: Path, body: LoadAdapterRequest) -> AdapterFile:
    return adapters.read(folder_below(folder, body.lora_path))


async def _load(context: ServerContext, name: str, file: AdapterFile) -> None:
    adapters = context.engine.adapters
    _check_name(adapters, name)  # another request may have loaded it meanwhile
    try:
        served = adapters.add(name, file)
    except AdapterError as error:
        raise InvalidRequest(_sentence(error), "lora_path", "invalid_adapter") from None
    try:
        await context.engine.load_adapter(served.message)
    except EngineError as error:
        adapters.forget(served.id)
        if isinstance(error, EngineDeadError):
            raise
        raise InvalidRequest(f"The adapter cannot be loaded: {error}.", "lora_path", "invalid_adapter") from None


async def _unload(context: ServerContext, adapter_id: int) -> None:
    await context.engine.unload_adapter(adapter_id)
    context.engine.adapters.forget(adapter_id)


def _sentence(error: AdapterError) -> str:
    text = str(error)
    return f"{text[0].upper()}{text[1:]}."


async def _to_the_end(work: Coroutine[None, None, None]) -> None:
    """Runs `work` to its end even if the client disconnects."""
    task = asyncio.create_task(work)
    _running.add(task)
    task.add_done_callback(_running.discard)
    await asyncio.shield(task)
