"""One thing that the embedded model is taught: a conversation and the turn that should follow it.

Everything is drawn from a seeded generator, so the same seed gives the same lessons. Words, names and sums are split
in two by a hash: training never sees the held-out part.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import Any

from gptoss.api.chat.messages import read_messages
from gptoss.api.chat.schema import Message
from gptoss.api.http.tool_choice import FunctionDefinition
from gptoss.harmony.conversation import ResponseSchema, ToolDefinition
from gptoss.harmony.render import HarmonyMessage, ReasoningEffort, assistant_text, render_message, tool_call
from gptoss.harmony.special_tokens import CHANNEL, CONSTRAIN, RETURN, START
from gptoss.harmony.vocabulary_files import Vocabulary
from gptoss.prompt_builder import PromptBuilder, PromptTokens

EFFORTS: tuple[ReasoningEffort, ...] = ("low", "medium", "high")
HELD_OUT_SHARE = 10  # one in this many
RARE_FROM = 5  # letters
NATURAL_PRACTICE = 0.3  # of what is hard is left in natural lessons
UNUSUAL = 0.15  # of the words in natural lessons are ones that have to be spelled
LONGEST = 14  # letters of these
COMMON_BELOW = 20_000  # ranks: a vocabulary's first tokens are those that text has most
_WORD = re.compile("[A-Za-z][A-Za-z_]*[A-Za-z]")


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


def prompt_of(example: Example, builder: PromptBuilder) -> PromptTokens:
    """The prompt that a server would build from the example's messages and tools."""
    messages = [Message.model_validate(message) for message in example.messages]
    functions = [FunctionDefinition.model_validate(tool) for tool in example.tools]
    wanted = example.response_format
    return builder.build(
        read_messages(messages),
        tools=[ToolDefinition(one.name, one.description, one.parameters) for one in functions],
        schema=ResponseSchema(**wanted) if wanted is not None else None,
        effort=example.effort,
    )


