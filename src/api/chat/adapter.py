"""A validated chat request to what the engine is asked to do."""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gptoss.api.access.api_keys import Caller, tenant_of
from gptoss.api.chat.continuation import beginning, begun
from gptoss.api.chat.messages import FIELDS, read_messages
from gptoss.api.chat.schema import ChatCompletionRequest
from gptoss.api.chat.structured_outputs import FinalFormat, asks_for_format, final_format
from gptoss.api.chat.tools import ToolPlan, plan_tools
from gptoss.api.context import ServerContext
from gptoss.api.http.errors import ContextTooLong, InvalidRequest, NotFound
from gptoss.api.http.fields import EFFORTS, SamplingFields
from gptoss.api.http.work_pool import LOCAL, Sender
from gptoss.api.relaxations import relaxed_format, warn_relaxed
from gptoss.api.telemetry.warn_once import WarnOnce
from gptoss.config.profiles import Profile
from gptoss.engine.messages import AddRequest
from gptoss.engine.sampling_params import LoopGuard, SamplingParams
from gptoss.generation.plan import Plan
from gptoss.generation.relaxed_schema import RelaxedSchema
from gptoss.harmony.bpe import Limits, TooManyTokensError
from gptoss.harmony.conversation import Conversation, PromptError
from gptoss.harmony.grammar import TurnSpec, fitted_grammar, text_grammar, turn_grammar
from gptoss.harmony.schema.checks import SchemaError
from gptoss.harmony.schema.rewrite import ALL, Relaxed
from gptoss.harmony.special_tokens import CALL, END, RETURN, STOP_TOKEN_IDS
from gptoss.prompt_builder import PromptTokens

logger = logging.getLogger(__name__)
GREEDY_BELOW = 1e-5  # a lower temperature would overflow float32 logits
MIN_ANSWER_TOKENS = 16
MESSAGE_TOKENS = 4  # of one that says nothing: start, role, message, end
TOO_COMPLEX = Relaxed("parameters", ALL, "all schemas together are too complex")
EMPTY = Conversation()
NAMED_ROLES = ("user", "function")  # whose `name` the model reads
_warn_names = WarnOnce(logger, "names of messages are not shown to the model for roles: %s")


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A request's plan, and how its answer is to be written."""

    plan: Plan
    created: int
    model: str  # as the client wrote it
    stream: bool
    include_usage: bool
    include_reasoning: bool
    include_relaxations: bool
    has_logprobs: bool
    is_legacy: bool  # asked for with `functions`: answered with `function_call`
    service_tier: str | None


def resolve_model(name: str, context: ServerContext) -> Profile:
    """`model` or `model:profile`. Raises NotFound for a model that is not served."""
    base, _, suffix = name.rpartition(":")
    if suffix in context.profiles and base in context.model_names:
        return context.profiles[suffix]
    if name in context.model_names:
        return context.profile
    raise NotFound(
        f"The model '{name}' does not exist. This server serves {context.model_id!r}.", "model", "model_not_found"
    )


def _profile(request: ChatCompletionRequest, context: ServerContext) -> Profile:
    """`profile` in the body, else the model's suffix, else the server's own."""
    of_model = resolve_model(request.model, context)
    if request.profile is None:
        return of_model
    if request.profile not in context.profiles:
        known = ", ".join(context.profiles)
        raise InvalidRequest(f"Unknown profile {request.profile!r}; there are {known}.", "profile")
    return context.profiles[request.profile]


def _max_tokens(request: ChatCompletionRequest, profile: Profile, prompt_tokens: int, context: ServerContext) -> int:
    """Tokens that may be generated: what was asked for, or the profile's, within the context."""
    room = context.max_model_len - prompt_tokens
    if room < 1:
        raise _too_long(prompt_tokens, context)
    asked = request.max_completion_tokens or request.max_tokens
    max_tokens: int = min(room, asked or profile.max_output_tokens)
    if (request.min_tokens or 0) > max_tokens:
        raise InvalidRequest(f"'min_tokens' is above the {max_tokens} tokens that may be generated.", "min_tokens")
    return max_tokens


def max_messages(context: ServerContext) -> int:
    return context.max_model_len // MESSAGE_TOKENS


def _too_long(num_tokens: int | None, context: ServerContext) -> ContextTooLong:
    """`num_tokens`: of the prompt; None: more than max_model_len."""
    most = context.max_model_len
    error = ContextTooLong(
        f"This model's maximum context length is {most} tokens. However, your messages resulted in "
        f"{num_tokens or f'more than {most}'} tokens. Please reduce the length of the messages.",
        "messages",
        "context_length_exceeded",
    )
    error.num_tokens = num_tokens
    return error


def check_count(num_messages: int, param: str, context: ServerContext) -> None:
    """Refuses so many messages that they cannot fit whatever they say, before they are read one by one."""
    if num_messages > max_messages(context):
        raise ContextTooLong(
            f"This model's maximum context length is {context.max_model_len} tokens. However, your {num_messages} "
            "messages take more, whatever they say. Please reduce the number of messages.",
            param,
            "context_length_exceeded",
        )


