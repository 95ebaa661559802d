"""A GenerationRequest to a Plan: the prompt's ids, the grammar and the engine's requests. No I/O."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from gptoss.engine.block_hash import adapter_key
from gptoss.engine.messages import AddRequest
from gptoss.engine.sampling_params import LoopGuard, SamplingParams
from gptoss.generation.errors import ContextTooLongError, GenerationError, Path
from gptoss.generation.format_plan import FormatPlan, plan_format
from gptoss.generation.plan import Plan, Round, Rounds
from gptoss.generation.relaxed_schema import RelaxedSchema
from gptoss.generation.request import GenerationRequest, Prefill, TextPrompts
from gptoss.generation.tool_plan import ToolPlan, plan_tools
from gptoss.harmony.bpe import Limits, TooManyTokensError
from gptoss.harmony.conversation import Conversation, PromptError
from gptoss.harmony.grammar import TurnSpec, fitted_grammar, text_grammar, turn_grammar
from gptoss.harmony.schema.checks import SchemaError
from gptoss.harmony.schema.context import ALL, Relaxed
from gptoss.harmony.special_tokens import (
    CALL,
    CHANNEL,
    END,
    MESSAGE,
    RETURN,
    START,
    STOP_TOKEN_IDS,
    VOCAB_SIZE,
)
from gptoss.harmony.vocabulary_files import Vocabulary
from gptoss.prompt_builder import PromptBuilder, PromptTokens

GREEDY_BELOW = 1e-5  # a lower temperature would overflow float32 logits
MIN_ANSWER_TOKENS = 16
MESSAGE_TOKENS = 4  # of one that says nothing: start, role, message, end
TOO_COMPLEX = Relaxed("parameters", ALL, "all schemas together are too complex")
PROMPT = ("prompt",)
Stopped = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """What of the configuration and the loaded model bounds a request."""

    max_model_len: int
    guided_harmony: bool = True  # the whole turn follows a grammar
    guided_tool_arguments: bool = True  # arguments follow their schemas unasked
    repetition_guard: int = 0  # consecutive repeats of a token run; 0: no limit

    @property
    def max_messages(self) -> int:
        return self.max_model_len // MESSAGE_TOKENS


@dataclass(frozen=True, slots=True)
class Planner:
    limits: PlanLimits
    vocabulary: Vocabulary
    prompt_builder: PromptBuilder

    def plan(self, request: GenerationRequest, stopped: Stopped | None = None, *, counts_all: bool = False) -> Plan:
        """Plans a request: its prompt, its grammar and its requests to the engine.

        `counts_all`: a prompt that is too long is counted to its end.

        Raises:
            GenerationError: the request cannot be run.
            EncodingStoppedError: `stopped` returned true.
        """
        most = sys.maxsize if counts_all else self.limits.max_model_len
        limits = Limits(most) if stopped is None else Limits(most, stopped)
        try:
            if isinstance(request.prompt, TextPrompts):
                return self._plan_texts(request, request.prompt, limits)
            return self._plan_conversation(request, request.prompt, limits)
        except TooManyTokensError:
            raise too_long(self.limits.max_model_len, None) from None
        except PromptError as error:
            raise GenerationError(str(error), (*PROMPT, error.origin, error.field), "invalid_value") from None

    def _plan_conversation(self, request: GenerationRequest, conversation: Conversation, limits: Limits) -> Plan:
        guide = self.limits.guided_harmony and self.limits.guided_tool_arguments
        tools = plan_tools(request.tools, guide_arguments=guide)
        final = plan_format(request.output_format)
        prompt = self._prompt(request, conversation, tools, final, limits)
        max_tokens = self._max_tokens(request, len(prompt.token_ids))
        grammar, relaxed = self._grammar(request, tools, final, reasoning_budget(request, max_tokens))
        tool_names, custom_names = _names(tools)
        params = self._sampling(request) | {
            "grammar": grammar,
            "loop_guard": self._loop_guard(request) if grammar is not None else None,
        }
        return _plan(
            request,
            _engine_requests(request, [(prompt.token_ids, max_tokens)], params),
            relaxed,
            prompt=prompt,
            begins=request.begins,
            tool_names=tool_names,
            custom_names=custom_names,
            max_calls=request.tools.max_calls,
            rounds=self._rounds(request, tools, final, max_tokens) if request.tools.hosted else None,
        )

    def _rounds(self, request: GenerationRequest, tools: ToolPlan, final: FormatPlan, max_tokens: int) -> Rounds:
        """The rounds after the results of the server's tools: a call that was required has been made."""
        again = replace(request, tools=replace(request.tools, mode="auto"), opens_turn=False, prefill=None)
        others = replace(tools, callable=[one for one in tools.callable if one.name not in request.tools.hosted])
        rounds = [self._round(again, one, final, max_tokens) for one in (tools, others)]
        return Rounds(request.tools.hosted, *rounds)

    def _round(self, request: GenerationRequest, tools: ToolPlan, final: FormatPlan, max_tokens: int) -> Round:
        grammar, _ = self._grammar(request, tools, final, reasoning_budget(request, max_tokens))
        guard = self._loop_guard(request) if grammar is not None else None
        options = self._sampling(request) | {"grammar": grammar, "loop_guard": guard, "min_tokens": 0}
        return Round(SamplingParams(seed=0, max_tokens=max_tokens, **options), *_names(tools))

    def _plan_texts(self, request: GenerationRequest, raw: TextPrompts, limits: Limits) -> Plan:
        prompts = [self._ids(prompt, limits) for prompt in raw.prompts]
        final = plan_format(request.output_format)
        params = self._sampling(request) | {
            "grammar": text_grammar(final.rule) if request.output_format is not None else None,
            "prompt_logprobs": request.sampling.logprobs if raw.echo else None,
        }
        sized = [(ids, self._max_tokens(request, len(ids))) for ids in prompts]
        engine_requests = _engine_requests(request, sized, params)
        return _plan(request, engine_requests, final.relaxed, echo=raw.echo, is_silent=request.max_tokens == 0)

    def _ids(self, prompt: str | list[int], limits: Limits) -> list[int]:
        if isinstance(prompt, str):
            return self.vocabulary.encode_with_special(prompt, limits)
        check_token_ids(prompt, PROMPT)
        return prompt

    def _prompt(
        self,
        request: GenerationRequest,
        conversation: Conversation,
        tools: ToolPlan,
        final: FormatPlan,
        limits: Limits,
    ) -> PromptTokens:
        try:
            prompt = self.prompt_builder.build(
                conversation,
                tools=tools.shown,
                builtins=tools.builtins,
                schema=final.shown,
                effort=request.effort or request.profile.effort,
                scope=request.cache_scope,
                limits=limits,
            )
        except RecursionError:
            raise GenerationError("The schemas of the tools are nested too deeply.", ("tools",)) from None
        return continued(prompt, request, self.vocabulary, limits)

    def _max_tokens(self, request: GenerationRequest, num_prompt_tokens: int) -> int:
        """Tokens that may be generated; at least one, as a prompt is scored on the way to it."""
        if not num_prompt_tokens:
            raise GenerationError("The prompt is empty: there is nothing to continue.", PROMPT, "invalid_value")
        left = self.limits.max_model_len - num_prompt_tokens
        if left < 1:
            raise too_long(self.limits.max_model_len, num_prompt_tokens)
        asked = request.profile.max_output_tokens if request.max_tokens is None else request.max_tokens
        max_tokens = max(1, min(left, asked))
        if request.sampling.min_tokens > max_tokens:
            message = f"'min_tokens' is above the {max_tokens} tokens that may be generated."
            raise GenerationError(message, ("sampling", "min_tokens"))
        return max_tokens

    def _grammar(
        self, request: GenerationRequest, tools: ToolPlan, final: FormatPlan, budget: int | None
    ) -> tuple[str | None, Sequence[RelaxedSchema]]:
        """Returns the turn's grammar, and what of the schemas it does not enforce."""
        if request.begins == "final":
            guided = self.limits.guided_harmony and not request.sampling.ignore_eos
            return text_grammar(ends=[RETURN]) if guided else None, tools.relaxed
        needed = request.constrained or budget is not None or any(t.constrained and t.asked for t in tools.callable)
        if request.sampling.ignore_eos or not (needed or self.limits.guided_harmony):
            return None, []
        is_opened = request.begins == "message"
        spec = TurnSpec(tools.callable, request.tools.must_call, final.schema, final.text_rule, budget, is_opened)
        if not tools.callable and request.output_format is None:
            return turn_grammar(spec, self.vocabulary), []
        try:
            grammar, left_out = fitted_grammar(spec, self.vocabulary)
        except SchemaError as error:
            wanted = request.output_format
            path: Path = ("tools",) if wanted is None else ("output_format", wanted.reported_as[0])
            raise GenerationError(f"The schemas are too complex to be enforced: {error}", path) from None
        too_complex = [RelaxedSchema("function", tools.callable[index].name, TOO_COMPLEX) for index in left_out]
        return grammar, [*tools.relaxed, *final.relaxed, *too_complex]

    def _loop_guard(self, request: GenerationRequest) -> LoopGuard | None:
        """The guard against repetition; None if it is off.

        It is off with `min_tokens`, which keeps the message open that the guard would end.
        """
        if self.limits.repetition_guard <= 1 or request.sampling.min_tokens:
            return None
        # what ends a string or an array, where no message may end yet
        closing = [self.vocabulary.rank_of[text] for text in (b'"', b"]")]
        return LoopGuard(self.limits.repetition_guard, (END, RETURN, CALL, *closing))

    @staticmethod
    def _sampling(request: GenerationRequest) -> dict[str, Any]:
        options, profile = request.sampling, request.profile
        temperature = profile.temperature if options.temperature is None else options.temperature
        return {field.name: getattr(options, field.name) for field in fields(options) if field.name != "seed"} | {
            "temperature": 0.0 if temperature < GREEDY_BELOW else temperature,
            "top_p": profile.top_p if options.top_p is None else options.top_p,
            "stop_token_ids": STOP_TOKEN_IDS,
        }


