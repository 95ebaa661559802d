"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from gptoss.api.chat.adapter import plan_chat
from gptoss.api.chat.output import ChatRenderer
from gptoss.api.chat.schema import ChatCompletionRequest
from gptoss.api.context import Context, caller_of, counted_rejections, new_record, read_body, sender_of
from gptoss.api.http.limited_paths import generates
from gptoss.api.http.openapi import json_body
from gptoss.api.http.sse import respond
from gptoss.api.telemetry.unknown_fields import client_of
from gptoss.generation.chat_output import chat_choices

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=json_body(ChatCompletionRequest))
@generates
async def chat_completions(request: Request, context: Context) -> Response:
    record = new_record(request)
    with counted_rejections(context):
        body = await read_body(request, context)
        chat = await plan_chat(body, context, record.caller, sender_of(request), client_of(request))
        choices = chat_choices(chat.plan, context.vocabulary)
        generation = await context.start(chat.plan, choices, record, streams=chat.stream)
    renderer = ChatRenderer(chat, generation, context)
    return respond(renderer, generation.close, context.config, streams=chat.stream)


@router.post(
    "/v1/chat/completions/render", openapi_extra=json_body(ChatCompletionRequest)
)  # with debug_endpoints only: access.DEBUG
async def render(request: Request, context: Context) -> dict[str, Any]:
    """The prompt that a chat request becomes, for debugging: ids and text."""
    body = await read_body(request, context)
    chat = await plan_chat(body, context, caller_of(request), sender_of(request), client_of(request))
    prompt = chat.plan.prompt
    assert prompt is not None
    ids = prompt.token_ids
    return {
        "prompt": context.vocabulary.decode(ids),
        "prompt_token_ids": ids,
        "num_tokens": len(ids),
        "prompt_version": prompt.version,
        "grammar": chat.plan.params.grammar,
    }
