"""A Responses request and the items before it as a conversation and the options of a chat request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptoss.api.http.errors import InvalidRequest
from gptoss.api.http.fields import SamplingFields
from gptoss.api.responses.items import PlacedItem, conversation_of, read_items
from gptoss.api.responses.schema import ResponsesRequest, TextFormat, TextOptions
from gptoss.api.responses.tools import ToolTable, read_choice, read_tools
from gptoss.harmony.conversation import Conversation, Message

LOGPROBS = "message.output_text.logprobs"  # what `include` calls them
# Where the chat request says what this one says elsewhere.
PLACES = (
    (re.compile(r"^tool_choice\.function\b"), "tool_choice"),
    (re.compile(r"^response_format\.json_schema\b"), "text.format"),
    (re.compile(r"^response_format\b"), "text.format"),
    (re.compile(r"^(max_completion_tokens|max_tokens)$"), "max_output_tokens"),
    (re.compile(r"^reasoning_effort$"), "reasoning.effort"),
    (re.compile(r"^messages$"), "input"),
)
_QUOTED = re.compile(r"'([^'\s]+)'")


@dataclass(frozen=True, slots=True)
class ChatBody:
    options: dict[str, Any]  # a chat request but its messages
    instructions: str | None
    messages: list[Message | None]  # of each item
    tools: ToolTable

    def conversation(self, kept: Sequence[int] | None = None) -> Conversation:
        """Of the items of these indices, in order; None: of all. Raises InvalidRequest where the model reads none."""
        messages = self.messages if kept is None else [self.messages[index] for index in kept]
        return conversation_of(self.instructions, messages)

    def in_words_of_responses(self, error: InvalidRequest) -> InvalidRequest:
        """The same error, naming fields and functions as they are called here."""
        message = _QUOTED.sub(lambda found: self._quoted(found, error.param), error.message)
        param = self._field(error.param or "")
        return type(error)(message, param or None, error.code, error.headers)

    def _quoted(self, found: re.Match[str], param: str | None) -> str:
        name = found[1]
        if name == param or name.startswith("tools["):
            return f"'{self._field(name)}'"
        named = self.tools.client_name(name)
        return f"'{named['name']}'" + (f" of namespace '{named['namespace']}'" if "namespace" in named else "")

    def _field(self, param: str) -> str:
        tool = re.match(r"^tools\[(\d+)\](\.function)?", param)
        if tool is not None and int(tool[1]) < len(self.tools.offered):
            return self.tools.where(int(tool[1])) + param[tool.end() :]
        for pattern, name in PLACES:
            param = pattern.sub(name, param)
        return param


def chat_body(request: ResponsesRequest, items: Sequence[PlacedItem]) -> ChatBody:
    """The request as chat has it. `items`: the whole conversation. Raises InvalidRequest for one that is not valid."""
    tools = read_tools(request.tools or ())
    messages = read_items(items, tools.model_name)
    shared = SamplingFields.model_fields.keys() & request.model_fields_set
    body: dict[str, Any] = {name: getattr(request, name) for name in sorted(shared - {"stream_options", "n"})}
    text = request.text or TextOptions()
    optional = {
        "max_completion_tokens": request.max_output_tokens,
        "tools": tools.as_chat() or None,
        "tool_choice": read_choice(request.tool_choice, tools),
        "parallel_tool_calls": request.parallel_tool_calls,
        "response_format": _response_format(text.format),
        "verbosity": text.verbosity,
        "reasoning_effort": request.effort,
        "chat_template_kwargs": request.chat_template_kwargs,
        "reasoning_budget": request.reasoning_budget,
        "profile": request.profile,
        "include_relaxations": request.include_relaxations,
        "service_tier": request.service_tier,
    }
    if LOGPROBS in (request.include or ()):
        optional |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    given = {name: value for name, value in optional.items() if value is not None}
    return ChatBody(body | given, request.instructions, messages, tools)


def _response_format(wanted: TextFormat | None) -> dict[str, Any] | None:
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        schema = {} if wanted.schema_ is None else {"schema": wanted.schema_}
        return {"type": wanted.type} | schema
    return {"type": "json_schema", "json_schema": wanted.model_dump(exclude={"type"}, by_alias=True, exclude_none=True)}
