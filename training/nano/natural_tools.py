"""Tools and requests as people write them first: a table of our own (natural_tools.txt), and the requests of
by_hand.yaml that are no longer examined.

A line of the table: name, description, parameters, ways to ask, apart by " | ". A parameter is `key:kind description`,
with `key?` where it need not be given; `{key}` in a request is its value, and what stands behind `@` is given without
being said: "Blinds down in the {room} @action=down".
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from training.nano import natural
from training.nano.alike import alike
from training.nano.examples import Source
from training.nano.tasks import (
    Task,
    add_unasked,
    definition,
    property_schema,
    quoted,
    reordered,
    required_of,
    spoken,
    styled_name,
    tell_default,
)
from training.nano.values import value

TABLE = Path(__file__).with_name("natural_tools.txt")
BY_HAND = Path(__file__).with_name("by_hand.yaml")
OTHER_VALUE = 0.6  # of a taught request by hand are exchanged for others of their kind
CALLED, NAME_WORDS = (
    {first: rest for first, *rest in (row.split() for row in natural.TABLE[kind].split(","))}
    for kind in ("called", "names")
)
OTHER_NAME = 0.4  # of parameters, and of words in a tool's name, are called otherwise
OF_PERSONS = ("person", "full_name", "first", "last")
_UNDATED = re.compile(r"\bon (?=today|tomorrow|tonight|next |this )", re.IGNORECASE)
_PARAMETER = re.compile(r"([a-z_0-9]+)(\??):(=[^ ]+|\S+)\s*(.*)", re.IGNORECASE)
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Parameter:
    key: str
    kind: str
    required: bool
    description: str


@dataclass(frozen=True, slots=True)
class Request:
    ask: str  # with {key} where a value stands
    unsaid: dict[str, Any]  # given without its value being said


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    description: str
    parameters: tuple[Parameter, ...]
    requests: tuple[Request, ...]

    @classmethod
    def of(cls, line: str) -> Row:
        """Raises ValueError: a slot or a value without its parameter, or a line of another form."""
        name, description, parameters, asks = line.split(" | ")
        found = tuple(_parameter(text) for text in parameters.split("; ") if text != "-")
        requests = tuple(_request(text) for text in asks.split(" / "))
        keys = {p.key for p in found}
        for request in requests:
            said = set(_SLOT.findall(request.ask)) | request.unsaid.keys()
            if not said <= keys or not {p.key for p in found if p.required} <= said:
                raise ValueError(f"{name}: {request.ask!r} has {sorted(said)}, not of {sorted(keys)}")
        return cls(name, description, found, requests)


def _parameter(text: str) -> Parameter:
    found = _PARAMETER.fullmatch(text)
    if found is None:
        raise ValueError(f"not a parameter: {text!r}")
    key, optional, kind, description = found.groups()
    return Parameter(key, kind, not optional, description)


def _request(text: str) -> Request:
    ask, *pairs = text.split(" @")
    unsaid = dict(pair.split("=") for pair in pairs)
    return Request(ask.strip(), {k: _literal(v) for k, v in unsaid.items()})


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@cache
def rows() -> tuple[Row, ...]:
    lines = TABLE.read_text().splitlines()
    return tuple(Row.of(line) for line in lines if line and not line.startswith("#"))


@cache
def by_hand() -> dict[str, Any]:
    """Tools as people write them, and requests: those that are taught, and those that are examined."""
    table: dict[str, Any] = yaml.safe_load(BY_HAND.read_text())
    return table


@cache
def taught() -> tuple[tuple[str, dict[str, Any], dict[str, Any]], ...]:
    """Requests by hand that lessons are made of: (request, its tool with its name, arguments)."""
    table = by_hand()
    return tuple((ask, {"name": name, **table["tools"][name]}, arguments) for ask, name, arguments in table["taught"])


def natural_tool(s: Source) -> Task:
    """Each row of the table and each taught request is as likely."""
    if s.rng.randrange(len(rows()) + len(taught())) < len(rows()):
        return _of_row(s, s.rng.choice(rows()))
    return _as_by_hand(s, *s.rng.choice(taught()))


def _called(s: Source, name: str) -> str:
    """The tool's name, or one that says the same: the first word may be another."""
    first, _, rest = name.partition("_")
    if first in NAME_WORDS and not rest.startswith("in_") and s.maybe(OTHER_NAME):
        first = s.pick(*NAME_WORDS[first])
    return styled_name(s, f"{first}_{rest}" if rest else first)


def _keys(s: Source, row: Row) -> dict[str, str]:
    """What its parameters are called."""
    keys = {parameter.key: parameter.key for parameter in row.parameters}
    for key, kind in ((p.key, p.kind) for p in row.parameters):
        if key == "name" and kind not in OF_PERSONS:
            continue
        free = [other for other in CALLED.get(key, ()) if other not in keys.values()]
        if free and s.maybe(OTHER_NAME):
            keys[key] = s.rng.choice(free)
    return keys


