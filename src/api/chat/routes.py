"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from gptoss.api.chat.adapter import plan_chat
from gptoss.api.chat.output import ChatPlan, ChatRenderer
from gptoss.api.chat.schema import ChatCompletionRequest
from gptoss.api.context import Context, Incoming, ServerContext
from gptoss.api.http.body import read_json_object
from gptoss.api.http.limited_paths import generates
from gptoss.api.http.openapi import json_body
from gptoss.api.http.sse import respond
from gptoss.generation.chat_output import start_chat
from gptoss.generation.round_reader import Answer
from gptoss.generation.tool_loop import start_loop

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=json_body(ChatCompletionRequest, streams=True))
@generates
async def chat_completions(request: Request, context: Context) -> Response:
    incoming = context.incoming(request)
    with incoming.accounting.counted_rejections():
        body = await read_json_object(request, incoming.sender, context.config, context.pool)
        chat = await plan_chat(body, incoming)
        generation = await _start(chat, context, incoming)
    renderer = ChatRenderer(chat, generation, context)
    return respond(renderer, generation.close, context.config, streams=chat.plan.stream)


async def _start(chat: ChatPlan, context: ServerContext, incoming: Incoming) -> Answer:
    """Starts the answer, in rounds where the server runs tools. Raises EngineError or ApiError."""
    accounting = incoming.accounting
    if chat.hosted is None:
        remember = context.prompt_builder.remember
        return await start_chat(chat.plan, context.vocabulary, context.engine, accounting, remember)
    tools = context.tools.hosted_tools(chat.hosted, max_calls=None, parallel=chat.parallel, shows_containers=True)
    return await start_loop(chat.plan, tools, context.runtime(accounting, joins_messages=True))


@router.post(
    "/v1/chat/completions/render", openapi_extra=json_body(ChatCompletionRequest)
)  # with debug_endpoints only: access.DEBUG
async def render(request: Request, context: Context) -> dict[str, Any]:
    """The prompt that a chat request becomes, for debugging: ids and text."""
    incoming = context.incoming(request)
    body = await read_json_object(request, incoming.sender, context.config, context.pool)
    chat = await plan_chat(body, incoming)
    if chat.hosted is not None:
        chat.hosted.chain.finish(None)
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
