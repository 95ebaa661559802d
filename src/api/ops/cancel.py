"""POST /v1/cancel/{request_id}: cancels a running or waiting request.

Its slot is free within one step.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gptoss.api.context import Context, caller_of
from gptoss.api.http.errors import NotFound

router = APIRouter()


@router.post("/v1/cancel/{request_id}")
@router.post("/cancel/{request_id}", include_in_schema=False)
async def cancel(request_id: str, request: Request, context: Context) -> dict[str, Any]:
    """Cancels a request by the id of its completion, or by the x-request-id header of its response.

    The request's own response ends with an error event (a stream) or 409 (JSON), code request_cancelled.
    """
    if not context.tracker.cancel(request_id, caller_of(request)):
        raise NotFound(f"No request '{request_id}' is running.", "request_id", "request_not_found")
    return {"id": request_id, "object": "request.cancelled", "cancelled": True}