def _num_rendered(messages: list[Any]) -> int:
    """At least so many Harmony messages: system messages are joined, and assistants' may come to nothing."""
    count = 0
    for message in messages:
        if isinstance(message, Mapping):
            calls = message.get("tool_calls")
            count += len(calls) if isinstance(calls, list) else 0
            count += message.get("role") in ("user", "tool", "function")
    return count


def _read(
    body: Mapping[str, Any], context: ServerContext, client: str | None
) -> tuple[ChatCompletionRequest, Conversation, Conversation]:
    """The request, its conversation, the message to continue. Raises InvalidRequest or pydantic's ValidationError."""
    sent = body.get("messages")
    check_count(_num_rendered(sent if isinstance(sent, list) else []), "messages", context)
    request = ChatCompletionRequest.model_validate(dict(body))
    _warn_names({m.role for m in request.messages if m.name and m.role not in NAMED_ROLES})
    if client is not None:
        context.unknown_fields.check(body, request, client)
    end = len(request.messages) - bool(request.continue_final_message)
    return request, read_messages(request.messages[:end]), read_messages(request.messages[end:])


async def plan_chat(
    body: Mapping[str, Any],
    context: ServerContext,
    caller: Caller | None,
    sender: Sender = LOCAL,
    *,
    client: str | None = None,
) -> ChatPlan:
    """`client`: whose unknown fields are reported; None where the body is our own. Raises ApiError or pydantic's
    ValidationError; nothing has gone to the engine then."""
    request, conversation, last = await context.read(sender, lambda _: _read(body, context, client))
    try:
        return await plan_conversation(request, conversation, context, caller, sender, last=last)
    except PromptError as error:
        raise InvalidRequest(str(error), f"{error.origin}.{FIELDS[error.field]}", "invalid_value") from None


async def plan_conversation(
    request: ChatCompletionRequest,
    conversation: Conversation,
    context: ServerContext,
    caller: Caller | None,
    sender: Sender,
    *,
    last: Conversation = EMPTY,
    id_prefix: str = "chatcmpl-",
    counts_all: bool = False,
) -> ChatPlan:
    """`last`: the message to continue. `counts_all`: also the tokens of a prompt that is too long. Raises ApiError or
    PromptError; nothing has gone to the engine then."""
    profile = _profile(request, context)
    wanted = request.response_format
    if request.tools or request.functions or wanted or asks_for_format(request):
        guide = context.config.guided_harmony and context.config.guided_tool_arguments
        tools, final = await context.compile(
            sender, lambda: (plan_tools(request, guide_arguments=guide), final_format(request, wanted))
        )
    else:
        tools, final = plan_tools(request), None
    constrained = tools.must_call or final is not None
    begins = beginning(request, constrained=constrained)
    effort = EFFORTS[_effort(request) or profile.effort]
    scope = context.access.cache_scope(caller)
    try:
        prompt = await context.build_prompt(
            conversation,
            sender,
            tools=tools.shown,
            schema=final.shown if final is not None else None,
            effort=effort,
            cache_scope=scope,
            counts_all=counts_all,
        )
        if begins != "message":
            most = sys.maxsize if counts_all else context.max_model_len
            prompt = await context.read(
                sender, lambda stopped: begun(prompt, last, begins, context.vocabulary, Limits(most, stopped))
            )
    except TooManyTokensError:
        raise _too_long(None, context) from None
    except RecursionError:
        raise InvalidRequest("The schemas of the tools are nested too deeply.", "tools") from None
    max_tokens = _max_tokens(request, profile, len(prompt.token_ids), context)
    budget = _budget(request, profile, max_tokens, constrained=constrained)
    if begins == "final":
        guided = context.config.guided_harmony and not request.ignore_eos
        grammar, relaxed = text_grammar(ends=[RETURN]) if guided else None, tools.relaxed
    else:
        grammar, relaxed = await _grammar(request, tools, final, budget, context, is_opened=begins == "message")
    params = _sampling(request, profile, max_tokens, grammar, context)
    completion_id = id_prefix + secrets.token_hex(12)
    requests = _engine_requests(completion_id, request, profile, prompt, params, scope, tenant_of(caller))
    reasoning = request.reasoning
    plan = Plan(
        request_id=completion_id,
        profile=profile,
        requests=requests,
        num_choices=len(requests),
        has_max_tokens=(request.max_completion_tokens or request.max_tokens) is not None,
        stop=request.stop or [],
        relaxed=relaxed,
        cache_scope=scope,
        prompt=prompt,
        begins=begins,
        tool_names=[tool.name for tool in tools.callable],
        max_calls=1 if request.parallel_tool_calls is False or tools.legacy else None,
    )
    return ChatPlan(
        plan,
        created=int(time.time()),
        model=request.model,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        include_reasoning=request.include_reasoning is not False and not (reasoning and reasoning.exclude),
        include_relaxations=bool(request.include_relaxations),
        has_logprobs=bool(request.logprobs),
        is_legacy=tools.legacy,
        service_tier="default" if request.service_tier is not None else None,
    )


