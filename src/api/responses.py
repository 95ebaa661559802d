"""/v1/responses: the chat endpoint's answers in the form of OpenAI's Responses API."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, ValidationError
from starlette.responses import Response

from gptoss.api.body import read_json_object
from gptoss.api.chat import Answer, start_answer
from gptoss.api.chat_plan import ChatPlan, check_count, max_messages, plan_chat
from gptoss.api.deps import Context, ServerContext, caller_of, counted_rejections, new_record, sender_of
from gptoss.api.errors import ApiError, Cancelled, ContextTooLong, InvalidRequest, NotFound, from_validation
from gptoss.api.keys import ANONYMOUS, Caller
from gptoss.api.openapi import json_body
from gptoss.api.relaxations import relaxations
from gptoss.api.response_store import ResponseStore, resolve
from gptoss.api.responses_input import ChatBody, ResponsesRequest, chat_body
from gptoss.api.responses_items import PlacedItem, num_rendered
from gptoss.api.responses_output import Event, ItemStatus, OutputItems
from gptoss.api.responses_tools import MAX_FUNCTIONS, ToolTable
from gptoss.api.streaming import EventStream, JsonWhenDone, encode_event
from gptoss.api.truncation import NEVER_CUT, Cuts, answer_tokens
from gptoss.api.unknown_fields import client_of
from gptoss.api.work_pool import MANY_BYTES, Sender, Stopped
from gptoss.harmony.byte_pairs import Limits
from gptoss.harmony.render import HarmonyMessage

logger = logging.getLogger(__name__)
router = APIRouter()


@dataclass(frozen=True, slots=True)
class ResponsePlan:
    request: ResponsesRequest
    tools: ToolTable
    chat: ChatPlan
    inputs: list[PlacedItem]  # of this request, without what came before
    caller: str
    store: ResponseStore | None  # None: it is not to be stored


def _read(body: dict[str, Any], context: ServerContext, client: str) -> ResponsesRequest:
    sent = body.get("input")
    if isinstance(sent, list) and body.get("truncation") != "auto":
        check_count(num_rendered(sent), "input", context)
    request = ResponsesRequest.model_validate(body)
    context.unknown_fields.check(body, request, client)
    return request


async def plan_response(
    body: dict[str, Any], context: ServerContext, caller: Caller | None, sender: Sender, client: str
) -> ResponsePlan:
    """Raises ApiError or pydantic's ValidationError; nothing has been sent to the engine then."""
    request = await context.read(sender, lambda _: _read(body, context, client))
    store = context.responses
    resolved = resolve(request, store, _name(caller))
    if resolved.uses_store:  # nobody has looked at how much that is
        sender = replace(sender, body_bytes=MANY_BYTES)
    planner = _Planner(request, context, caller, sender)
    if request.truncation == "auto":
        chat, plan = await planner.plan_cut(resolved.items)
    else:
        chat, plan = await planner.plan(resolved.items)
    request.logit_bias = None  # the parameters have it; as an object it may take 25 MB
    kept = store if store.enabled and request.store is not False else None
    return ResponsePlan(request, chat.tools, plan, resolved.own, _name(caller), kept)