def _names(tools: ToolPlan) -> tuple[list[str], list[str]]:
    """Returns the names of what may be called, and of those whose calls are plain text."""
    called = tools.callable
    return [one.name for one in called], [one.name for one in called if one.text_rule is not None]


def continued(prompt: PromptTokens, request: GenerationRequest, vocabulary: Vocabulary, limits: Limits) -> PromptTokens:
    """The prompt up to where the answer begins. Raises as `Vocabulary.encode` does."""
    opening = [START, *vocabulary.encode("assistant")]
    if request.begins == "turn":
        assert prompt.token_ids[-len(opening) :] == opening
        return replace(prompt, token_ids=prompt.token_ids[: -len(opening)])
    if request.prefill is None:
        return prompt
    begun = _begun(request.prefill, opening, vocabulary, limits)
    return replace(prompt, token_ids=prompt.token_ids + begun)


def _begun(prefill: Prefill, opening: list[int], vocabulary: Vocabulary, limits: Limits) -> list[int]:
    ids: list[int] = []
    for thought in prefill.reasoning:
        ids += [CHANNEL, *vocabulary.encode("analysis"), MESSAGE]
        ids += [*vocabulary.encode(thought, limits.less(len(ids))), END, *opening]
    ids += [CHANNEL, *vocabulary.encode("final"), MESSAGE]
    return ids + vocabulary.encode(prefill.text, limits.less(len(ids)))


