"""Chat messages to the token ids of a Harmony prompt: deterministic, and cached by message prefix.

The same input gives the same ids, on any machine, at any time: no clock, no environment, no dict order plays a part
(tools and schema keys keep the order they came in). The text that the model sees is never normalised or shortened.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import msgspec

from src.harmony.render import (
    HarmonyMessage,
    ReasoningEffort,
    assistant_text,
    developer_message,
    generation_prefix,
    render_message,
    split_generated,
    system_message,
    tool_call,
    tool_result,
)  # fmt: skip
from src.harmony.vocabulary import Vocabulary

PROMPT_VERSION = "harmony-v1"
_ENTRY_OVERHEAD_BYTES = 200

Message = Mapping[str, Any]


class PromptError(ValueError):
    """Messages that cannot be rendered. `param` names the field, as in `messages[2].tool_call_id`."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class PromptTokens:
    token_ids: list[int]
    version: str
    cache_hit: bool  # a prefix beyond the system and developer messages was found
    num_reused_messages: int
    num_messages: int


@dataclass(slots=True)
class PromptCacheStats:
    builds: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    entries: int = 0
    size_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.builds if self.builds else 0.0


@dataclass(slots=True)
class _Entry:
    ids: array[int]
    expires: float  # monotonic seconds

    @property
    def size_bytes(self) -> int:
        return self.ids.itemsize * len(self.ids) + _ENTRY_OVERHEAD_BYTES


class _PrefixCache:
    """Rendered ids of message prefixes, bounded by bytes and by age."""

    def __init__(self, max_bytes: int, ttl_s: float) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self.size_bytes = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> array[int] | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        now = time.monotonic()
        if entry.expires <= now:
            self._drop(key)
            return None
        entry.expires = now + self._ttl_s
        self._entries.move_to_end(key)
        return entry.ids

    def put(self, key: bytes, ids: array[int]) -> None:
        if key in self._entries:
            return
        entry = _Entry(ids, time.monotonic() + self._ttl_s)
        if entry.size_bytes > self._max_bytes:
            return
        self._entries[key] = entry
        self.size_bytes += entry.size_bytes
        while self.size_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))
        self.expire()

    def expire(self) -> None:
        """Drops what has outlived its time; entries are in order of last use, so of expiry."""
        now = time.monotonic()
        while self._entries and next(iter(self._entries.values())).expires <= now:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: bytes) -> None:
        self.size_bytes -= self._entries.pop(key).size_bytes
        self.evictions += 1


