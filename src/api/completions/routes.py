"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from gptoss.api.completions.answer import start_completion
from gptoss.api.completions.output import collect, stream_events
from gptoss.api.completions.schema import CompletionRequest
from gptoss.api.context import Context, counted_rejections, new_record, sender_of
from gptoss.api.http.body import read_json_object
from gptoss.api.http.openapi import json_body
from gptoss.api.http.sse import EventStream, JsonWhenDone
from gptoss.api.telemetry.unknown_fields import client_of

router = APIRouter()


@router.post("/v1/completions", openapi_extra=json_body(CompletionRequest))
async def completions(request: Request, context: Context) -> Response:
    record = new_record(request)
    with counted_rejections(context):
        body = await read_json_object(request, context)
        answer = await start_completion(body, context, record, sender_of(request), client_of(request))
    if answer.request.stream:
        return EventStream(stream_events(answer), answer.close, context.config)
    return JsonWhenDone(lambda: collect(answer), answer.close)