def reasoning_budget(request: GenerationRequest, max_tokens: int) -> int | None:
    """The number of analysis tokens that are allowed; None: unlimited.

    A forced call or a schema must still fit after them, so there it is bounded by default.
    """
    asked, default = request.reasoning_budget, request.profile.reasoning_budget
    if not request.constrained:
        return default if asked is None else asked
    if asked is not None:
        return min(asked, max(0, max_tokens - MIN_ANSWER_TOKENS))
    half = max_tokens // 2 if max_tokens > 2 * MIN_ANSWER_TOKENS else 0
    return half if default is None else min(half, default)


def too_long(max_model_len: int, num_tokens: int | None, path: Path = PROMPT) -> ContextTooLongError:
    """The error for a prompt of `num_tokens`; None: more than max_model_len."""
    message = (
        f"This model's maximum context length is {max_model_len} tokens. However, your input has "
        f"{num_tokens or f'more than {max_model_len}'} tokens. Please reduce its length."
    )
    return ContextTooLongError(message, path, num_tokens)


def check_num_messages(count: int, limits: PlanLimits) -> None:
    """Raises ContextTooLongError for more messages than fit, before they are read one by one."""
    if count > limits.max_messages:
        message = (
            f"This model's maximum context length is {limits.max_model_len} tokens. However, your {count} messages "
            "exceed it even if all are empty. Please reduce the number of messages."
        )
        raise ContextTooLongError(message, PROMPT)


def check_token_ids(ids: Sequence[int], path: Path) -> None:
    """Raises GenerationError if an id is not in the vocabulary."""
    if not all(0 <= token_id < VOCAB_SIZE for token_id in ids):
        raise GenerationError(f"Token ids must lie between 0 and {VOCAB_SIZE - 1}.", path, "invalid_value")


def _plan(
    request: GenerationRequest, requests: Sequence[AddRequest], relaxed: Sequence[RelaxedSchema], **own: Any
) -> Plan:
    """The plan of a request. `own`: the fields of one kind of prompt."""
    return Plan(
        request_id=request.request_id,
        profile=request.profile,
        requests=requests,
        num_choices=request.num_choices,
        has_max_tokens=request.max_tokens is not None,
        stop=request.stop,
        stream=request.stream,
        relaxed=relaxed,
        cache_scope=request.cache_scope,
        **own,
    )


def _engine_requests(
    request: GenerationRequest, prompts: Sequence[tuple[list[int], int]], params: dict[str, Any]
) -> list[AddRequest]:
    """One for each choice of each prompt. `prompts`: ids, and the tokens that may follow them."""
    seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
    adapter = request.adapter
    adapter_id, key = (0, "") if adapter is None else (adapter.id, adapter_key(adapter.name, adapter.digest))
    out: list[AddRequest] = []
    for ids, max_tokens in prompts:
        for copy in range(request.num_choices):
            out.append(
                AddRequest(
                    f"{request.request_id}-{len(out)}",
                    ids,
                    SamplingParams(seed=derived_seed(seed, copy), max_tokens=max_tokens, **params),
                    priority=request.profile.priority if request.priority is None else request.priority,
                    timeout_s=request.profile.deadline_s,
                    tenant=request.tenant,
                    cache_salt=request.cache_scope + request.cache_salt,
                    adapter=adapter_id,
                    adapter_key=key,
                )
            )
    return out


def derived_seed(seed: int, index: int) -> int:
    """Seed of choice `index`; the first choice has the request's own. (splitmix64, Steele et al. 2014.)"""
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z
