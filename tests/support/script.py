"""What a model writes, as a script, and an engine that plays it and caches prompts as the real one does. Without torch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

from gptoss.engine.client.errors import EngineError
from gptoss.engine.messages import AddRequest, FinishReason, TokenOutput
from gptoss.harmony.vocabulary_files import Vocabulary

NEXT = "<|start|>assistant"
BLOCK = 16


@dataclass(frozen=True, slots=True)
class Dies:
    """The engine dies after this text."""

    text: str


Line = str | Dies | EngineError  # text as the model writes it, or how the request fails


def think(text: str) -> str:
    return f"<|channel|>analysis<|message|>{text}<|end|>{NEXT}"


def say(text: str) -> str:
    return f"<|channel|>final<|message|>{text}<|return|>"


def call(name: str, arguments: str) -> str:
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"


def call_builtin(recipient: str, text: str) -> str:
    """A call of a built-in tool as gpt-oss writes it: `browser.search` with JSON, `python` with code."""
    return f"<|channel|>analysis to={recipient} code<|message|>{text}<|call|>"


class Script:
    """An engine's side of generation/session.py: one token for each output.

    What remains after the lines is the answer "Done.".
    """

    def __init__(self, lines: Iterable[Line], vocabulary: Vocabulary) -> None:
        self.vocabulary, self.lines = vocabulary, deque(lines)
        self._cached: set[tuple[int, ...]] = set()  # beginnings, of whole blocks
        self.requests: list[AddRequest] = []
        self.discarded: list[str] = []
        self.lists_prefixes = True  # to say what is cached; quadratic in the prompt

    async def add_requests(self, requests: Sequence[AddRequest]) -> list[AsyncIterator[TokenOutput]]:
        self.requests += requests
        line = self.lines.popleft() if self.lines else say("Done.")
        if isinstance(line, EngineError):
            raise line
        return [self._written(request, line) for request in requests]

    def discard(self, request_id: str) -> None:
        self.discarded.append(request_id)

    async def _written(self, request: AddRequest, line: str | Dies) -> AsyncIterator[TokenOutput]:
        text = line.text if isinstance(line, Dies) else line
        ids = self.vocabulary.encode_with_special(text)
        most, cached = request.params.max_tokens, 0
        if self.lists_prefixes:
            cached = self._num_cached(request.token_ids)
            self._keep(request.token_ids + ids[:most])
        for index, token in enumerate(ids[:most]):
            await asyncio.sleep(0)
            is_last = index + 1 == len(ids) and not isinstance(line, Dies)
            reason = FinishReason.STOP if is_last else FinishReason.LENGTH if index + 1 == most else None
            yield TokenOutput(request.request_id, [token], reason, num_cached_tokens=cached, queue_s=0.0, prefill_s=0.0)
        if isinstance(line, Dies):
            yield TokenOutput(request.request_id, [], FinishReason.ERROR, error="the engine died")

    def _keep(self, ids: list[int]) -> None:
        """The last token is sampled and not computed."""
        self._cached |= {tuple(ids[:end]) for end in range(BLOCK, len(ids), BLOCK)}

    def _num_cached(self, ids: list[int]) -> int:
        found = 0
        while found + BLOCK < len(ids) and tuple(ids[: found + BLOCK]) in self._cached:
            found += BLOCK
        return found
