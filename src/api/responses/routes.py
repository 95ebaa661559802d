"""POST /v1/responses, and what is kept of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field, WithJsonSchema
from starlette.responses import Response

from gptoss.api.access.api_keys import tenant_of
from gptoss.api.context import Context, Incoming, ServerContext, caller_of
from gptoss.api.http.body import read_json_object
from gptoss.api.http.errors import InvalidRequest, NotFound
from gptoss.api.http.limited_paths import generates
from gptoss.api.http.openapi import Body, json_body, query
from gptoss.api.http.sse import respond
from gptoss.api.responses.input.items import untyped_fields
from gptoss.api.responses.plan import ResponsePlan, plan_response
from gptoss.api.responses.schema import ResponsesRequest
from gptoss.api.responses.store import ResponseStore
from gptoss.api.responses.writer import ResponsesRenderer
from gptoss.generation.chat_output import start_chat
from gptoss.generation.round_reader import Answer
from gptoss.generation.tool_loop import start_loop

router = APIRouter()


def get_store(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.response_store
    return store


Store = Annotated[ResponseStore, Depends(get_store)]


@router.post("/v1/responses", openapi_extra=json_body(Body(ResponsesRequest, fields=untyped_fields), streams=True))
@generates
async def responses(request: Request, context: Context, store: Store) -> Response:
    incoming = context.incoming(request)
    with incoming.accounting.counted_rejections():
        body = await read_json_object(request, incoming.sender, context.config, context.pool)
        plan = await plan_response(body, store, incoming)
        generation = await _start(plan, context, incoming)
    keep = plan.keep if plan.store is not None else None
    renderer = ResponsesRenderer(plan.request, plan.tools, generation, keep)
    return respond(renderer, generation.close, context.config, streams=plan.plan.stream)


async def _start(plan: ResponsePlan, context: ServerContext, incoming: Incoming) -> Answer:
    """Starts the answer, in rounds where the server runs tools. Raises EngineError or ApiError."""
    if plan.hosted is None:
        previous = plan.request.previous_response_id
        if previous is not None and plan.store is not None:
            context.tools.sessions.carry_on(plan.caller, previous, plan.plan.request_id)
        return await start_chat(
            plan.plan,
            context.vocabulary,
            context.engine,
            incoming.accounting,
            context.prompt_builder.remember,
            joins_messages=False,
        )
    request = plan.request
    tools = context.tools.hosted_tools(
        plan.hosted,
        max_calls=request.max_tool_calls,
        parallel=request.parallel_tool_calls is not False,
        keeps_sessions=plan.store is not None,
        shows_containers=True,
        shows_pages=True,
    )
    runtime = context.runtime(incoming.accounting, joins_messages=False)
    return await start_loop(plan.plan, tools, runtime, plan.approved, plan.replan)


@router.post(
    "/v1/responses/input_tokens",
    openapi_extra=json_body(Body(ResponsesRequest, optional=("model",), fields=untyped_fields)),
)
async def count_input_tokens(request: Request, context: Context, store: Store) -> dict[str, Any]:
    """How many tokens the model would read; what a response would refuse is refused here too."""
    incoming = context.incoming(request)
    body = await read_json_object(request, incoming.sender, context.config, context.pool)
    plan = await plan_response({"model": context.model_id} | body, store, incoming)
    if plan.hosted is not None:
        plan.hosted.chain.finish(None)
    return {"object": "response.input_tokens", "input_tokens": len(plan.plan.prompts[0])}


class RetrievalQuery(BaseModel):
    """Query parameters."""

    stream: bool = False


class PageQuery(BaseModel):
    """Query parameters."""

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: Annotated[str | None, WithJsonSchema({"type": "string"})] = None


@router.get("/v1/responses/{response_id}", openapi_extra=query(RetrievalQuery))
async def get_response(response_id: str, request: Request, store: Store) -> Response:
    if RetrievalQuery.model_validate(dict(request.query_params)).stream:
        raise InvalidRequest("A stored response is not streamed again.", "stream", "unsupported_value")
    stored = store.get(_caller(request), response_id)
    return Response(stored.body, media_type="application/json")


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request, store: Store) -> dict[str, Any]:
    store.delete(_caller(request), response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.get("/v1/responses/{response_id}/input_items", openapi_extra=query(PageQuery))
async def list_input_items(response_id: str, request: Request, store: Store) -> dict[str, Any]:
    """The items a response was made from, those of earlier responses included.

    The newest comes first unless `order` is "asc".
    """
    page = PageQuery.model_validate(dict(request.query_params))
    items = store.inputs(_caller(request), response_id)
    if page.order == "desc":
        items.reverse()
    if page.after is not None:
        ids = [item["id"] for item in items]
        if page.after not in ids:
            raise NotFound(f"Item with id '{page.after}' not found.", "after", "item_not_found")
        items = items[ids.index(page.after) + 1 :]
    shown = items[: page.limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(items) > page.limit,
    }


def _caller(request: Request) -> str:
    return tenant_of(caller_of(request))
