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

from src.harmony.history import Message, message_text, render_history
from src.harmony.history import PromptError as PromptError
from src.harmony.render import (
    HarmonyMessage,
    ReasoningEffort,
    developer_message,
    generation_prefix,
    render_message,
    split_generated,
    system_message,
)
from src.harmony.vocabulary import Vocabulary

PROMPT_VERSION = "harmony-v1"
_ENTRY_OVERHEAD_BYTES = 200


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
        scope: str = "",
    ) -> PromptTokens:
        """OpenAI chat messages and function definitions -> prompt ids, ending where the assistant begins.

        `scope`: what is cached and replayed comes from prompts of the same scope alone.

        Raises:
            PromptError: a message cannot be rendered; nothing was cached.
        """
        rendered = list(self._conversation(messages, tools, response_format, effort))
        keys = _chain(rendered, scope)
        head = _head_length(rendered)
        with self._lock:
            reused, ids = 0, array("I")
            for count in range(len(rendered), 0, -1):
                cached = self._cache.get(keys[count - 1])
                if cached is not None:
                    reused, ids = count, array("I", cached)
                    break
        for index in range(reused, len(rendered)):
            ids.extend(self._render(rendered[index], scope))
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

    def remember(self, token_ids: Sequence[int], scope: str = "") -> None:
        """Keeps what the model generated after a prompt of this scope, for when the client sends it back as history."""
        if self._generated is None:
            return
        for message, ids in split_generated(token_ids, self._vocabulary):
            if ids != render_message(message, self._vocabulary):
                with self._lock:
                    self._generated.put(_key(message, scope), array("I", ids))

    def _render(self, message: HarmonyMessage, scope: str) -> Sequence[int]:
        if self._generated is not None and message.header == "assistant":
            with self._lock:
                known = self._generated.get(_key(message, scope))
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
            instructions.append(message_text(messages[first]))
            first += 1
        developer = developer_message(
            "\n\n".join(filter(None, instructions)), tools, response_format
        )
        if developer is not None:
            yield developer
        yield from render_history(messages, first)


def _head_length(rendered: Sequence[HarmonyMessage]) -> int:
    """Messages that every conversation with the same settings shares: system and the first developer message."""
    return 2 if len(rendered) > 1 and rendered[1].header == "developer" else 1


def _key(message: HarmonyMessage, scope: str) -> bytes:
    encoded = msgspec.msgpack.encode(message)
    return hashlib.blake2b(encoded, digest_size=16, key=scope.encode()).digest()


def _chain(rendered: Sequence[HarmonyMessage], scope: str) -> list[bytes]:
    """A key for each prefix."""
    keys, parent = [], scope.encode()
    encoder = msgspec.msgpack.Encoder()
    for message in rendered:
        parent = hashlib.blake2b(encoder.encode(message), digest_size=16, key=parent).digest()
        keys.append(parent)
    return keys
