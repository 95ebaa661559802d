"""A body of /v1/responses as the plan of a chat request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from gptoss.api.access.api_keys import ANONYMOUS, Caller
from gptoss.api.chat.adapter import ChatPlan, check_count, max_messages, plan_chat
from gptoss.api.context import ServerContext
from gptoss.api.http.errors import ContextTooLong, InvalidRequest, from_validation
from gptoss.api.http.work_pool import MANY_BYTES, Sender, Stopped
from gptoss.api.responses.adapter import ChatBody, chat_body
from gptoss.api.responses.items import PlacedItem, num_rendered
from gptoss.api.responses.schema import ResponsesRequest
from gptoss.api.responses.store import ResponseStore, resolve
from gptoss.api.responses.tools import MAX_FUNCTIONS, ToolTable
from gptoss.api.responses.truncation import NEVER_CUT, Cuts, answer_tokens
from gptoss.harmony.bpe import Limits
from gptoss.harmony.render import HarmonyMessage

logger = logging.getLogger(__name__)


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
    resolved = resolve(request, store, caller_name(caller))
    if resolved.uses_store:  # nobody has looked at how much that is
        sender = replace(sender, body_bytes=MANY_BYTES)
    planner = _Planner(request, context, caller, sender)
    if request.truncation == "auto":
        chat, plan = await planner.plan_cut(resolved.items)
    else:
        chat, plan = await planner.plan(resolved.items)
    request.logit_bias = None  # the parameters have it; as an object it may take 25 MB
    kept = store if store.enabled and request.store is not False else None
    return ResponsePlan(request, chat.tools, plan, resolved.own, caller_name(caller), kept)


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


def caller_name(caller: Caller | None) -> str:
    return ANONYMOUS if caller is None else caller.name
