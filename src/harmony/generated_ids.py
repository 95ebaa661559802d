"""Remembers the token ids of generated messages, for history that clients send back as text.

Several sequences of ids decode to one text, so a message is looked up by the messages before it, except analysis, which
later turns omit. Analysis is also looked up by its index among the analysis since then. If that finds nothing, as after
a change of the system message, the last message with the same content is used.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import replace
from threading import Lock

import msgspec

from gptoss.harmony.ids_cache import ids_cache
from gptoss.harmony.render import HarmonyMessage, render_message, split_generated
from gptoss.harmony.vocabulary_files import Vocabulary

_CANONICAL: array[int] = array("I")  # the generated ids were equal to the rendered ones


class _Context:
    """A hash of the messages so far, which determines the keys of the next message."""

    def __init__(self, scope: str, saved: bytes = b"") -> None:
        self._scope = scope.encode()
        self._before, num_analysis = saved[:-4], saved[-4:]
        self._num_analysis = int.from_bytes(num_analysis)

    def keys(self, message: HarmonyMessage) -> tuple[bytes, bytes]:
        """The message's key by the messages before it and its key by content only. Appends the message."""
        data = msgspec.msgpack.encode(_normal(message))
        if message.header == "assistant" and message.channel == "analysis":
            placed = self._digest(b"%b %d %b" % (self._before, self._num_analysis, data))
            self._num_analysis += 1
        else:
            placed = self._before = self._digest(self._before + data)
            self._num_analysis = 0
        return placed, self._digest(data)

    def _digest(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=16, key=self._scope).digest()

    def save(self) -> bytes:
        return self._before + self._num_analysis.to_bytes(4)


class GeneratedIds:
    """The cache of generated ids. Thread-safe."""

    def __init__(self, vocabulary: Vocabulary, max_bytes: int, ttl_s: float) -> None:
        self._vocabulary = vocabulary
        self._cache = ids_cache(max_bytes, ttl_s)
        self._lock = Lock()

    def find(self, messages: Sequence[HarmonyMessage], scope: str) -> tuple[list[array[int] | None], bytes]:
        """The ids of each message, None if they equal the rendered ones, and the context after them.

        `add` takes that context.
        """
        context = _Context(scope)
        found: list[array[int] | None] = []
        for message in messages:
            placed, alone = context.keys(message)
            ids = None
            if message.header == "assistant":
                with self._lock:
                    ids = self._cache.get(placed)
                    ids = self._cache.get(alone) if ids is None else ids
            found.append(ids or None)
        return found, context.save()

    def add(self, token_ids: Sequence[int], context: bytes, scope: str) -> None:
        """Stores the ids that the model generated after `<|start|>assistant`."""
        after = _Context(scope, context)
        for message, ids in split_generated(token_ids, self._vocabulary):
            rewritten = message.recipient is not None and message.content_type == "json"  # by clients that parse it
            canonical = not rewritten and ids == render_message(message, self._vocabulary)
            kept = _CANONICAL if canonical else array("I", ids)
            with self._lock:
                for key in after.keys(message):
                    self._cache.put(key, kept)


def _normal(message: HarmonyMessage) -> HarmonyMessage:
    """The message in the form in which clients send it back; they do not see everything the model wrote."""
    if message.recipient is None and message.content_type is not None:
        return replace(message, content_type=None)
    if message.recipient is None or message.content_type is None:  # a text, or the text of a custom tool
        return message
    if not message.text.strip():
        return replace(message, text=message.text + "{}")
    return replace(message, text=_rewritten(message.text)) if message.content_type == "json" else message


def _rewritten(text: str) -> str:
    """A normal form of JSON: blanks, escapes, number formats and order do not count."""
    try:
        return json.dumps(json.loads(text, parse_float=_number, parse_int=_number), sort_keys=True)
    except (ValueError, RecursionError):
        return text


def _number(text: str) -> int | float:
    """The number as JavaScript parses it."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
