"""What the server returns beyond OpenAI's types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from openai.types.chat import ChatCompletion, ChatCompletionMessage
from pydantic import BaseModel, ConfigDict


class _Report(BaseModel):
    """Fields of newer servers are kept, and those that are missing are None."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class ServedModel(_Report):
    """What has answered a request: the `metadata` of a chat completion."""

    model_id: str
    model_size: str
    dtype: str
    gpu_mode: str
    prompt_version: str
    profile: str


class Health(ServedModel):
    """GET /health."""

    status: Literal["ok", "degraded", "unhealthy"]
    reasons: list[str]
    version: str
    engine: str
    active_requests: int
    waiting_requests: int
    kv_usage: float
    uptime_s: float


class Percentiles(_Report):
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


class Latency(_Report):
    """Of the last five minutes."""

    requests: int
    ttft_s: Percentiles
    e2e_s: Percentiles
    inter_token_s: Percentiles
    output_tokens_per_s: float


class RequestCounts(_Report):
    total: int
    ok: int
    failed: int
    cancelled: int
    rejected: int
    active: int
    waiting: int


class TokenCounts(_Report):
    prompt: int
    output: int
    cached: int


class Stats(ServedModel):
    """GET /stats; what has no field here is in `model_extra`."""

    version: str
    uptime_s: float
    requests: RequestCounts
    running: list[str]
    tokens: TokenCounts
    latency: Latency


class Rendered(_Report):
    """POST /v1/chat/completions/render: the prompt that a chat request becomes."""

    prompt: str
    prompt_token_ids: list[int]
    num_tokens: int
    prompt_version: str
    grammar: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A chat completion with one choice."""

    completion: ChatCompletion

    @property
    def message(self) -> ChatCompletionMessage:
        return self.completion.choices[0].message

    @property
    def text(self) -> str:
        return self.message.content or ""

    @property
    def reasoning(self) -> str:
        extra = self.message.model_extra or {}
        return extra.get("reasoning") or extra.get("reasoning_content") or ""

    @property
    def finish_reason(self) -> str:
        return self.completion.choices[0].finish_reason

    @property
    def served_model(self) -> ServedModel:
        return served_model(self.completion)

    @property
    def as_history(self) -> Any:
        """The message as the next request sends it back, reasoning included."""
        return self.message.model_dump(exclude_none=True)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made, and its result."""

    name: str
    arguments: str  # JSON, as the model wrote it
    result: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class ToolRun:
    """An answer, and the calls on the way to it."""

    reply: Reply
    messages: Sequence[Any]  # the whole conversation, the answer included
    calls: Sequence[ToolCall] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.reply.text


def served_model(completion: ChatCompletion) -> ServedModel:
    """Returns what has answered. Raises ValueError if the completion is not from this server."""
    metadata = getattr(completion, "metadata", None)  # a field of its own in some versions of openai's types
    if not isinstance(metadata, dict):
        raise ValueError("the completion has no metadata: another server has answered")
    return ServedModel.model_validate(metadata)
