"""A raw completion request to a plan."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptoss.api.access.api_keys import Caller, tenant_of
from gptoss.api.chat.adapter import base_seed, derived_seed, resolve_model, sampling_options
from gptoss.api.chat.structured_outputs import FinalFormat, asks_for_format, final_format
from gptoss.api.completions.schema import DEFAULT_MAX_TOKENS, CompletionRequest
from gptoss.api.context import ServerContext
from gptoss.api.http.errors import InvalidRequest
from gptoss.api.http.fields import VOCAB_SIZE
from gptoss.api.http.work_pool import Sender, Stopped
from gptoss.api.relaxations import relaxed_format, warn_relaxed
from gptoss.config.profiles import Profile
from gptoss.engine.messages import AddRequest
from gptoss.engine.sampling_params import SamplingParams
from gptoss.generation.plan import Plan
from gptoss.harmony.bpe import UNLIMITED, Limits, TooManyTokensError
from gptoss.harmony.grammar import text_grammar
from gptoss.harmony.vocabulary_files import Vocabulary

MAX_COMPLETIONS = 128  # of one request


def read_prompts(prompt: Any, vocabulary: Vocabulary, limits: Limits = UNLIMITED) -> list[list[int]]:
    """string | [string] | [int] | [[int]] -> token ids. Special tokens in the text are special: the caller writes the
    whole prompt. Raises InvalidRequest, and what `limits` raises for one of the prompts."""
    if isinstance(prompt, str):
        return [vocabulary.encode_with_special(prompt, limits)]
    if isinstance(prompt, list) and prompt:
        if type(prompt[0]) is not int:
            _check_completions(len(prompt))
        if all(isinstance(p, str) for p in prompt):
            return [vocabulary.encode_with_special(p, limits) for p in prompt]
        if all(type(p) is int for p in prompt):
            return [_check_ids(prompt)]
        if all(isinstance(p, list) and p and all(type(i) is int for i in p) for p in prompt):
            return [_check_ids(p) for p in prompt]
    raise InvalidRequest(
        "'prompt' must be a string, an array of strings, an array of token ids, or an array of such arrays.",
        "prompt",
        "missing_required_parameter" if prompt is None else "invalid_type",
    )


def _check_completions(count: int) -> None:
    if count > MAX_COMPLETIONS:
        raise InvalidRequest(
            f"More than {MAX_COMPLETIONS} completions in one request.", "prompt", "array_above_max_length"
        )


def _check_ids(ids: list[int]) -> list[int]:
    if not all(0 <= i < VOCAB_SIZE for i in ids):
        raise InvalidRequest(f"Token ids must lie between 0 and {VOCAB_SIZE - 1}.", "prompt", "invalid_value")
    return ids


@dataclass(frozen=True, slots=True)
class CompletionPlan:
    """A request's plan, and how its answer is to be written."""

    plan: Plan
    created: int
    model: str  # as the client wrote it
    stream: bool
    include_usage: bool
    include_relaxations: bool

    @property
    def has_logprobs(self) -> bool:
        return self.plan.params.logprobs is not None

    @property
    def scores_prompt(self) -> bool:
        return self.plan.params.prompt_logprobs is not None


def _too_long(num_tokens: str, context: ServerContext) -> InvalidRequest:
    return InvalidRequest(
        f"This model's maximum context length is {context.max_model_len} tokens. However, your prompt has "
        f"{num_tokens} tokens.",
        "prompt",
        "context_length_exceeded",
    )


def _max_tokens(request: CompletionRequest, prompt_tokens: int, context: ServerContext) -> int:
    """Tokens that may be generated; one at least, as a prompt is scored on the way to it. Raises InvalidRequest."""
    if not prompt_tokens:
        raise InvalidRequest("The prompt is empty: there is nothing to go on from.", "prompt", "invalid_value")
    room = context.max_model_len - prompt_tokens
    if room < 1:
        raise _too_long(str(prompt_tokens), context)
    wanted = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    max_tokens: int = max(1, min(room, wanted))
    if (request.min_tokens or 0) > max_tokens:
        raise InvalidRequest(f"'min_tokens' is above the {max_tokens} tokens that may be generated.", "min_tokens")
    return max_tokens


def _read(
    body: dict[str, Any], context: ServerContext, client: str, stopped: Stopped
) -> tuple[CompletionRequest, Profile, list[list[int]]]:
    """-> (the request, its profile, its prompts)."""
    request = CompletionRequest.model_validate(body)
    context.unknown_fields.check(body, request, client)
    profile = resolve_model(request.model, context)
    limits = Limits(context.max_model_len, stopped)
    try:
        return request, profile, read_prompts(request.prompt, context.vocabulary, limits)
    except TooManyTokensError:
        raise _too_long(f"more than {context.max_model_len}", context) from None


async def plan_completion(
    body: dict[str, Any], context: ServerContext, caller: Caller | None, sender: Sender, client: str
) -> CompletionPlan:
    """Raises ApiError or pydantic's ValidationError; nothing has been sent to the engine then."""
    request, profile, prompts = await context.read(sender, lambda stopped: _read(body, context, client, stopped))
    num_choices = request.n or 1
    _check_completions(len(prompts) * num_choices)
    request_id = f"cmpl-{secrets.token_hex(12)}"
    final = await _final_format(request)
    relaxed = relaxed_format(final)
    warn_relaxed(relaxed)
    make_params = _params(request, profile, text_grammar(final.rule) if final is not None else None)
    requests: list[AddRequest] = []
    for ids in prompts:
        max_tokens = _max_tokens(request, len(ids), context)
        for copy in range(num_choices):
            requests.append(
                AddRequest(
                    f"{request_id}-{len(requests)}",
                    ids,
                    make_params(copy, max_tokens),
                    priority=profile.priority if request.priority is None else request.priority,
                    timeout_s=profile.deadline_s,
                    cache_salt=context.access.cache_scope(caller) + (request.cache_salt or ""),
                    tenant=tenant_of(caller),
                )
            )
    plan = Plan(
        request_id=request_id,
        profile=profile,
        requests=requests,
        num_choices=num_choices,
        has_max_tokens=True,  # the default is small
        stop=request.stop or [],
        relaxed=relaxed,
        echo=bool(request.echo),
        is_silent=request.max_tokens == 0,
    )
    return CompletionPlan(
        plan,
        created=int(time.time()),
        model=request.model,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        include_relaxations=bool(request.include_relaxations),
    )


async def _final_format(request: CompletionRequest) -> FinalFormat | None:
    """Of the text alone: a raw completion has no messages. Raises InvalidRequest."""
    wanted = request.response_format
    if request.ignore_eos or not (wanted or asks_for_format(request)):
        return None
    return await asyncio.to_thread(final_format, request, wanted)


def _params(request: CompletionRequest, profile: Profile, grammar: str | None) -> Callable[[int, int], SamplingParams]:
    """-> a function of the choice's index and its token limit."""
    common = sampling_options(request, profile) | {
        "logprobs": request.logprobs,
        "grammar": grammar,
        "prompt_logprobs": request.logprobs if request.scores_prompt else None,
    }
    seed = base_seed(request)
    return lambda index, max_tokens: SamplingParams(seed=derived_seed(seed, index), max_tokens=max_tokens, **common)
