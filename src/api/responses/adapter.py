"""A Responses request to a GenerationRequest, and the names of its fields back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptoss.api.context import Reading
from gptoss.api.hosted.service import Prepared
from gptoss.api.http.fields import EFFORTS
from gptoss.api.http.output_format import named_format, output_format
from gptoss.api.http.tool_choice import read_tool_choice
from gptoss.api.responses.input.conversation import conversation_of, read_items
from gptoss.api.responses.schema import ResponsesRequest, TextFormat
from gptoss.api.responses.tools.placed import PlacedItem
from gptoss.api.responses.tools.table import ToolTable, read_choice, read_tools
from gptoss.generation.errors import Path
from gptoss.generation.planner import check_num_messages
from gptoss.generation.request import GenerationRequest, OutputFormat, ToolPolicy
from gptoss.harmony.conversation import AssistantMessage, Conversation, DeveloperMessage, Message
from gptoss.harmony.render import ReasoningEffort

LOGPROBS = "message.output_text.logprobs"  # what `include` calls them


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A request whose items have been read; a part of them may be planned."""

    request: ResponsesRequest
    messages: list[Message | None]  # of each item
    tools: ToolTable
    policy: ToolPolicy
    output_format: OutputFormat | None

    def conversation(self, kept: Sequence[int] | None = None) -> Conversation:
        """The conversation of the items at these indices, in order; None: of all items.

        Raises InvalidRequest if the model reads none of them.
        """
        messages = self.messages if kept is None else [self.messages[index] for index in kept]
        return conversation_of(self.request.instructions, messages)

    def generation_request(self, incoming: Reading, kept: Sequence[int] | None = None) -> GenerationRequest:
        """What the request asks of the model, with the items at `kept`; None: with all.

        Raises ApiError, or GenerationError for too many messages.
        """
        request, conversation = self.request, self.conversation(kept)
        texts = DeveloperMessage | AssistantMessage  # may come to nothing
        num_messages = sum(not isinstance(one, texts) for one in conversation.messages)
        check_num_messages(num_messages, incoming.planner.limits)
        has_logprobs = LOGPROBS in (request.include or ())
        return request.generation_request(
            incoming.sender,
            conversation,
            id_prefix="resp_",
            profile=incoming.profiles.of(request.model, request.profile),
            adapter=incoming.profiles.adapter_of(request.model),
            logprobs=(request.top_logprobs or 0) if has_logprobs else None,
            effort=_effort(request),
            reasoning_budget=request.reasoning_budget,
            tools=self.policy,
            output_format=self.output_format,
            max_tokens=request.max_output_tokens,
        )

    def field_name(self, path: Path) -> str | None:
        return field_name(path, self.tools)


def field_name(path: Path, tools: ToolTable | None = None) -> str | None:
    """What Responses call the part of a GenerationRequest at this path."""
    match path:
        case ("tools", int(index), "definition") if tools is not None:
            return f"{tools.where(index)}.format.definition"
        case ("tools", int(index), *rest) if tools is not None:
            return ".".join([tools.where(index), *map(str, rest)])
        case ("prompt", str(origin), _):
            return f"{origin}.call_id"
        case ("prompt",):
            return "input"
        case ("output_format", "response_format"):
            return "text.format"
        case ("output_format" | "sampling", name):
            return str(name)
    return str(path[0]) if path else None


def read_request(request: ResponsesRequest, items: Sequence[PlacedItem], hosted: Prepared | None = None) -> ReadRequest:
    """Reads tools and input of a request. Raises InvalidRequest.

    `items`: the whole conversation. `hosted`: what the server runs of its tools.
    """
    tools = read_tools(request.tools or (), hosted)
    messages = read_items(items, tools.model_name)
    return ReadRequest(request, messages, tools, tool_policy(request, tools), read_format(request))


def tool_policy(request: ResponsesRequest, tools: ToolTable) -> ToolPolicy:
    """The tools and how the model may call them. Raises InvalidRequest."""
    choice = read_tool_choice(read_choice(request.tool_choice, tools), "tool_choice.name")
    max_calls = 1 if request.parallel_tool_calls is False else None
    hosted = tools.hosted
    return ToolPolicy(
        tools.functions(),
        choice.mode,
        choice.allowed,
        max_calls,
        builtins=hosted.namespaces if hosted is not None else (),
        hosted=hosted.hosted if hosted is not None else frozenset(),
    )


def read_format(request: ResponsesRequest) -> OutputFormat | None:
    """The format that the answer must follow; None for free text. Raises InvalidRequest."""
    own = None
    if request.text is not None and request.text.format is not None:
        own = _own_format(request.text.format)
    return output_format(request, own)


def _own_format(wanted: TextFormat) -> OutputFormat | None:
    if wanted.type == "text":
        return None
    field = "text.format.schema"
    if wanted.type == "json_object":
        return named_format(field, wanted.type, wanted.schema_)
    return named_format(field, wanted.name or "", wanted.schema_, wanted.description, strict=bool(wanted.strict))


def _effort(request: ResponsesRequest) -> ReasoningEffort | None:
    kwargs = request.chat_template_kwargs
    effort = request.effort or (kwargs.reasoning_effort if kwargs is not None else None)
    return EFFORTS[effort] if effort is not None else None
