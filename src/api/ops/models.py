"""GET /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from gptoss import __version__
from gptoss.api.context import Context, ServerContext
from gptoss.api.http.errors import NotFound

router = APIRouter()
CREATED = 1_754_352_000  # 2025-08-05, when the models were published; constant, so that lists compare equal


def _model(name: str, context: ServerContext) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": CREATED,
        "owned_by": "openai",
        "root": context.model_id,
        "max_model_len": context.max_model_len,
    }


@router.get("/version")
async def version() -> dict[str, str]:
    """Returns the server's version, where gateways look for vLLM's."""
    return {"version": __version__}


def _adapter(name: str, context: ServerContext) -> dict[str, Any]:
    return _model(name, context) | {"parent": context.model_id}


@router.get("/v1/models")
async def list_models(context: Context) -> dict[str, Any]:
    """Lists the served model once, and its LoRA adapters.

    The model's aliases are accepted too and can be retrieved.
    """
    adapters = [_adapter(name, context) for name in context.engine.adapters.names]
    return {"object": "list", "data": [_model(context.model_id, context), *adapters]}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, context: Context) -> dict[str, Any]:
    if context.engine.adapters.get(name) is not None:
        return _adapter(name, context)
    if name not in context.profiles.model_names:
        raise NotFound(f"The model '{name}' does not exist.", "model", "model_not_found")
    return _model(name, context)
