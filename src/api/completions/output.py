"""An answer as text completions: server-sent events, or one JSON body."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from gptoss.api.completions.adapter import CompletionPlan
from gptoss.api.http.errors import from_generation
from gptoss.api.http.sse import DONE, encode_event
from gptoss.api.telemetry.relaxations import relaxations
from gptoss.generation.errors import GenerationFailedError
from gptoss.generation.session import Generation
from gptoss.generation.text_output import TextChoice, TextDelta, TextLogprob


class CompletionRenderer:
    def __init__(
        self, completion: CompletionPlan, generation: Generation[TextChoice, TextDelta], fingerprint: str
    ) -> None:
        self._completion, self._generation = completion, generation
        self._head = {
            "id": completion.plan.request_id,
            "object": "text_completion",
            "created": completion.created,
            "model": completion.model,
            "system_fingerprint": fingerprint,
        }
        # with the answer, or with the last chunk that has choices
        self._closing = relaxations(completion.plan.relaxed, completion.include_relaxations)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        completion, generation = self._completion, self._generation
        num_running = len(generation.choices)
        unscored = set(generation.choices if completion.scores_prompt else ())  # to be echoed once scored
        try:
            async with contextlib.aclosing(generation.events()) as events:
                if completion.plan.echo and not completion.scores_prompt:
                    for choice in generation.choices:
                        yield self._chunk([self._choice(choice, choice.echo, [])])
                async for batch in events:
                    for choice, deltas in batch:
                        if choice in unscored and choice.is_scored:
                            unscored.remove(choice)
                            yield self._chunk([self._choice(choice, choice.echo, choice.echo_logprobs())])
                        if choice.error is None and (deltas or choice.finish_reason is not None):
                            num_running -= choice.finish_reason is not None
                            body = self._choice(choice, *_joined(deltas), choice.finish_reason)
                            yield self._chunk([body], **(self._closing if not num_running else {}))
            if completion.include_usage:
                yield self._chunk([], usage=self._usage())
        except GenerationFailedError as error:
            yield b"data: " + encode_event(from_generation(error).body) + b"\n\n"
        yield DONE

    async def collect(self) -> bytes:
        """The whole answer as one body. Raises GenerationFailedError."""
        generation = self._generation
        collected: dict[int, list[TextDelta]] = {choice.index: [] for choice in generation.choices}
        async with contextlib.aclosing(generation.events()) as events:
            async for batch in events:
                for choice, deltas in batch:
                    collected[choice.index] += deltas
        choices = []
        for choice in generation.choices:
            text, logprobs = _joined(collected[choice.index])
            if self._completion.scores_prompt:
                logprobs = choice.echo_logprobs() + logprobs
            choices.append(self._choice(choice, choice.echo + text, logprobs, choice.finish_reason))
        return encode_event(self._head | {"choices": choices, "usage": self._usage()} | self._closing)

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        extra: dict[str, Any] = {"usage": None} if self._completion.include_usage else {}
        return b"data: " + encode_event(self._head | {"choices": choices} | extra | more) + b"\n\n"

    def _choice(
        self, choice: TextChoice, text: str, logprobs: Sequence[TextLogprob], finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {
            "text": text,
            "index": choice.index,
            "logprobs": _columns(logprobs) if self._completion.has_logprobs else None,
            "finish_reason": finish_reason,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage
        return {
            "prompt_tokens": usage.num_prompt_tokens,
            "completion_tokens": usage.num_completion_tokens,
            "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


def _joined(deltas: Sequence[TextDelta]) -> tuple[str, list[TextLogprob]]:
    return "".join(delta.text for delta in deltas), [entry for delta in deltas for entry in delta.logprobs]


def _columns(logprobs: Sequence[TextLogprob]) -> dict[str, list[Any]]:
    """OpenAI's form: lists with an entry for each token."""
    return {
        "tokens": [entry.token for entry in logprobs],
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [entry.alternatives for entry in logprobs],
        "text_offset": [entry.offset for entry in logprobs],
    }
