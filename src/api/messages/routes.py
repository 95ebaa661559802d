"""POST /v1/messages: Anthropic's Messages API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from sse_starlette import ServerSentEvent
from starlette.responses import Response

from gptoss.api.context import Context, caller_of, counted_rejections, new_record, read_body, sender_of
from gptoss.api.http.errors import NotFound
from gptoss.api.http.limited_paths import generates
from gptoss.api.http.openapi import json_body
from gptoss.api.http.sse import respond
from gptoss.api.messages.adapter import count_tokens, plan_message
from gptoss.api.messages.output import MessageRenderer
from gptoss.api.messages.schema import CountTokensRequest, MessagesRequest
from gptoss.api.telemetry.unknown_fields import client_of
from gptoss.generation.chat_output import chat_choices

router = APIRouter()
PING = ServerSentEvent(data='{"type":"ping"}', event="ping", sep="\n")


@router.post("/v1/messages", openapi_extra=json_body(MessagesRequest))
@generates
async def messages(request: Request, context: Context) -> Response:
    record = new_record(request)
    with counted_rejections(context):
        body = await read_body(request, context)
        message = await plan_message(body, context, record.caller, sender_of(request), client_of(request))
        choices = chat_choices(message.plan, context.vocabulary, joins_messages=False)
        streams = bool(message.request.stream)
        generation = await context.start(message.plan, choices, record, streams=streams)
    renderer = MessageRenderer(message, generation, record.request_id)
    return respond(renderer, generation.close, context.config, streams=streams, keep_alive=PING)


@router.post("/v1/messages/count_tokens", openapi_extra=json_body(CountTokensRequest))
async def count_message_tokens(request: Request, context: Context) -> dict[str, Any]:
    """How many tokens the model would read."""
    body = await read_body(request, context)
    num_tokens = await count_tokens(body, context, caller_of(request), sender_of(request), client_of(request))
    return {"input_tokens": num_tokens}


@router.post("/v1/messages/batches")
@router.get("/v1/messages/batches")
async def batches() -> None:
    raise NotFound("Message batches are not supported. Send each request to /v1/messages.")
