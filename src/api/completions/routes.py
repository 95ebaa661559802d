"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from gptoss.api.completions.adapter import plan_completion
from gptoss.api.completions.output import CompletionRenderer
from gptoss.api.completions.schema import CompletionRequest
from gptoss.api.context import Context, counted_rejections, new_record, read_body, sender_of
from gptoss.api.http.limited_paths import generates
from gptoss.api.http.openapi import json_body
from gptoss.api.http.sse import respond
from gptoss.api.telemetry.unknown_fields import client_of
from gptoss.generation.text_output import text_choices

router = APIRouter()


@router.post("/v1/completions", openapi_extra=json_body(CompletionRequest))
@generates
async def completions(request: Request, context: Context) -> Response:
    record = new_record(request)
    with counted_rejections(context):
        body = await read_body(request, context)
        completion = await plan_completion(body, context, record.caller, sender_of(request), client_of(request))
        choices = text_choices(completion.plan, context.vocabulary)
        generation = await context.start(completion.plan, choices, record, streams=completion.stream)
    renderer = CompletionRenderer(completion, generation, context.system_fingerprint)
    return respond(renderer, generation.close, context.config, streams=completion.stream)
