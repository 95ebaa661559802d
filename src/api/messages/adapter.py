"""A request of /v1/messages to a GenerationRequest, and the names of its fields back."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from gptoss.api.context import Reading
from gptoss.api.hosted.names import browser_session
from gptoss.api.hosted.service import Prepared
from gptoss.api.http.errors import InvalidRequest, field_names, from_validation
from gptoss.api.http.fields import EFFORTS
from gptoss.api.http.output_format import output_format
from gptoss.api.messages.conversation import num_rendered, read_conversation
from gptoss.api.messages.output import MessagePlan
from gptoss.api.messages.schema.blocks import AssistantMessage, ForeignBlock
from gptoss.api.messages.schema.request import CountTokensRequest, MessagesRequest, field_of
from gptoss.api.messages.server_tools import USE, runs_nothing
from gptoss.api.messages.tools import builtin_entries, hosted_entries, read_tools
from gptoss.api.telemetry.warn_once import WarnOnce
from gptoss.generation.errors import ContextTooLongError, Path
from gptoss.generation.plan import Plan
from gptoss.generation.planner import MESSAGE_TOKENS, check_num_messages
from gptoss.generation.request import GenerationRequest, OutputFormat
from gptoss.harmony.render import ReasoningEffort

logger = logging.getLogger(__name__)
IGNORED = ("context_management", "container", "diagnostics", "inference_geo", "speed")
FIELDS = {"id": "id", "call_id": "tool_use_id", "name": "name"}  # what the fields of a PromptError are called here
_warn_ignored = WarnOnce(logger, "fields that only Anthropic's services know are ignored: %s")
R = TypeVar("R", bound=CountTokensRequest)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What was read of a body."""

    generation: GenerationRequest
    tool_fields: list[str]
    hosted: Prepared | None = None  # what the server runs of its tools

    def field_name(self, path: Path) -> str | None:
        """What /v1/messages calls the part of a GenerationRequest at this path."""
        match path:
            case ("tools", int(index), field):
                return f"{self.tool_fields[index]}.{'input_schema' if field == 'parameters' else field}"
            case ("prompt", str(origin), str(field)):
                return f"{origin}.{FIELDS[field]}"
            case ("prompt",):
                return "messages"
            case ("output_format", str(field)):
                return "output_config.format" if field == "response_format" else field
            case ("sampling", str(field)):
                return field
        return str(path[0]) if path else None


async def plan_message(body: dict[str, Any], incoming: Reading) -> MessagePlan:
    """The plan of a Messages request; nothing has been sent to the engine yet. Raises ApiError."""
    request, asked = await _read(MessagesRequest, body, incoming)
    try:
        return MessagePlan(await _checked_plan(request, asked, incoming), request, asked.hosted)
    except BaseException:
        _release(asked)
        raise


async def _checked_plan(request: MessagesRequest, asked: _Asked, incoming: Reading) -> Plan:
    with field_names(asked.field_name):
        try:
            plan = await _plan(asked.generation, incoming)
        except ContextTooLongError as error:
            raise _too_long(error.num_tokens, incoming) from error
    num_tokens, most = len(plan.prompts[0]), incoming.planner.limits.max_model_len
    if num_tokens + request.max_tokens > most:
        raise InvalidRequest(
            f"input length and `max_tokens` exceed context limit: {num_tokens} + {request.max_tokens} > {most}, "
            "decrease input length or `max_tokens` and try again",
            code="context_length_exceeded",
        )
    return plan


def _release(asked: _Asked) -> None:
    if asked.hosted is not None:
        asked.hosted.chain.finish(None)


async def count_tokens(body: dict[str, Any], incoming: Reading) -> int:
    """Tokens of the prompt, also of one that is too long. Raises ApiError."""
    _, asked = await _read(CountTokensRequest, body, incoming)
    with field_names(asked.field_name):
        try:
            plan = await _plan(asked.generation, incoming)
        except ContextTooLongError as error:
            if error.num_tokens is None:
                raise
            return error.num_tokens
        finally:
            _release(asked)
    return len(plan.prompts[0])


async def _plan(asked: GenerationRequest, incoming: Reading) -> Plan:
    plan = partial(incoming.planner.plan, asked, counts_all=True)
    return await incoming.pool.read(incoming.sender, plan, is_slow=asked.has_schemas)


async def _read(model: type[R], body: dict[str, Any], incoming: Reading) -> tuple[R, _Asked]:
    def read() -> tuple[R, _Asked]:
        messages = body.get("messages")
        count = num_rendered(messages) if isinstance(messages, list) else 0
        try:
            check_num_messages(count, incoming.planner.limits)
        except ContextTooLongError as error:
            raise _too_long(count * MESSAGE_TOKENS, incoming) from error
        request = model.model_validate(body)
        incoming.unknown_fields.check(body, request, incoming.sender.client)
        return request, _asked(request, incoming)

    try:
        request, asked = await incoming.pool.read(incoming.sender, lambda _: read())
    except ValidationError as error:
        raise invalid(error) from None
    return request, await _with_servers(request, asked, incoming)


