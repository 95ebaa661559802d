"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from gptoss.api.completions.adapter import plan_completion
from gptoss.api.completions.output import CompletionRenderer
from gptoss.api.completions.schema import CompletionRequest
from gptoss.api.context import Context
from gptoss.api.http.body import read_json_object
from gptoss.api.http.limited_paths import generates
from gptoss.api.http.openapi import Body, json_body
from gptoss.api.http.sse import respond
from gptoss.generation.text_output import start_text

router = APIRouter()


@router.post("/v1/completions", openapi_extra=json_body(Body(CompletionRequest, required=("prompt",)), streams=True))
@generates
async def completions(request: Request, context: Context) -> Response:
    incoming = context.incoming(request)
    with incoming.accounting.counted_rejections():
        body = await read_json_object(request, incoming.sender, context.config, context.pool)
        completion = await plan_completion(body, incoming)
        generation = await start_text(completion.plan, context.vocabulary, context.engine, incoming.accounting)
    renderer = CompletionRenderer(completion, generation, context.system_fingerprint)
    return respond(renderer, generation.close, context.config, streams=completion.plan.stream)
