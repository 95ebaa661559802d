"""POST /v1/cancel/{request_id}: ends a request that runs or waits. Its slot is free within a step."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gptoss.api.context import Context, caller_of
from gptoss.api.http.errors import NotFound

router = APIRouter()


@router.post("/v1/cancel/{request_id}")
@router.post("/cancel/{request_id}")
async def cancel(request_id: str, request: Request, context: Context) -> dict[str, Any]:
    """`request_id`: the id of the completion, or the x-request-id header of its response. The request's own response
    ends with an error event (a stream) or 409 (JSON), code request_cancelled."""
    if not context.tracker.cancel(request_id, caller_of(request)):
        raise NotFound(f"No request '{request_id}' is running.", "request_id", "request_not_found")
    return {"id": request_id, "object": "request.cancelled", "cancelled": True}
