"""POST /v1/messages: Anthropic's Messages API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from sse_starlette import ServerSentEvent
from starlette.responses import Response

from gptoss.api.context import Context, Incoming, ServerContext
from gptoss.api.http.body import read_json_object
from gptoss.api.http.errors import NotFound
from gptoss.api.http.limited_paths import generates
from gptoss.api.http.openapi import ANTHROPIC_ERROR, error_responses, json_body
from gptoss.api.http.sse import respond
from gptoss.api.messages.adapter import count_tokens, plan_message
from gptoss.api.messages.output import MessagePlan, MessageRenderer
from gptoss.api.messages.schema.request import CountTokensRequest, MessagesRequest
from gptoss.generation.chat_output import start_chat
from gptoss.generation.round_reader import Answer
from gptoss.generation.tool_loop import start_loop

router = APIRouter(responses=error_responses(ANTHROPIC_ERROR))
PING = ServerSentEvent(data='{"type":"ping"}', event="ping", sep="\n")


@router.post("/v1/messages", openapi_extra=json_body(MessagesRequest, streams=True))
@generates
async def messages(request: Request, context: Context) -> Response:
    incoming = context.incoming(request)
    with incoming.accounting.counted_rejections():
        body = await read_json_object(request, incoming.sender, context.config, context.pool)
        message = await plan_message(body, incoming)
        generation = await _start(message, context, incoming)
    renderer = MessageRenderer(message, generation, incoming.accounting.record.request_id)
    return respond(renderer, generation.close, context.config, streams=message.plan.stream, keep_alive=PING)


async def _start(message: MessagePlan, context: ServerContext, incoming: Incoming) -> Answer:
    """Starts the answer, in rounds where the server runs tools. Raises EngineError or ApiError."""
    plan, accounting, remember = message.plan, incoming.accounting, context.prompt_builder.remember
    if message.hosted is None:
        return await start_chat(plan, context.vocabulary, context.engine, accounting, remember, joins_messages=False)
    choice = message.request.tool_choice
    parallel = choice is None or not choice.disable_parallel_tool_use
    tools = context.tools.hosted_tools(message.hosted, max_calls=None, parallel=parallel, shows_pages=True)
    return await start_loop(plan, tools, context.runtime(accounting, joins_messages=False))


@router.post("/v1/messages/count_tokens", openapi_extra=json_body(CountTokensRequest))
async def count_message_tokens(request: Request, context: Context) -> dict[str, Any]:
    """How many tokens the model would read."""
    incoming = context.incoming(request)
    body = await read_json_object(request, incoming.sender, context.config, context.pool)
    return {"input_tokens": await count_tokens(body, incoming)}


@router.post("/v1/messages/batches", include_in_schema=False)
@router.get("/v1/messages/batches", include_in_schema=False)
async def batches() -> None:
    raise NotFound("Message batches are not supported. Send each request to /v1/messages.")
