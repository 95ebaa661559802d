"""Conversations to the token ids of a Harmony prompt: deterministic, and cached by message prefix.

The same input gives the same ids, on any machine, at any time: no clock and no environment is read, and tools and
schema keys keep the order of the request. The text that the model sees is never normalised or shortened.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

import msgspec

from gptoss.harmony.bpe import UNLIMITED, Limits
from gptoss.harmony.conversation import (
    Conversation,
    DeveloperMessage,
    Message,
    ResponseSchema,
    ToolDefinition,
    ToolNamespace,
)
from gptoss.harmony.generated_ids import GeneratedIds
from gptoss.harmony.history import render_history
from gptoss.harmony.ids_cache import ids_cache
from gptoss.harmony.render import (
    HarmonyMessage,
    ReasoningEffort,
    developer_message,
    generation_prefix,
    render_message,
    system_message,
)
from gptoss.harmony.vocabulary_files import Vocabulary

PROMPT_VERSION = "harmony-v1"


@dataclass(frozen=True, slots=True)
class PromptTokens:
    token_ids: list[int]
    version: str
    cache_hit: bool  # a prefix beyond the system and developer messages was found
    num_reused_messages: int
    num_messages: int
    context: bytes = b""  # a hash of its messages, for PromptBuilder.remember


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
        """Makes a builder with an empty cache.

        `replay_generated_ids`: assistant history that this server generated is rendered with the generated ids, which
        may not be the canonical ones. The prompt then depends on earlier answers.
        """
        self._vocabulary = vocabulary
        self._current_date = current_date
        self._cache = ids_cache(cache_bytes, cache_ttl_s)
        self._generated = GeneratedIds(vocabulary, cache_bytes // 4, cache_ttl_s) if replay_generated_ids else None
        self._lock = Lock()
        self._builds = self._hits = 0
        self._generation_prefix = array("I", generation_prefix(vocabulary))
        self.version = PROMPT_VERSION

    @property
    def stats(self) -> PromptCacheStats:
        with self._lock:
            self._cache.expire()
            return PromptCacheStats(
                self._builds,
                self._hits,
                self._builds - self._hits,
                self._cache.evictions,
                len(self._cache),
                self._cache.weight,
            )

    def build(
        self,
        conversation: Conversation,
        *,
        tools: Sequence[ToolDefinition] = (),
        builtins: Sequence[ToolNamespace] = (),
        schema: ResponseSchema | None = None,
        effort: ReasoningEffort = "medium",
        scope: str = "",
        limits: Limits = UNLIMITED,
    ) -> PromptTokens:
        """The prompt's ids, ending where the assistant begins.

        `builtins`: of the system message. `schema`: of the final message. `scope`: only prompts of the same scope share
        cached prefixes and replayed ids.

        Raises:
            PromptError: a message cannot be rendered; nothing was cached.
            TooManyTokensError, EncodingStoppedError: see `limits`; the whole prompt was not cached.
        """
        rendered = list(self._rendered(conversation, tools, schema, effort, builtins))
        known: list[array[int] | None] = [None] * len(rendered)
        context = b""
        if self._generated is not None:
            known, context = self._generated.find(rendered, scope)
        keys = _chain(rendered, known, scope)
        head = _head_length(rendered)
        reused, ids = self._longest_prefix(keys)
        for index in range(reused, len(rendered)):
            left = limits.less(len(ids))
            ids.extend(known[index] or render_message(rendered[index], self._vocabulary, left))
            if index + 1 == head and head < len(rendered):
                with self._lock:
                    self._cache.put(keys[index], array("I", ids))
        hit = reused > head or reused == len(rendered)
        with self._lock:
            self._builds += 1
            self._hits += hit
            self._cache.put(keys[-1], array("I", ids))
        return PromptTokens((ids + self._generation_prefix).tolist(), self.version, hit, reused, len(rendered), context)

    def _longest_prefix(self, keys: Sequence[bytes]) -> tuple[int, array[int]]:
        """How many leading messages are cached together, and a copy of their ids; `keys`: of each prefix."""
        with self._lock:
            for count in range(len(keys), 0, -1):
                cached = self._cache.get(keys[count - 1])
                if cached is not None:
                    return count, array("I", cached)
        return 0, array("I")

    def measure(
        self, conversation: Conversation, lengths: dict[HarmonyMessage, int], limits: Limits = UNLIMITED
    ) -> int:
        """The number of tokens of the messages without tools and schema.

        `lengths` caches the number of each message.

        Raises:
            PromptError: a message cannot be rendered.
            TooManyTokensError, EncodingStoppedError: see `limits`, which are those of each message.
        """
        total = 0
        for message in self._rendered(conversation, (), None, "medium"):
            if message not in lengths:
                lengths[message] = len(render_message(message, self._vocabulary, limits))
            total += lengths[message]
        return total

    def remember(self, token_ids: Sequence[int], scope: str = "", after: PromptTokens | None = None) -> None:
        """Keeps the ids generated after a prompt of this scope, to render them when they come back.

        The client sends them back as history.
        """
        if self._generated is not None:
            self._generated.add(token_ids, b"" if after is None else after.context, scope)

    def _rendered(
        self,
        conversation: Conversation,
        tools: Sequence[ToolDefinition],
        schema: ResponseSchema | None,
        effort: ReasoningEffort,
        builtins: Sequence[ToolNamespace] = (),
    ) -> Iterator[HarmonyMessage]:
        """The prompt's messages.

        Instructions at the beginning share one developer message with tools and schema.
        """
        date = self._current_date
        yield system_message(effort, has_tools=bool(tools), current_date=date, builtins=builtins)
        messages = conversation.messages
        instructions = _opening_instructions(messages)
        developer = developer_message("\n\n".join(filter(None, instructions)), tools, schema)
        if developer is not None:
            yield developer
        yield from render_history(messages[len(instructions) :])


def _opening_instructions(messages: Sequence[Message]) -> list[str]:
    """The texts of the developer messages at the beginning."""
    texts: list[str] = []
    for message in messages:
        if not isinstance(message, DeveloperMessage):
            break
        texts.append(message.text)
    return texts


def _head_length(rendered: Sequence[HarmonyMessage]) -> int:
    """The number of messages that conversations with the same settings share.

    These are the system message and the first developer message.
    """
    return 2 if len(rendered) > 1 and rendered[1].header == "developer" else 1


def _chain(rendered: Sequence[HarmonyMessage], known: Sequence[array[int] | None], scope: str) -> list[bytes]:
    """A key for each prefix. The `known` ids of a message are part of its key."""
    keys, parent = [], scope.encode()
    encoder = msgspec.msgpack.Encoder()
    for message, ids in zip(rendered, known, strict=True):
        data = encoder.encode(message) + (ids.tobytes() if ids is not None else b"")
        parent = hashlib.blake2b(data, digest_size=16, key=parent).digest()
        keys.append(parent)
    return keys
