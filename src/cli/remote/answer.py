"""One generated answer: the request's events folded into text, reasoning, logprobs, usage and timings."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WITH_USAGE = {"stream_options": {"include_usage": True}}


@dataclass(slots=True)
class Timings:
    """Seconds since the request was sent, and the rate of tokens after the first."""

    ttft_s: float | None = None
    total_s: float = 0.0
    tokens_per_s: float | None = None


@dataclass(slots=True)
class Answer:
    """The first choice of an answer."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    model: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] | None = None  # where the server sends them
    usage: dict[str, Any] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read(events: Iterable[dict[str, Any]], answer: Answer) -> Iterator[tuple[str, str]]:
    """Yields pieces as they arrive, ("reasoning" or "text", piece), and fills `answer`."""
    started = time.perf_counter()
    first = last = 0.0
    for event in events:
        last = time.perf_counter() - started
        answer.model = event.get("model") or answer.model
        answer.usage = event.get("usage") or answer.usage
        for choice in event.get("choices") or ():
            if choice.get("index", 0) == 0:
                pieces = _fold(choice, answer)
                if (pieces or choice.get("finish_reason")) and not first:
                    first = answer.timings.ttft_s = last
                yield from pieces
    answer.timings.total_s = time.perf_counter() - started
    tokens = answer.usage.get("completion_tokens") or 0
    if tokens > 1 and last > first > 0:
        answer.timings.tokens_per_s = (tokens - 1) / (last - first)


def _fold(choice: dict[str, Any], answer: Answer) -> list[tuple[str, str]]:
    """Adds a choice of one event to the answer and returns its pieces."""
    delta = choice.get("delta") or {}
    reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
    text = delta.get("content") or choice.get("text") or ""
    answer.reasoning += reasoning
    answer.text += text
    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    for call in delta.get("tool_calls") or ():
        _fold_call(call, answer.tool_calls)
    answer.logprobs += _logprobs(choice.get("logprobs") or {})
    if choice.get("token_ids"):
        answer.token_ids = (answer.token_ids or []) + choice["token_ids"]
    return [(kind, piece) for kind, piece in (("reasoning", reasoning), ("text", text)) if piece]


def _fold_call(part: dict[str, Any], calls: list[dict[str, Any]]) -> None:
    while len(calls) <= part.get("index", 0):
        calls.append({"name": "", "arguments": ""})
    function = part.get("function") or {}
    for key in ("name", "arguments"):
        calls[part.get("index", 0)][key] += function.get(key) or ""


def _logprobs(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns one entry a token from chat's form or from that of completions."""
    if "tokens" in found:
        columns = (found["tokens"], found["token_logprobs"], found.get("top_logprobs") or [])
        tops = [*columns[2], *([None] * len(columns[0]))]
        rows = zip(columns[0], columns[1], tops, strict=False)
        return [{"token": token, "logprob": value, "top": top or {}} for token, value, top in rows]
    return [
        {
            "token": entry["token"],
            "logprob": entry["logprob"],
            "top": {top["token"]: top["logprob"] for top in entry.get("top_logprobs") or ()},
        }
        for entry in found.get("content") or ()
    ]