@dataclass(frozen=True, slots=True)
class _Planner:
    request: ResponsesRequest
    context: ServerContext
    caller: Caller | None
    sender: Sender

    async def plan(self, items: Sequence[PlacedItem]) -> tuple[ChatBody, ChatPlan]:
        """Raises ApiError or pydantic's ValidationError."""
        context = self.context
        chat = await context.read(self.sender, lambda _: chat_body(self.request, items))
        try:
            plan = await plan_chat(
                chat.body,
                context,
                self.caller,
                self.sender,
                id_prefix="resp_",
                max_tools=MAX_FUNCTIONS,
                counts_all=self.request.truncation == "auto",
            )
        except InvalidRequest as error:
            raise chat.in_words_of_responses(error) from error
        except ValidationError as error:
            raise chat.in_words_of_responses(from_validation(error)) from None
        return chat, plan

    async def plan_cut(self, items: Sequence[PlacedItem]) -> tuple[ChatBody, ChatPlan]:
        """The same, of items of which the oldest are cut as far as the context requires it."""
        try:
            return await self._plan_cut(items)
        except ContextTooLong as error:
            raise ContextTooLong(f"{error.message} {NEVER_CUT}", error.param, error.code) from error

    async def _plan_cut(self, items: Sequence[PlacedItem]) -> tuple[ChatBody, ChatPlan]:
        cuts, limit = Cuts(items), max_messages(self.context)
        first = cuts.smallest(lambda kept: num_rendered([p.item for p in kept]) <= limit)
        if first is None:
            check_count(num_rendered([placed.item for placed in items]), "input", self.context)
        try:
            return await self.plan(cuts.kept(first or 0))
        except ContextTooLong as error:
            cause = error.__cause__
            counted = cause.num_tokens if isinstance(cause, ContextTooLong) else None
            if counted is None:
                raise
            cut = await self.context.read(
                replace(self.sender, body_bytes=MANY_BYTES),
                lambda stopped: self._cut(cuts, first or 0, counted, stopped),
            )
            if cut is None:
                raise
        logger.info("truncation: left out %d of %d input items", cuts.num_cut(cut), len(items))
        return await self.plan(cuts.kept(cut))

    def _cut(self, cuts: Cuts, first: int, num_tokens: int, stopped: Stopped) -> int | None:
        """The smallest cut that leaves what the answer takes, else the largest if that fits at all; None: it does not.

        `num_tokens`: of the whole prompt after the first cut.
        """
        lengths: dict[HarmonyMessage, int] = {}

        def measure(kept: Sequence[PlacedItem]) -> int:
            messages = chat_body(self.request, kept).body["messages"]
            return self.context.prompt_builder.measure(messages, lengths, Limits(stopped=stopped))

        room = self.context.max_model_len
        others = num_tokens - measure(cuts.kept(first))  # tools, formats
        limit = room - others - answer_tokens(self.request.max_output_tokens, room)
        cut = cuts.smallest(lambda kept: measure(kept) <= limit, first)
        if cut is not None:
            return cut
        largest = len(cuts) - 1
        return largest if measure(cuts.kept(largest)) + others < room else None