async def _with_servers(request: CountTokensRequest, asked: _Asked, incoming: Reading) -> _Asked:
    """What was read, with the tools of MCP servers. Raises InvalidRequest."""
    entries = hosted_entries(request)
    if incoming.tools is not None:
        entries += builtin_entries(request, incoming.tools.runs)
    if not entries:
        return asked
    if incoming.tools is None:
        text = "The server runs no tools for this request: leave 'mcp_servers' out."
        raise InvalidRequest(text, "mcp_servers", "unsupported_value")
    names = [tool.name for tool in asked.generation.tools.tools]
    hosted = await incoming.tools.prepare(
        entries, incoming.sender.tenant, taken=names, containers=_sessions_of(request)
    )
    try:
        return await incoming.pool.read(incoming.sender, lambda _: _asked(request, incoming, hosted))
    except BaseException:
        hosted.chain.finish(None)
        raise


def _sessions_of(request: CountTokensRequest) -> list[str]:
    """The ids of the browser's sessions that earlier answers used, the last one last."""
    blocks = [
        block
        for message in request.messages
        if isinstance(message, AssistantMessage) and not isinstance(message.content, str)
        for block in message.content
    ]
    found = [browser_session(USE, block.id) for block in blocks if isinstance(block, ForeignBlock)]
    return [*dict.fromkeys(one for one in found if one is not None)]


def _asked(request: CountTokensRequest, incoming: Reading, hosted: Prepared | None = None) -> _Asked:
    _warn_ignored(field for field in IGNORED if getattr(request, field) is not None)
    runs = incoming.tools.runs if incoming.tools is not None else runs_nothing
    tools = read_tools(request, hosted, runs)
    wanted = output_format(request, _format(request))
    conversation, prefill = read_conversation(request, runs)
    if prefill is not None and (tools.policy.must_call or wanted is not None):
        last = f"messages.{len(request.messages) - 1}"
        message = f"'{last}' begins the answer, which cannot be combined with a forced call or an output format."
        raise InvalidRequest(message, last)
    thinking = request.thinking
    is_disabled = thinking is not None and thinking.type == "disabled"
    generation = request.generation_request(
        incoming.sender,
        conversation,
        id_prefix="msg_",
        profile=incoming.profiles.of(request.model, request.profile),
        adapter=incoming.profiles.adapter_of(request.model),
        effort="low" if is_disabled else _effort(request),
        reasoning_budget=0 if is_disabled else thinking.budget_tokens if thinking is not None else None,
        prefill=prefill,
        tools=tools.policy,
        output_format=wanted,
        max_tokens=request.max_tokens if isinstance(request, MessagesRequest) else None,
    )
    return _Asked(generation, tools.fields, hosted)


def _effort(request: CountTokensRequest) -> ReasoningEffort | None:
    effort = request.output_config.effort if request.output_config is not None else None
    return EFFORTS[effort] if effort is not None else None


def _format(request: CountTokensRequest) -> OutputFormat | None:
    wanted = request.output_config.format if request.output_config is not None else None
    if wanted is None:
        return None
    field = "output_config.format.schema"
    return OutputFormat("json", wanted.schema_, field, ("output_config", field), "response", strict=True)


def _too_long(num_tokens: int | None, incoming: Reading) -> InvalidRequest:
    """The error in Anthropic's wording, from which clients read the two numbers."""
    most = incoming.planner.limits.max_model_len
    message = f"prompt is too long: {most + 1 if num_tokens is None else num_tokens} tokens > {most} maximum"
    return InvalidRequest(message, code="context_length_exceeded")


def invalid(error: ValidationError) -> InvalidRequest:
    """The first problem, with the field as Anthropic writes it."""
    first = error.errors(include_url=False)[0]
    if first["type"] not in ("union_tag_invalid", "union_tag_not_found"):
        return from_validation(error, name_of=field_of)
    where, context = field_of(first["loc"]), first.get("ctx") or {}
    kind = "role" if "_role" in str(context.get("discriminator")) else "type"
    allowed = ", ".join(tag for tag in re.findall(r"'<(\w+)>'", str(context.get("expected_tags"))) if tag != "foreign")
    if first["type"] == "union_tag_not_found":
        return InvalidRequest(f"'{where}' must be an object with a string '{kind}'.", where, "invalid_type")
    given = str(context.get("tag")).strip("<>")
    return InvalidRequest(f"'{where}.{kind}' is {given!r}; use one of {allowed}.", f"{where}.{kind}", "invalid_value")