def _engine_requests(
    completion_id: str,
    request: ChatCompletionRequest,
    profile: Profile,
    prompt: PromptTokens,
    params: Callable[[int], SamplingParams],
    scope: str,
    tenant: str,
) -> list[AddRequest]:
    priority = profile.priority if request.priority is None else request.priority
    return [
        AddRequest(
            f"{completion_id}-{index}",
            prompt.token_ids,
            params(index),
            priority=priority,
            timeout_s=profile.deadline_s,
            tenant=tenant,
            cache_salt=scope + (request.cache_salt or ""),
        )
        for index in range(request.n or 1)
    ]


def _effort(request: ChatCompletionRequest) -> str | None:
    """The field of OpenAI beats OpenRouter's, which beats vLLM's."""
    if request.reasoning_effort is not None:
        return request.reasoning_effort
    if request.reasoning is not None and request.reasoning.effort is not None:
        return request.reasoning.effort
    kwargs = request.chat_template_kwargs
    return kwargs.reasoning_effort if kwargs is not None else None


def _budget(request: ChatCompletionRequest, profile: Profile, max_tokens: int, *, constrained: bool) -> int | None:
    """Tokens of analysis. A forced call or a schema must still fit after it, so there it is bounded by default."""
    asked = request.reasoning_budget
    if asked is None and request.reasoning is not None:
        asked = request.reasoning.max_tokens
    if asked is not None:
        return min(asked, max(0, max_tokens - MIN_ANSWER_TOKENS)) if constrained else asked
    if not constrained:
        return profile.reasoning_budget
    default = max_tokens // 2 if max_tokens > 2 * MIN_ANSWER_TOKENS else 0
    return default if profile.reasoning_budget is None else min(default, profile.reasoning_budget)


async def _grammar(
    request: ChatCompletionRequest,
    tools: ToolPlan,
    final: FinalFormat | None,
    budget: int | None,
    context: ServerContext,
    *,
    is_opened: bool = True,
) -> tuple[str | None, list[RelaxedSchema]]:
    """-> (the turn's grammar, what of the schemas it does not enforce)."""
    if request.ignore_eos:
        return None, []  # a benchmark wants a length, not an answer
    needed = (
        tools.must_call
        or final is not None
        or budget is not None
        or any(t.constrained and t.asked for t in tools.callable)
    )
    if not needed and not context.config.guided_harmony:
        return None, []
    schema = final.enforced.schema if final is not None and final.enforced is not None else None
    rule = final.text_rule if final is not None else None
    spec = TurnSpec(tools.callable, tools.must_call, schema, rule, budget, is_opened)
    if not tools.callable and final is None:
        return turn_grammar(spec, context.vocabulary), []
    try:
        grammar, left_out = await asyncio.to_thread(fitted_grammar, spec, context.vocabulary)
    except SchemaError as error:
        param = final.field.partition(".")[0] if final is not None else "tools"
        raise InvalidRequest(f"The schemas are too complex to be enforced: {error}", param) from None
    relaxed = [*tools.relaxed, *relaxed_format(final)]
    relaxed += [RelaxedSchema("function", tools.callable[number].name, TOO_COMPLEX) for number in left_out]
    warn_relaxed(relaxed)
    return grammar, relaxed


def _sampling(
    request: ChatCompletionRequest, profile: Profile, max_tokens: int, grammar: str | None, context: ServerContext
) -> Callable[[int], SamplingParams]:
    """-> a function of the choice's index; choices differ by their seeds alone."""
    # what ends a string or an array, where no message may end yet
    closing = [context.vocabulary.rank_of[text] for text in (b'"', b"]")]
    guard = LoopGuard(context.repetition_guard, (END, RETURN, CALL, *closing))
    # the guard would end the message that min_tokens keeps open
    guards = grammar is not None and guard.repeats > 1 and not request.min_tokens
    common = sampling_options(request, profile) | {
        "max_tokens": max_tokens,
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        "grammar": grammar,
        "loop_guard": guard if guards else None,
    }
    seed = base_seed(request)
    return lambda index: SamplingParams(seed=derived_seed(seed, index), **common)


def base_seed(request: SamplingFields) -> int:
    return secrets.randbits(63) if request.seed is None else request.seed


def sampling_options(request: SamplingFields, profile: Profile) -> dict[str, Any]:
    """What chat and raw completions sample alike; the request beats the profile."""
    temperature = profile.temperature if request.temperature is None else request.temperature
    return {
        "temperature": 0.0 if temperature < GREEDY_BELOW else temperature,
        "top_p": profile.top_p if request.top_p is None else request.top_p,
        "top_k": max(0, request.top_k or 0),
        "min_p": request.min_p or 0.0,
        "presence_penalty": request.presence_penalty or 0.0,
        "frequency_penalty": request.frequency_penalty or 0.0,
        "repetition_penalty": request.repetition_penalty or 1.0,
        "logit_bias": request.bias,
        "min_tokens": request.min_tokens or 0,
        "ignore_eos": bool(request.ignore_eos),
        "stop_token_ids": STOP_TOKEN_IDS,
    }


def derived_seed(seed: int, index: int) -> int:
    """Seed of choice `index`; the first choice has the request's own. (splitmix64, Steele et al. 2014.)"""
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z