class ResponseWriter:
    """The one choice of an answer, as a response."""

    def __init__(self, plan: ResponsePlan, answer: Answer) -> None:
        self._plan, self._answer = plan, answer
        self._output = OutputItems(plan.tools.client_name, seals_reasoning=plan.request.seals_reasoning)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, numbered; tokens that arrived together leave together."""
        number = 0

        def encode(events: list[Event]) -> bytes:
            nonlocal number
            parts = []
            for event in events:
                name = event["type"].encode()
                data = encode_event(event | {"sequence_number": number})
                parts.append(b"event: %b\ndata: %b\n\n" % (name, data))
                number += 1
            return b"".join(parts)

        begun = self._body("in_progress")
        yield encode([{"type": f"response.{name}", "response": begun} for name in ("created", "in_progress")])
        async with contextlib.aclosing(self._events()) as batches:
            async for events in batches:
                yield encode(events)

    async def collect(self) -> bytes:
        """The same as one body. Raises EngineFailure or Cancelled."""
        async with contextlib.aclosing(self._events()) as batches:
            async for events in batches:
                last = events[-1]
        if last["type"] == "response.failed":
            raise self._failure
        return encode_event(last["response"])

    async def _events(self) -> AsyncGenerator[list[Event], None]:
        """Batches of events, none of them empty; the last event of the last one holds the whole response."""
        answer, output = self._answer, self._output
        choice = answer.choices[0]
        try:
            async with contextlib.aclosing(answer.events()) as batches:
                async for batch in batches:
                    events = [e for _, deltas in batch for item in deltas for e in output.feed(item)]
                    if choice.finish_reason is not None:
                        yield events + self._end(choice.finish_reason)
                        return
                    if events:
                        yield events
        finally:
            answer.close()

    def _end(self, finish_reason: str) -> list[Event]:
        whole: ItemStatus = "completed" if finish_reason in ("stop", "tool_calls") else "incomplete"
        events = self._output.close(whole)
        status = "failed" if finish_reason == "error" else whole
        body = self._body(status)
        if status != "failed":
            self._keep(body)
        return [*events, {"type": f"response.{status}", "response": body}]

    def _keep(self, body: dict[str, Any]) -> None:
        plan = self._plan
        if plan.store is not None:
            inputs = [placed.item for placed in plan.inputs]
            previous = plan.request.previous_response_id
            body["store"] = plan.store.add(plan.caller, body, inputs, previous=previous)

    @property
    def _failure(self) -> ApiError:
        return self._answer.failure(self._answer.choices[0])

    def _body(self, status: str) -> dict[str, Any]:
        request, plan = self._plan.request, self._plan.chat
        params = plan.requests[0].params
        text = request.text.model_dump(by_alias=True, exclude_none=True) if request.text else {}
        body: dict[str, Any] = {
            "id": plan.completion_id,
            "object": "response",
            "created_at": plan.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "model": plan.model,
            "output": self._output.items,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": {"effort": request.effort or plan.profile.effort, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": plan.service_tier or "default",
            "store": self._plan.store is not None,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}} | text,
            "tool_choice": request.tool_choice or "auto",
            "tools": self._plan.tools.shown,
            "top_logprobs": request.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": request.truncation or "disabled",
            "usage": None,
            "user": request.user,
            **relaxations(plan.relaxed),
        }
        if status == "incomplete":
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        if status == "failed":
            failure = self._failure
            code = failure.code if isinstance(failure, Cancelled) else "server_error"
            body["error"] = {"code": code, "message": failure.message}
        if status != "in_progress":
            body["usage"] = self._usage()
        return body

    def _usage(self) -> dict[str, Any]:
        usage = self._answer.usage
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": usage["total_tokens"],
        }


@router.post("/v1/responses", openapi_extra=json_body(ResponsesRequest))
async def responses(request: Request, context: Context) -> Response:
    record = new_record(request)
    with counted_rejections(context):
        body = await read_json_object(request, context)
        plan = await plan_response(body, context, record.caller, sender_of(request), client_of(request))
        answer = await start_answer(plan.chat, context, record, joins_messages=False)
    writer = ResponseWriter(plan, answer)
    if plan.chat.stream:
        return EventStream(writer.stream(), answer.close, context.config)
    return JsonWhenDone(writer.collect, answer.close)


@router.post("/v1/responses/input_tokens", openapi_extra=json_body(ResponsesRequest))
async def count_input_tokens(request: Request, context: Context) -> dict[str, Any]:
    """How many tokens the model would read; what a response would refuse is refused here too."""
    body = {"model": context.model_id} | await read_json_object(request, context)
    plan = await plan_response(body, context, caller_of(request), sender_of(request), client_of(request))
    return {"object": "response.input_tokens", "input_tokens": len(plan.chat.prompt.token_ids)}


class Retrieval(BaseModel):
    """What the URL may say."""

    stream: bool = False


class Page(BaseModel):
    """What the URL may say."""

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


@router.get("/v1/responses/{response_id}")
async def get_response(response_id: str, request: Request, context: Context) -> Response:
    if Retrieval.model_validate(dict(request.query_params)).stream:
        raise InvalidRequest("A stored response is not streamed again.", "stream", "unsupported_value")
    stored = context.responses.get(_caller(request), response_id)
    return Response(stored.body, media_type="application/json")


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request, context: Context) -> dict[str, Any]:
    context.responses.delete(_caller(request), response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(response_id: str, request: Request, context: Context) -> dict[str, Any]:
    """What the response was made from, earlier responses included; the newest first unless `order` says otherwise."""
    page = Page.model_validate(dict(request.query_params))
    items = context.responses.inputs(_caller(request), response_id)
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
    return _name(caller_of(request))


def _name(caller: Caller | None) -> str:
    return ANONYMOUS if caller is None else caller.name
