"""One completion request that runs: prompts, limits, admission, the end."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from gptoss.api.access.api_keys import tenant_of
from gptoss.api.access.usage import Work
from gptoss.api.chat.adapter import base_seed, derived_seed, resolve_model, sampling_options
from gptoss.api.chat.structured_outputs import FinalFormat, asks_for_format, final_format
from gptoss.api.completions.schema import DEFAULT_MAX_TOKENS, CompletionRequest
from gptoss.api.context import ServerContext
from gptoss.api.http.errors import Cancelled, EngineFailure, InvalidRequest
from gptoss.api.http.fields import VOCAB_SIZE
from gptoss.api.http.sse import interleave
from gptoss.api.http.work_pool import Sender, Stopped
from gptoss.api.relaxations import relaxations, relaxed_format, warn_relaxed
from gptoss.api.telemetry.request_record import RequestRecord
from gptoss.config.profiles import Profile
from gptoss.engine.messages import AddRequest, TokenOutput
from gptoss.engine.sampling_params import SamplingParams
from gptoss.generation.stop_strings import StopStrings
from gptoss.generation.text_output import Numbers, TextChoice
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


@dataclass(slots=True)
class TextAnswer:
    request: CompletionRequest
    context: ServerContext
    engine_requests: list[AddRequest]
    choices: list[TextChoice]
    streams: list[AsyncIterator[TokenOutput]]
    record: RequestRecord
    head: dict[str, Any]
    end: dict[str, Any]  # for the answer, or the last chunk that has choices
    closed: bool = False

    @property
    def usage(self) -> dict[str, Any]:
        per_prompt = self.request.n or 1
        of_prompt = [self.choices[first : first + per_prompt] for first in range(0, len(self.choices), per_prompt)]
        prompt = sum(len(copies[0].prompt_ids) for copies in of_prompt)
        completion = sum(c.num_tokens for c in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(max(c.num_cached_tokens for c in copies) for copies in of_prompt)
            },
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    async def events(self) -> AsyncGenerator[tuple[TextChoice, str, Numbers], None]:
        ended: set[int] = set()
        try:
            async with contextlib.aclosing(interleave(self.streams)) as batches:
                async for batch in batches:
                    for index, output in batch:
                        if index in ended:
                            continue
                        choice = self.choices[index]
                        if output.token_ids and not choice.is_silent:
                            self.record.tokens_arrived(len(output.token_ids))
                        text, numbers = choice.feed(output)
                        if choice.finish_reason is not None:
                            ended.add(index)
                            # by a stop string: the engine knows of none
                            self.context.engine.discard(self.engine_requests[index].request_id)
                        if choice.error is not None:
                            raise (Cancelled() if self.record.cancelled else EngineFailure(choice.error))
                        yield choice, text, numbers
                    if len(ended) == len(self.choices):
                        return
        finally:
            self.close()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for request in self.engine_requests:
            self.context.engine.discard(request.request_id)
        usage = self.usage
        self.record.num_prompt_tokens = usage["prompt_tokens"]
        self.record.num_cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        reasons = [c.finish_reason for c in self.choices]
        self.context.tracker.end(self.record, reasons, self.context.tags, None)

    def choice_body(self, choice: TextChoice, text: str, numbers: Numbers, finish_reason: str | None) -> dict[str, Any]:
        return {
            "text": text,
            "index": choice.index,
            "logprobs": numbers if self.request.logprobs is not None else None,
            "finish_reason": finish_reason,
        }


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


async def start_completion(
    body: dict[str, Any], context: ServerContext, record: RequestRecord, sender: Sender, client: str
) -> TextAnswer:
    """Raises ApiError, ValidationError or EngineError."""
    request, profile, prompts = await context.read(sender, lambda stopped: _read(body, context, client, stopped))
    _check_completions(len(prompts) * (request.n or 1))
    completion_id = f"cmpl-{secrets.token_hex(12)}"
    final = await _final_format(request)
    relaxed = relaxed_format(final)
    warn_relaxed(relaxed)
    make_params = _params(request, profile, text_grammar(final.rule) if final is not None else None)
    scope = context.access.cache_scope(record.caller)
    requests, choices = [], []
    for number, ids in enumerate(prompts):
        max_tokens = _max_tokens(request, len(ids), context)
        for copy in range(request.n or 1):
            index = number * (request.n or 1) + copy
            params = make_params(copy, max_tokens)
            requests.append(
                AddRequest(
                    f"{completion_id}-{index}",
                    ids,
                    params,
                    priority=profile.priority if request.priority is None else request.priority,
                    timeout_s=profile.deadline_s,
                    cache_salt=scope + (request.cache_salt or ""),
                    tenant=tenant_of(record.caller),
                )
            )
            choices.append(
                TextChoice(
                    index,
                    context.vocabulary,
                    ids,
                    StopStrings(request.stop or []),
                    echoes=bool(request.echo),
                    is_silent=request.max_tokens == 0,
                )
            )
    if record.allowance is not None:
        work = Work(
            num_choices=len(requests),
            num_prompt_tokens=sum(map(len, prompts)),
            max_tokens=sum(r.params.max_tokens for r in requests),
            names_max_tokens=True,  # the default is small
        )
        context.access.usage.admit(record.allowance, work)
    streams = await context.engine.add_requests(requests)
    request.logit_bias = None  # the parameters have it; as an object it may take 25 MB
    record.completion_id, record.profile = completion_id, profile.name
    record.stream = bool(request.stream)
    context.tracker.begin(record, [r.request_id for r in requests])
    head = {
        "id": completion_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": request.model,
        "system_fingerprint": context.system_fingerprint,
    }
    end = relaxations(relaxed if request.include_relaxations else None)
    return TextAnswer(request, context, requests, choices, streams, record, head, end)


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
