"""A chat request to a GenerationRequest, and the names of its fields back."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from gptoss.api.chat.messages import FIELDS, read_messages, read_prefill
from gptoss.api.chat.output import ChatPlan
from gptoss.api.chat.schema import HOSTED, ChatCompletionRequest
from gptoss.api.chat.tools import hosted_entries, read_tools
from gptoss.api.context import Reading
from gptoss.api.hosted.service import Prepared
from gptoss.api.http.errors import InvalidRequest, field_names
from gptoss.api.http.fields import EFFORTS
from gptoss.api.http.output_format import output_format
from gptoss.api.telemetry.warn_once import WarnOnce
from gptoss.generation.errors import Path
from gptoss.generation.planner import check_num_messages
from gptoss.generation.request import GenerationRequest
from gptoss.harmony.render import ReasoningEffort

logger = logging.getLogger(__name__)
NAMED_ROLES = ("user", "function")  # whose `name` the model reads
_warn_names = WarnOnce(logger, "names of messages are not shown to the model for roles: %s")


async def plan_chat(body: Mapping[str, Any], incoming: Reading) -> ChatPlan:
    """The plan of a chat request; nothing has been sent to the engine yet.

    Raises ApiError or pydantic's ValidationError.
    """
    sender, pool, tools = incoming.sender, incoming.pool, body.get("tools")
    legacy = bool(body.get("functions")) and not tools
    with field_names(partial(field_name, legacy=legacy, tools=tools if isinstance(tools, list) else ())):
        request, asked = await pool.read(sender, lambda _: read_chat(body, incoming))
        hosted = await _prepare(request, incoming)
        try:
            if hosted is not None:
                request, asked = await pool.read(sender, lambda _: read_chat(body, incoming, hosted))
            plan = await pool.read(sender, partial(incoming.planner.plan, asked), is_slow=asked.has_schemas)
        except BaseException:
            if hosted is not None:
                hosted.chain.finish(None)
            raise
    reasoning = request.reasoning
    return ChatPlan(
        plan,
        created=int(time.time()),
        model=request.model,
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        include_reasoning=request.include_reasoning is not False and not (reasoning and reasoning.exclude),
        include_relaxations=bool(request.include_relaxations),
        is_legacy=legacy,
        service_tier="default" if request.service_tier is not None else None,
        hosted=hosted,
        parallel=request.parallel_tool_calls is not False,
    )


async def _prepare(request: ChatCompletionRequest, incoming: Reading) -> Prepared | None:
    """What the server runs of the request's tools; None: nothing. Raises InvalidRequest."""
    service = incoming.tools
    entries = hosted_entries(request, service.runs if service is not None else lambda _: True)
    if not entries:
        return None
    if service is None:
        text = f"The server runs no tools for this request: leave tools of type '{entries[0].entry.type}' out."
        raise InvalidRequest(text, entries[0].where, "unsupported_value")
    names = [tool.name for tool in read_tools(request).tools]
    return await service.prepare(entries, incoming.sender.tenant, taken=names)


def field_name(path: Path, legacy: bool = False, tools: Sequence[Any] = ()) -> str | None:
    """What chat calls the part of a GenerationRequest at this path. `tools`: as the client sent them."""
    match path:
        case ("tools", int(index), *rest) if legacy:
            return ".".join([f"functions[{index}]", *map(str, rest)])
        case ("tools", int(index), *rest):
            return _tool_field(tools, index, rest)
        case ("tools",):
            return "functions" if legacy else "tools"
        case ("tool_choice",):
            return "function_call" if legacy else "tool_choice"
        case ("prompt", str(origin), str(field)):
            return f"{origin}.{FIELDS[field]}"
        case ("prompt",):
            return "messages"
        case ("output_format" | "sampling", name):
            return str(name)
    return str(path[0]) if path else None


def _tool_field(tools: Sequence[Any], index: int, rest: Sequence[str | int]) -> str:
    """The field of the client's tool of this index; the tools of a server have none of their own."""
    kinds = [tool.get("type") if isinstance(tool, Mapping) else None for tool in tools]
    own = [place for place, kind in enumerate(kinds) if kind not in HOSTED]
    if tools and index >= len(own):
        return "tools"
    place = own[index] if tools else index
    if [*rest] == ["definition"]:
        return f"tools[{place}].custom.format.grammar.definition"
    kind = "custom" if tools and kinds[place] == "custom" else "function"
    return ".".join([f"tools[{place}].{kind}", *map(str, rest)])


def read_chat(
    body: Mapping[str, Any], incoming: Reading, hosted: Prepared | None = None
) -> tuple[ChatCompletionRequest, GenerationRequest]:
    """The validated request, and what it asks of the model. `hosted`: what the server runs of its tools.

    Raises ApiError, GenerationError or pydantic's ValidationError.
    """
    sent = body.get("messages")
    check_num_messages(_num_rendered(sent if isinstance(sent, list) else []), incoming.planner.limits)
    request = ChatCompletionRequest.model_validate(dict(body))
    _warn_names({m.role for m in request.messages if m.name and m.role not in NAMED_ROLES})
    incoming.unknown_fields.check(body, request, incoming.sender.client)
    tools = read_tools(request, hosted)
    own = request.response_format.output_format if request.response_format is not None else None
    wanted = output_format(request, own)
    prefill = read_prefill(request, constrained=tools.must_call or wanted is not None)
    messages = request.messages if prefill is None else request.messages[:-1]
    asked = request.generation_request(
        incoming.sender,
        read_messages(messages),
        id_prefix="chatcmpl-",
        profile=incoming.profiles.of(request.model, request.profile),
        adapter=incoming.profiles.adapter_of(request.model),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        effort=_effort(request),
        reasoning_budget=_reasoning_budget(request),
        prefill=prefill,
        opens_turn=request.add_generation_prompt is False,
        tools=tools,
        output_format=wanted,
        max_tokens=request.max_completion_tokens or request.max_tokens,
    )
    return request, asked


def _num_rendered(messages: list[Any]) -> int:
    """The least number of Harmony messages that these are rendered to.

    System messages are joined, and an assistant's message may be rendered to none.
    """
    count = 0
    for message in messages:
        if isinstance(message, Mapping):
            calls = message.get("tool_calls")
            count += len(calls) if isinstance(calls, list) else 0
            count += message.get("role") in ("user", "tool", "function")
    return count


def _effort(request: ChatCompletionRequest) -> ReasoningEffort | None:
    """OpenAI's field takes precedence over OpenRouter's, which takes precedence over vLLM's."""
    reasoning, kwargs = request.reasoning, request.chat_template_kwargs
    effort = request.reasoning_effort
    if effort is None and reasoning is not None:
        effort = reasoning.effort
    if effort is None and kwargs is not None:
        effort = kwargs.reasoning_effort
    return EFFORTS[effort] if effort is not None else None


def _reasoning_budget(request: ChatCompletionRequest) -> int | None:
    if request.reasoning_budget is None and request.reasoning is not None:
        return request.reasoning.max_tokens
    return request.reasoning_budget