class PromptBuilder:
    """Thread-safe: long prompts are built off the event loop."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        current_date: str | None = None,
        cache_bytes: int = 64 * 2**20,
        cache_ttl_s: float = 3600.0,
        replay_generated_ids: bool = False,
    ) -> None:
        """`replay_generated_ids`: assistant history that this server generated is written with the ids that it
        generated, which may not be the canonical ones. The prompt then depends on what was generated before."""
        self._vocabulary = vocabulary
        self._current_date = current_date
        self._cache = _PrefixCache(cache_bytes, cache_ttl_s)
        self._generated = (
            _PrefixCache(cache_bytes // 4, cache_ttl_s) if replay_generated_ids else None
        )
        self._lock = Lock()
        self._builds = self._hits = 0
        self._generation_prefix = array("I", generation_prefix(vocabulary))
        self.version = PROMPT_VERSION

    @property
    def stats(self) -> PromptCacheStats:
        with self._lock:
            self._cache.expire()
            return PromptCacheStats(
                self._builds, self._hits, self._builds - self._hits, self._cache.evictions, len(self._cache),
                self._cache.size_bytes,
            )  # fmt: skip

    def build(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        response_format: Mapping[str, Any] | None = None,
        effort: ReasoningEffort = "medium",
    ) -> PromptTokens:
        """OpenAI chat messages and function definitions -> prompt ids, ending where the assistant begins.

        Raises:
            PromptError: a message cannot be rendered; nothing was cached.
        """
        rendered = list(self._conversation(messages, tools, response_format, effort))
        keys = _chain(rendered)
        head = _head_length(rendered)
        with self._lock:
            reused, ids = 0, array("I")
            for count in range(len(rendered), 0, -1):
                cached = self._cache.get(keys[count - 1])
                if cached is not None:
                    reused, ids = count, array("I", cached)
                    break
        for index in range(reused, len(rendered)):
            ids.extend(self._render(rendered[index]))
            if index + 1 == head and head < len(rendered):
                with self._lock:
                    self._cache.put(keys[index], array("I", ids))
        hit = reused > head or reused == len(rendered)
        with self._lock:
            self._builds += 1
            self._hits += hit
            self._cache.put(keys[-1], array("I", ids))
        return PromptTokens(
            (ids + self._generation_prefix).tolist(), self.version, hit, reused, len(rendered)
        )

    def remember(self, token_ids: Sequence[int]) -> None:
        """Keeps what the model generated after a prompt, for when the client sends it back as history."""
        if self._generated is None:
            return
        for message, ids in split_generated(token_ids, self._vocabulary):
            if ids != render_message(message, self._vocabulary):
                with self._lock:
                    self._generated.put(_key(message), array("I", ids))

    def _render(self, message: HarmonyMessage) -> Sequence[int]:
        if self._generated is not None and message.header == "assistant":
            with self._lock:
                known = self._generated.get(_key(message))
            if known is not None:
                return known
        return render_message(message, self._vocabulary)

    def _conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        response_format: Mapping[str, Any] | None,
        effort: ReasoningEffort,
    ) -> Iterator[HarmonyMessage]:
        yield system_message(effort, has_tools=bool(tools), current_date=self._current_date)
        first = 0
        instructions = []
        while first < len(messages) and messages[first]["role"] in ("system", "developer"):
            instructions.append(_text(messages[first]))
            first += 1
        developer = developer_message(
            "\n\n".join(filter(None, instructions)), tools, response_format
        )
        if developer is not None:
            yield developer
        last_final = max((i for i, m in enumerate(messages) if _is_final(m)), default=-1)
        names: dict[str, str] = {}
        for index in range(first, len(messages)):
            yield from _render_turn(
                messages[index], index, names, keep_reasoning=index > last_final
            )


def _render_turn(
    message: Message, index: int, names: dict[str, str], *, keep_reasoning: bool
) -> Iterator[HarmonyMessage]:
    role, text = message["role"], _text(message)
    if role == "user":
        yield HarmonyMessage("user", text)
    elif role in ("system", "developer"):
        later = developer_message(text)
        if later is not None:
            yield later
    elif role == "tool":
        call_id = message.get("tool_call_id")
        if call_id not in names:
            raise PromptError(
                f"no earlier assistant message made a tool call with id {call_id!r}",
                f"messages[{index}].tool_call_id",
            )
        yield tool_result(names[call_id], text)
    elif role == "function":
        if message.get("name") not in names.values():
            raise PromptError(
                f"no earlier assistant message called {message.get('name')!r}",
                f"messages[{index}].name",
            )
        yield tool_result(message["name"], text)
    elif role == "assistant":
        yield from _render_assistant(message, text, names, keep_reasoning=keep_reasoning)
    else:
        raise PromptError(f"unknown role {role!r}", f"messages[{index}].role")


def _render_assistant(
    message: Message, text: str, names: dict[str, str], *, keep_reasoning: bool
) -> Iterator[HarmonyMessage]:
    """Reasoning, then preamble, then calls; or reasoning, then the final answer."""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if reasoning and keep_reasoning:
        yield assistant_text("analysis", str(reasoning))
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    for call, function in zip(message.get("tool_calls") or (), calls, strict=True):
        names[call["id"]] = clean_name(function["name"])
    legacy = message.get("function_call")
    if legacy:
        calls.append(legacy)
        names.setdefault(f"legacy:{legacy['name']}", clean_name(legacy["name"]))
    if text:
        yield assistant_text("commentary" if calls else "final", text)
    for function in calls:
        yield tool_call(clean_name(function["name"]), function.get("arguments") or "")


def clean_name(name: str) -> str:
    """Clients replay names that a broken server leaked markers into: `f<|channel|>analysis` is `f`."""
    return name.split("<|", 1)[0].strip().removeprefix("functions.")


def _is_final(message: Message) -> bool:
    return (
        message["role"] == "assistant"
        and not message.get("tool_calls")
        and not message.get("function_call")
        and bool(_text(message))
    )


def _text(message: Message) -> str:
    """A string, or the parts of an array joined in order."""
    content = message.get("content")
    if content is None:
        return str(message.get("refusal") or "") if message["role"] == "assistant" else ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text") or part.get("refusal") or "") for part in content)


def _head_length(rendered: Sequence[HarmonyMessage]) -> int:
    """Messages that every conversation with the same settings shares: system and the first developer message."""
    return 2 if len(rendered) > 1 and rendered[1].header == "developer" else 1


def _key(message: HarmonyMessage) -> bytes:
    return hashlib.blake2b(msgspec.msgpack.encode(message), digest_size=16).digest()


def _chain(rendered: Sequence[HarmonyMessage]) -> list[bytes]:
    """A key for each prefix."""
    keys, parent = [], b""
    encoder = msgspec.msgpack.Encoder()
    for message in rendered:
        parent = hashlib.blake2b(encoder.encode(message), digest_size=16, key=parent).digest()
        keys.append(parent)
    return keys
