"""Everyday tools (everyday.yaml), and the words in which people ask for them. Some are held out of training."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from training.nano.alike import alike
from training.nano.described import leave_unsaid, one_more, value_for
from training.nano.examples import Source
from training.nano.tasks import (
    GENERIC,
    Task,
    add_unasked,
    definition,
    property_schema,
    quoted,
    reordered,
    required_of,
    spoken,
    styled_name,
)
from training.nano.values import near_word, some_thing

TABLE = Path(__file__).with_name("everyday.yaml")
RENAMED = 0.2  # of the everyday tools in lessons
ONE_MORE = 0.3  # of them have one more parameter than their row says, and of these some a second
_LONG_WORD = re.compile("[a-z]{4,}")


@dataclass(frozen=True, slots=True)
class Parameter:
    keys: tuple[str, ...]  # names that it may have
    kind: str  # of its value
    required: bool


@dataclass(frozen=True, slots=True)
class Archetype:
    """{0}, {1} in an ask are the values of the parameters, in order; an ask may leave out those that are not
    required."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    asks: tuple[str, ...]
    results: tuple[str, ...]  # keys that its result may have
    held_out: bool
    weight: int  # how often it is asked for, against others

    @classmethod
    def of(cls, row: dict[str, Any]) -> Archetype:
        parameters = []
        for text in row["parameters"].split():
            keys, kind = text.rsplit(":", 1)
            parameters.append(Parameter(tuple(k.rstrip("?") for k in keys.split("|")), kind, "?" not in keys))
        return cls(
            tuple(row["names"].split()), tuple(row["about"].split(" / ")), tuple(parameters), tuple(row["asks"].split(" / ")),
            tuple(row["results"].split()), row.get("held_out", False), row.get("weight", 1),
        )  # fmt: skip


@cache
def archetypes() -> tuple[Archetype, ...]:
    return tuple(Archetype.of(row) for row in yaml.safe_load(TABLE.read_text()))


def everyday(s: Source) -> Task:
    mine = [a for a in archetypes() if a.held_out == s.unseen]
    archetype = s.rng.choices(mine, [a.weight for a in mine])[0]
    if s.practice(RENAMED):
        archetype = renamed(s, archetype)
    return task_of(s, archetype)


def renamed(s: Source, archetype: Archetype) -> Archetype:
    """The same tool with another word for what it is about, as if there were a thousand more kinds: what is learnt is
    to compare its words with the request's. The request sometimes has a word near it."""
    told = " ".join((*archetype.names, *archetype.descriptions)).lower()
    asked = " ".join(archetype.asks)
    words = sorted(w for w in set(_LONG_WORD.findall(told)) - GENERIC if _begins(w).search(asked))
    if not words:
        return archetype
    old, new = s.rng.choice(words), some_thing(s) if s.maybe(0.6) else s.word()
    called = near_word(s, new) if s.maybe(0.4) else new
    names = [name for name in archetype.names if _begins(old).search(name)] or archetype.names
    exchanged = tuple(_exchanged(name, old, new) for name in names)
    if any(name in a.names for name in exchanged for a in archetypes() if a.held_out):
        return archetype
    return replace(
        archetype,
        names=exchanged,
        descriptions=tuple(_exchanged(text, old, new) for text in archetype.descriptions),
        asks=tuple(_exchanged(ask, old, called) for ask in archetype.asks if _begins(old).search(ask)),
    )


def _begins(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-z]){word}", re.IGNORECASE)


def _exchanged(text: str, old: str, new: str) -> str:
    return _begins(old).sub(lambda f: new.capitalize() if f[0][0].isupper() else new, text)


def known(s: Source) -> Task:
    """A tool that training has, with words and names that it has not where `s` is of the held-out half."""
    return task_of(s, s.rng.choice([a for a in archetypes() if not a.held_out]))


def task_of(s: Source, archetype: Archetype) -> Task:
    name = styled_name(s, s.pick(*archetype.names))
    ask = s.pick(*archetype.asks)
    properties: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    said: list[str] = []
    made_of: dict[str, Any] = {}
    for index, parameter in enumerate(archetype.parameters):
        key = s.rng.choice([k for k in parameter.keys if k not in properties])
        alone = len(archetype.parameters) == 1
        if alone and s.practice(RENAMED):  # it may have any name
            key = s.pick(some_thing(s), f"{some_thing(s)}_name", f"{some_thing(s)}_{key}")
        made = value_for(s, parameter.kind, arguments)
        if parameter.kind in made_of and s.practice(0.4):
            made = alike(s, parameter.kind, made_of[parameter.kind])
        made_of[parameter.kind] = made
        if parameter.required or f"{{{index}}}" in ask or s.maybe(0.5):
            properties[key] = property_schema(s, key, parameter.kind, made)
        if f"{{{index}}}" in ask:
            arguments[key] = made
        said.append(quoted(s, parameter.kind, made))
    asked, begins = ask.format(*said), ask.startswith("{")
    kinds = {parameter.kind for parameter in archetype.parameters}
    for _ in range(2):
        if not s.practice(ONE_MORE):
            break
        asked, in_front = one_more(s, asked, kinds, properties, arguments)
        begins |= in_front
    leave_unsaid(s, kinds, properties)
    properties, arguments = reordered(s, properties, arguments)
    required = required_of(s, (k for k in properties if k in arguments), 0.97)
    add_unasked(s, properties)
    return Task(
        definition(s, name, s.pick(*archetype.descriptions) if s.maybe(0.92) else "", properties, required),
        spoken(s, asked, value_first=begins), arguments, archetype.results,
    )  # fmt: skip