def completion_ids(example: Example, vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> list[int]:
    """What the model should write after `<|start|>assistant`, in tokens that can be copied from the prompt."""
    copier = Copier(vocabulary, prompt_ids)
    start = [START, *vocabulary.encode("assistant")]
    ids = _message_ids(assistant_text("analysis", ""), example.analysis, copier)
    if example.call is not None:
        ids += _call_ids(*example.call, copier)
    else:
        ids += _message_ids(assistant_text("final", ""), example.answer, copier)
        ids[-1] = RETURN
    return ids[len(start) :]


def _call_ids(name: str, arguments: dict[str, Any], copier: Copier) -> list[int]:
    """The name behind "functions." is in tokens of the prompt too: as one text ".get" would be a token."""
    message = tool_call(name, "")
    ids = _message_ids(message, [json.dumps(arguments)], copier)
    recipient = copier.vocabulary.encode(f"{message.channel} to=functions.")
    recipient += [*copier.encode(name), *copier.vocabulary.encode(" ")]
    return [*ids[: ids.index(CHANNEL) + 1], *recipient, *ids[ids.index(CONSTRAIN) :]]


def _message_ids(header: HarmonyMessage, pieces: Sequence[Piece], copier: Copier) -> list[int]:
    *ids, end = render_message(header, copier.vocabulary)
    for piece in pieces:
        ids += copier.spell(piece.text) if isinstance(piece, Letters) else copier.encode(piece)
    return [*ids, end]


class Copier:
    """Encodes text so that its words are the prompt's tokens where that can be.

    " widget" is one token and "widget" is two others, so a word that stands behind a space in the prompt and behind a
    quote in the answer cannot be copied token by token from one canonical form to the other. Here it is written as the
    prompt's tokens with the space taken off (or put on) the first; if there is no such token, letter by letter.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> None:
        self.vocabulary = vocabulary
        self._prompt = f" {' '.join(map(str, prompt_ids))} "

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        done = 0
        for match in _WORD.finditer(text):
            word = match.group()
            spaced = match.start() > 0 and text[match.start() - 1] == " "
            copied = self._copied(word, spaced=spaced)
            if copied is None:
                continue
            before = match.start() - (1 if spaced else 0)
            ids += self.vocabulary.encode(text[done:before]) + copied
            done = match.end()
        return ids + self.vocabulary.encode(text[done:])

    def spell(self, text: str) -> list[int]:
        return [token for char in text for token in self.vocabulary.encode(char)]

    def _copied(self, word: str, *, spaced: bool) -> list[int] | None:
        """None: the canonical form can be copied, or nothing can."""
        encode = self.vocabulary.encode
        with_space, without = encode(f" {word}"), encode(word)
        if self._in_prompt(with_space if spaced else without):
            return None
        if not spaced and self._in_prompt(with_space):
            first = self.vocabulary.bytes_of(with_space[0])[1:]
            token = self._token(first)
            return ([token] if token is not None else self.spell(first.decode())) + with_space[1:]
        if spaced and self._in_prompt(without):
            token = self._token(b" " + self.vocabulary.bytes_of(without[0]))
            return [token, *without[1:]] if token is not None else [*encode(" "), *without]
        return None

    def _in_prompt(self, ids: Sequence[int]) -> bool:
        return f" {' '.join(map(str, ids))} " in self._prompt

    def _token(self, text: bytes) -> int | None:
        return self.vocabulary.rank_of.get(text)


def held_out(key: str) -> bool:
    """Whether training must not see this word, name or sum."""
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


class Source:
    """Random choices of one half: what training sees, or what was held out from it."""

    def __init__(self, vocabulary: Vocabulary, rng: Random, *, unseen: bool) -> None:
        self.vocabulary = vocabulary
        self.rng = rng
        self.unseen = unseen
        self.natural = False  # a lesson with values as most people give them (natural.py)
        self.plain = False  # a lesson whose tools are asked for with the words of their names

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
        names = _words(self.vocabulary, 90_000, _is_name, 3, 9)
        return [w for w in names if self.mine(w)]

    @cached_property
    def _common_words(self) -> list[str]:
        return self._common(self._words)

    @cached_property
    def _common_names(self) -> list[str]:
        return self._common(self._names)

    @cached_property
    def _rare_words(self) -> dict[int, list[str]]:
        return self._spelled(self._words)

    @cached_property
    def _rare_names(self) -> dict[int, list[str]]:
        return self._spelled(self._names)

    @cached_property
    def _unusual_words(self) -> dict[int, list[str]]:
        found = _words(self.vocabulary, 60_000, str.islower, RARE_FROM, LONGEST)
        return self._spelled([w for w in found if self.mine(w)])

    @cached_property
    def _unusual_names(self) -> dict[int, list[str]]:
        found = _words(self.vocabulary, 90_000, _is_name, RARE_FROM, LONGEST)
        return self._spelled([w for w in found if self.mine(w)])

    def _spelled(self, words: list[str]) -> dict[int, list[str]]:
        """By length: those of five letters or more that are no token without their space, so have to be spelled."""
        by_length: dict[int, list[str]] = {}
        for word in words:
            if len(word) >= RARE_FROM and word.encode() not in self.vocabulary.rank_of:
                by_length.setdefault(len(word), []).append(word)
        return by_length

    def _common(self, words: list[str]) -> list[str]:
        """Those that are among the first tokens, and are tokens without their space too."""
        rank_of = self.vocabulary.rank_of
        return [w for w in words if rank_of[f" {w}".encode()] < COMMON_BELOW and w.encode() in rank_of]

    def effort(self) -> ReasoningEffort:
        return self.rng.choices(EFFORTS, (3, 5, 2))[0]

    def pick(self, *options: str) -> str:
        return self.rng.choice(options)

    def word(self) -> str:
        """Every other one is a common word."""
        if self.natural:
            return self.usual_or_not(self.rng.choice(self._common_words))
        if self.practice(0.1):
            return self._coined(self._words)
        if self.practice(0.3):
            return self._long(self._rare_words)
        common = self.maybe(0.5) and not self.practice(0.4)
        return self.rng.choice(self._common_words if common else self._words)

    def short_word(self) -> str:
        """Mostly one token; sometimes two glued together."""
        if self.rng.random() < 0.12:
            return (self.rng.choice(self._short_words) + self.rng.choice(self._short_words))[:8]
        return self.rng.choice(self._short_words)

    def name(self) -> str:
        """Capitalised: a person or a place, sometimes of two tokens, sometimes two words."""
        kind = self.rng.random()
        if self.natural:
            return self.usual_or_not(self.rng.choice(self._common_names))
        if self.practice(0.1):
            return self._coined(self._names)
        if self.practice(0.3):
            return self._long(self._rare_names)
        if kind < 0.08:
            return self.rng.choice(self._names) + self.rng.choice(self._short_words)[:4]
        common = self.maybe(0.5) and not self.practice(0.4)
        name = self.rng.choice(self._common_names if common else self._names)
        return f"{name} {self.rng.choice(self._names)}" if kind < 0.16 else name

    def usual_or_not(self, word: str) -> str:
        """The word, or sometimes another that has to be spelled: a third of these of any length as often as of
        another."""
        if not self.maybe(UNUSUAL):
            return word
        words = self._unusual_names if word[:1].isupper() else self._unusual_words
        if self.maybe(1 / 3):
            return self._long(words)
        return self.rng.choice(self.rng.choices(list(words.values()), [*map(len, words.values())])[0])

    def _long(self, words: dict[int, list[str]]) -> str:
        """Each length as often as any other: the letters at the end of long words are the last to be learnt."""
        return self.rng.choice(words[self.rng.choice(sorted(words))])

    def _coined(self, beginnings: list[str]) -> str:
        """A word of several tokens, as rare ones are."""
        while True:
            end = self.rng.choice(self._short_words)
            beginning = self.rng.choice(beginnings)[: self.number(2, 6)]
            word = (beginning + end[-self.number(1, 5) :])[:10]
            if self.mine(word):
                return word

    def number(self, low: int = 0, high: int = 99) -> int:
        return self.rng.randint(low, high)

    def phrase(self, low: int = 1, high: int = 4) -> str:
        return " ".join(self.word() for _ in range(self.rng.randint(low, high)))

    def maybe(self, probability: float) -> bool:
        return self.rng.random() < probability

    def practice(self, probability: float) -> bool:
        """Maybe, but never in the examination: what is hard is exercised more often than it is asked."""
        return not self.unseen and self.maybe(probability * (NATURAL_PRACTICE if self.natural else 1))


def _is_name(word: str) -> bool:
    return word[0].isupper() and word[1:].islower()


def _words(vocabulary: Vocabulary, below: int, wanted: Callable[[str], bool], shortest: int, longest: int) -> list[str]:
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
