"""A body of /v1/responses as the plan of a chat request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from gptoss.api.access.api_keys import ANONYMOUS, Caller
from gptoss.api.chat.adapter import ChatPlan, check_count, max_messages, plan_conversation
from gptoss.api.chat.schema import ChatCompletionRequest
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
from gptoss.harmony.conversation import AssistantMessage, Conversation, DeveloperMessage, PromptError
from gptoss.harmony.render import HarmonyMessage

logger = logging.getLogger(__name__)
NO_MESSAGES = [{"role": "user", "content": ""}]  # for a chat request whose conversation is read from items


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
        tools, plan = await planner.plan_cut(resolved.items)
    else:
        chat = await planner.read(resolved.items)
        tools, plan = chat.tools, await planner.plan(chat)
    request.logit_bias = None  # the parameters have it; as an object it may take 25 MB
    kept = store if store.enabled and request.store is not False else None
    return ResponsePlan(request, tools, plan, resolved.own, caller_name(caller), kept)


@dataclass(frozen=True, slots=True)
class _Planner:
    request: ResponsesRequest
    context: ServerContext
    caller: Caller | None
    sender: Sender

    async def read(self, items: Sequence[PlacedItem]) -> ChatBody:
        """Raises InvalidRequest or pydantic's ValidationError."""
        return await self.context.read(self.sender, lambda _: chat_body(self.request, items))

    async def plan(self, chat: ChatBody, kept: Sequence[int] | None = None) -> ChatPlan:
        """The plan of these items; None: of all. Raises ApiError."""
        try:
            options, conversation = await self.context.read(self.sender, lambda _: self._validated(chat, kept))
            return await plan_conversation(
                options,
                conversation,
                self.context,
                self.caller,
                self.sender,
                id_prefix="resp_",
                counts_all=self.request.truncation == "auto",
            )
        except PromptError as error:
            raise InvalidRequest(str(error), f"{error.origin}.call_id", "invalid_value") from None
        except InvalidRequest as error:
            raise chat.in_words_of_responses(error) from error
        except ValidationError as error:
            raise chat.in_words_of_responses(from_validation(error)) from None

    def _validated(self, chat: ChatBody, kept: Sequence[int] | None) -> tuple[ChatCompletionRequest, Conversation]:
        conversation = chat.conversation(kept)
        texts = DeveloperMessage | AssistantMessage  # may come to nothing
        check_count(sum(not isinstance(one, texts) for one in conversation.messages), "input", self.context)
        body = chat.options | {"messages": NO_MESSAGES}
        return ChatCompletionRequest.model_validate(body, context={"max_tools": MAX_FUNCTIONS}), conversation

    async def plan_cut(self, items: Sequence[PlacedItem]) -> tuple[ToolTable, ChatPlan]:
        """The same, of items of which the oldest are cut as far as the context requires it."""
        try:
            return await self._plan_cut(items)
        except ContextTooLong as error:
            raise ContextTooLong(f"{error.message} {NEVER_CUT}", error.param, error.code) from error

    async def _plan_cut(self, items: Sequence[PlacedItem]) -> tuple[ToolTable, ChatPlan]:
        cuts, limit = Cuts(items), max_messages(self.context)
        first = cuts.smallest(lambda kept: num_rendered([items[index].item for index in kept]) <= limit)
        if first is None:
            check_count(num_rendered([placed.item for placed in items]), "input", self.context)
        read = cuts.kept(first or 0)
        chat = await self.read([items[index] for index in read])
        try:
            return chat.tools, await self.plan(chat)
        except ContextTooLong as error:
            cause = error.__cause__
            counted = cause.num_tokens if isinstance(cause, ContextTooLong) else None
            if counted is None:
                raise
            cut = await self.context.read(
                replace(self.sender, body_bytes=MANY_BYTES),
                lambda stopped: self._cut(cuts, first or 0, chat, counted, stopped),
            )
            if cut is None:
                raise
        logger.info("truncation: left out %d of %d input items", cuts.num_cut(cut), len(items))
        return chat.tools, await self.plan(chat, _positions(cuts.kept(cut), read))

    def _cut(self, cuts: Cuts, first: int, chat: ChatBody, num_tokens: int, stopped: Stopped) -> int | None:
        """The smallest cut that leaves what the answer takes, else the largest if that fits at all; None: it does not.

        `chat`: of the items after the first cut; `num_tokens`: of its whole prompt.
        """
        lengths: dict[HarmonyMessage, int] = {}
        read = cuts.kept(first)

        def measure(kept: Sequence[int]) -> int:
            conversation = chat.conversation(_positions(kept, read))
            return self.context.prompt_builder.measure(conversation, lengths, Limits(stopped=stopped))

        room = self.context.max_model_len
        others = num_tokens - measure(read)  # tools, formats
        limit = room - others - answer_tokens(self.request.max_output_tokens, room)
        cut = cuts.smallest(lambda kept: measure(kept) <= limit, first)
        if cut is not None:
            return cut
        largest = len(cuts) - 1
        return largest if measure(cuts.kept(largest)) + others < room else None


def _positions(kept: Sequence[int], read: Sequence[int]) -> list[int]:
    """Where in `read` the indices `kept` are; both ascend."""
    wanted = set(kept)
    return [position for position, index in enumerate(read) if index in wanted]


def caller_name(caller: Caller | None) -> str:
    return ANONYMOUS if caller is None else caller.name
