"""One thing that the embedded model is taught: a conversation and the turn that should follow it.

Everything is drawn from a seeded generator, so the same seed gives the same lessons. Words, names and sums are split
in two by a hash: training never sees the held-out part.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import Any

from src.harmony.render import (
    HarmonyMessage,
    ReasoningEffort,
    assistant_text,
    render_message,
    tool_call,
)
from src.harmony.vocabulary import END, RETURN, START, Vocabulary

EFFORTS: tuple[ReasoningEffort, ...] = ("low", "medium", "high")
HELD_OUT_SHARE = 10  # one in this many


@dataclass(frozen=True, slots=True)
class Letters:
    """Text that is written letter by letter: one token a character, as a word turned round has to be."""

    text: str


Piece = str | Letters


@dataclass(slots=True)
class Example:
    skill: str
    messages: list[dict[str, Any]]
    effort: ReasoningEffort
    analysis: list[Piece]
    answer: list[Piece] = field(default_factory=list)
    call: tuple[str, dict[str, Any]] | None = None  # instead of an answer
    tools: list[dict[str, Any]] = field(default_factory=list)  # function definitions
    response_format: Mapping[str, Any] | None = None  # {name, schema}
    expected: list[str] = field(default_factory=list)  # substrings a right answer holds

    @property
    def answer_text(self) -> str:
        return "".join(p.text if isinstance(p, Letters) else p for p in self.answer)


def completion_ids(example: Example, vocabulary: Vocabulary) -> list[int]:
    """What the model should write after `<|start|>assistant`."""
    start = [START, *vocabulary.encode("assistant")]
    ids = _message_ids(assistant_text("analysis", ""), example.analysis, vocabulary)
    if example.call is not None:
        name, arguments = example.call
        ids += render_message(tool_call(name, json.dumps(arguments)), vocabulary)
    else:
        ids += _message_ids(assistant_text("final", ""), example.answer, vocabulary)
        ids[-1] = RETURN
    return ids[len(start) :]


def _message_ids(
    header: HarmonyMessage, pieces: Sequence[Piece], vocabulary: Vocabulary
) -> list[int]:
    ids = render_message(header, vocabulary)[:-1]
    for piece in pieces:
        if isinstance(piece, Letters):
            ids += [token for char in piece.text for token in vocabulary.encode(char)]
        else:
            ids += vocabulary.encode(piece)
    return [*ids, END]


def held_out(key: str) -> bool:
    """Whether training must not see this word, name or sum."""
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


class Source:
    """Random choices of one half: what training sees, or what was held out from it."""

    def __init__(self, vocabulary: Vocabulary, rng: Random, *, unseen: bool) -> None:
        self.vocabulary = vocabulary
        self.rng = rng
        self.unseen = unseen

    def mine(self, key: str) -> bool:
        return held_out(key) == self.unseen

    @cached_property
    def _short_words(self) -> list[str]:
        return [w for w in _words(self.vocabulary, 30_000, str.islower, 3, 6) if self.mine(w)]

    @cached_property
    def _words(self) -> list[str]:
        return [w for w in _words(self.vocabulary, 60_000, str.islower, 3, 10) if self.mine(w)]

    @cached_property
    def _names(self) -> list[str]:
        names = _words(self.vocabulary, 90_000, lambda w: w[0].isupper() and w[1:].islower(), 3, 9)
        return [w for w in names if self.mine(w)]

    def effort(self) -> ReasoningEffort:
        return self.rng.choices(EFFORTS, (3, 5, 2))[0]

    def pick(self, *options: str) -> str:
        return self.rng.choice(options)

    def word(self) -> str:
        return self.rng.choice(self._words)

    def short_word(self) -> str:
        """Mostly one token; sometimes two glued together."""
        if self.rng.random() < 0.12:
            return (self.rng.choice(self._short_words) + self.rng.choice(self._short_words))[:8]
        return self.rng.choice(self._short_words)

    def name(self) -> str:
        """Capitalised: a person or a place, sometimes of two tokens, sometimes two words."""
        kind = self.rng.random()
        if kind < 0.12:
            return self.rng.choice(self._names) + self.rng.choice(self._short_words)[:4]
        if kind < 0.2:
            return f"{self.rng.choice(self._names)} {self.rng.choice(self._names)}"
        return self.rng.choice(self._names)

    def number(self, low: int = 0, high: int = 99) -> int:
        return self.rng.randint(low, high)

    def phrase(self, low: int = 1, high: int = 4) -> str:
        return " ".join(self.word() for _ in range(self.rng.randint(low, high)))

    def maybe(self, probability: float) -> bool:
        return self.rng.random() < probability


def _words(
    vocabulary: Vocabulary, below: int, wanted: Callable[[str], bool], shortest: int, longest: int
) -> list[str]:
    """Whole words of the vocabulary: ASCII tokens with a space before them."""
    found = []
    for token in vocabulary.token_bytes[:below]:
        text = token[1:].decode("latin-1")
        if (
            token[:1] == b" "
            and text.isascii()
            and text.isalpha()
            and shortest <= len(text) <= longest
            and wanted(text)
        ):
            found.append(text)
    return found
