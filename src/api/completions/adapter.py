"""A raw completion request to a GenerationRequest, and the names of its fields back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from gptoss.api.completions.schema import DEFAULT_MAX_TOKENS, MAX_COMPLETIONS, CompletionRequest
from gptoss.api.context import Reading
from gptoss.api.http.errors import InvalidRequest, field_names
from gptoss.api.http.output_format import output_format
from gptoss.generation.errors import Path
from gptoss.generation.plan import Plan
from gptoss.generation.request import GenerationRequest, TextPrompts


@dataclass(frozen=True, slots=True)
class CompletionPlan:
    """A request's plan, and how its answer is to be written."""

    plan: Plan
    created: int
    model: str  # as the client wrote it
    include_usage: bool
    include_relaxations: bool

    @property
    def has_logprobs(self) -> bool:
        return self.plan.params.logprobs is not None

    @property
    def scores_prompt(self) -> bool:
        return self.plan.params.prompt_logprobs is not None


async def plan_completion(body: dict[str, Any], incoming: Reading) -> CompletionPlan:
    """The plan of a completion request; nothing has been sent to the engine yet.

    Raises ApiError or pydantic's ValidationError.
    """
    sender, pool = incoming.sender, incoming.pool
    request, asked = await pool.read(sender, lambda _: read_completion(body, incoming))
    with field_names(field_name):
        plan = await pool.read(sender, partial(incoming.planner.plan, asked), is_slow=asked.has_schemas)
    return CompletionPlan(
        plan,
        created=int(time.time()),
        model=request.model,
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        include_relaxations=bool(request.include_relaxations),
    )


def field_name(path: Path) -> str | None:
    """What completions call the part of a GenerationRequest at this path."""
    return str(path[-1]) if path else None


def read_completion(body: dict[str, Any], incoming: Reading) -> tuple[CompletionRequest, GenerationRequest]:
    """The validated request, and what it asks of the model.

    Raises ApiError or pydantic's ValidationError.
    """
    request = CompletionRequest.model_validate(body)
    incoming.unknown_fields.check(body, request, incoming.sender.client)
    prompts = read_prompts(request.prompt)
    _check_completions(len(prompts) * (request.n or 1))
    own = request.response_format.output_format if request.response_format is not None else None
    asked = request.generation_request(
        incoming.sender,
        TextPrompts(prompts, echo=bool(request.echo)),
        id_prefix="cmpl-",
        profile=incoming.profiles.of(request.model),
        adapter=incoming.profiles.adapter_of(request.model),
        logprobs=request.logprobs,
        output_format=None if request.ignore_eos else output_format(request, own),
        max_tokens=DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
    )
    return request, asked


def read_prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts as texts or token ids. Raises InvalidRequest.

    A prompt is a string, a list of strings, a list of token ids or a list of such lists.
    """
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if type(prompt[0]) is not int:
            _check_completions(len(prompt))
        if all(type(p) is int for p in prompt):
            return [prompt]
        if all(isinstance(p, str) for p in prompt):
            return prompt
        if all(isinstance(p, list) and p and all(type(i) is int for i in p) for p in prompt):
            return prompt
    raise InvalidRequest(
        "'prompt' must be a string, an array of strings, an array of token ids, or an array of such arrays.",
        "prompt",
        "missing_required_parameter" if prompt is None else "invalid_type",
    )


def _check_completions(count: int) -> None:
    if count > MAX_COMPLETIONS:
        message = f"More than {MAX_COMPLETIONS} completions in one request."
        raise InvalidRequest(message, "prompt", "array_above_max_length")