def _of_row(s: Source, row: Row) -> Task:
    request = s.rng.choice(row.requests)
    said = _SLOT.findall(request.ask)
    keys = _keys(s, row)
    properties: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    shown: dict[str, str] = {}
    made_of: dict[str, Any] = {}
    for parameter in row.parameters:
        kind = parameter.kind
        if kind == "yes":
            made: Any = request.unsaid.get(parameter.key, True)
        else:
            made = value(s, kind)
            if made_of.get(kind) == made and not kind.startswith("="):
                made = alike(s, kind, made)
        made_of[kind] = made
        key = parameter.key
        if key in request.unsaid:
            made = request.unsaid[key]
        given = key in said or key in request.unsaid
        if not given and not s.maybe(0.85):
            continue
        schema = property_schema(s, keys[key], kind, made)
        if s.maybe(0.75):
            schema.pop("description", None)
            if parameter.description and s.maybe(0.8):
                schema["description"] = parameter.description
        if not parameter.required and s.practice(0.3):
            tell_default(s, schema, made)
        properties[keys[key]] = schema
        if given:
            arguments[keys[key]] = made
        shown[key] = quoted(s, kind, made)
    asked = _UNDATED.sub("", request.ask.format(**{key: shown[key] for key in said}))
    properties, arguments = reordered(s, properties, arguments)
    required = required_of(s, (keys[p.key] for p in row.parameters if p.required), 1)
    if s.maybe(0.4):
        add_unasked(s, properties)
    description = row.description if s.maybe(0.92) else ""
    return Task(
        definition(s, _called(s, row.name), description, properties, required),
        spoken(s, asked, value_first=request.ask.startswith("{")), arguments, ("status", "result", "value"),
    )  # fmt: skip


def _as_by_hand(s: Source, ask: str, tool: dict[str, Any], arguments: dict[str, Any]) -> Task:
    """The request as it was written, some of its values exchanged for others of their kind."""
    changed = dict(arguments)
    for key, old in arguments.items():
        schema = tool["parameters"][key]
        if s.maybe(1 - OTHER_VALUE) or isinstance(old, (bool, list)) or "items" in schema:
            continue
        if ask.count(str(old)) != 1 or any(str(old) in str(v) for k, v in changed.items() if k != key):
            continue
        new = _another(s, key, old, schema)
        if any(str(new) in str(v) or str(v) in str(new) for k, v in changed.items() if k != key):
            continue
        ask = ask.replace(str(old), str(new))
        changed[key] = new
    properties, changed = reordered(s, dict(tool["parameters"]), changed)
    parameters = {"type": "object", "properties": properties, "required": list(tool["required"])}
    described = {
        "name": styled_name(s, tool["name"]), "description": tool["description"], "parameters": parameters,
    }  # fmt: skip
    return Task(described, spoken(s, ask), changed, ("status", "result"))


_KINDS_OF = (
    (r"[^@ ]+@[^@ ]+", "email"),
    (r"https?://\S+|\w+(\.\w+)*\.(com|org|net|io|dev)(/\S*)?", "url"),
    (r"\S*\w\.(txt|py|csv|json|md|pdf|yaml|html|png|jpg|js|log|docx|xlsx|c|mp3|wav|mp4|zip)", "file"),
    (r"\d{4}-\d\d-\d\d|(January|February|March|April|May|June|July|August|September|October|November|December) \d+.*", "date"),
    (r"\d{1,2}:\d\d( ?[ap]m)?|\d{1,2} ?[ap]m|noon|midnight", "time"),
    (r"(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|today|tomorrow", "day"),
    (r"\+?\d[\d -]{6,}", "phone"),
    (r"(?=.*\d)[A-Za-z]*[-_#]?\d+[a-zA-Z]?", "code"),
)  # fmt: skip
_TOLD_BY_THEIR_POOL = ("city", "country", "landmark", "team", "artist", "title", "company", "animal", "plant", "food", "item", "service", "task", "message", "topic")  # fmt: skip
_PERSONS = re.compile("name|person|user|who|employee|agent|contact|recipient|client|customer|patient|student|borrower|owner|guest|player|author|speaker")  # fmt: skip


def _another(s: Source, key: str, old: Any, schema: dict[str, Any]) -> Any:
    """A value of the same kind, as far as it can be told; else the old one."""
    if "enum" in schema:
        return s.rng.choice(schema["enum"])
    if isinstance(old, float):
        return value(s, "float")
    if isinstance(old, int):
        low, high = (1, 12) if old <= 12 else (2, 99) if old < 100 else (100, 20 * old)
        return s.number(low, high)
    for pattern, kind in _KINDS_OF:
        if re.fullmatch(pattern, old):
            made = value(s, kind)
            return made if isinstance(made, str) else str(made)
    for kind in _TOLD_BY_THEIR_POOL:
        if old in natural.POOLS[kind]:
            return value(s, kind)
    if old.isalpha() and old.isupper():
        return value(s, "abbreviation")
    if _PERSONS.search(key) and old[:1].isupper():
        return value(s, "full_name" if " " in old else "first")
    if old.replace(" ", "").replace("'", "").isalpha():
        if old[:1].isupper():
            return value(s, s.pick("title", "name", "city"))
        return value(s, {1: "word", 2: "short_phrase"}.get(old.count(" ") + 1, "phrase"))
    return old
