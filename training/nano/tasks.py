"""A tool and a request that it fits: what everyday, described and invented tools have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from training.nano.examples import Source
from training.nano.values import QUALITIES, THINGS, WORDS, choices, schema_of, value, value_text

_NAME_PART = re.compile("[A-Z]?[a-z0-9]+|[A-Z]+")
GENERIC = frozenset(WORDS["generic"].split())


@dataclass(frozen=True, slots=True)
class Task:
    """A tool and a request that it fits."""

    definition: dict[str, Any]
    ask: str
    arguments: dict[str, Any]
    results: tuple[str, ...]
    made_of: tuple[str, ...] = ()  # the deed and the thing, where it is made of these

    @property
    def name(self) -> str:
        return str(self.definition["name"])

    @property
    def content_words(self) -> frozenset[str]:
        return frozenset(p.lower() for p in _NAME_PART.findall(self.name)) - GENERIC

    def confusable(self, other: Task) -> bool:
        """Whether a request for one might be meant for the other."""
        return self.name == other.name or bool(self.content_words & other.content_words)


def definition(
    s: Source, name: str, description: str, properties: dict[str, Any], required: list[str]
) -> dict[str, Any]:
    made: dict[str, Any] = {"name": name}
    if description:
        made["description"] = description
    if properties or s.maybe(0.5):
        made["parameters"] = {"type": "object", "properties": properties}
        if required or s.maybe(0.5):
            made["parameters"]["required"] = required
        if s.maybe(0.1):
            made["parameters"]["additionalProperties"] = False
    return made


def styled_name(s: Source, name: str) -> str:
    """name_like_this, sometimes nameLikeThis or name-like-this."""
    head, *rest = name.split("_")
    kind = s.rng.random() * (0.6 if s.practice(0.5) else 1.0)
    if kind < 0.15:
        return head + "".join(part.title() for part in rest)
    return "-".join((head, *rest)) if kind < 0.18 else name


def property_schema(s: Source, key: str, kind: str, made: Any) -> dict[str, Any]:
    """How a tool declares a parameter that should become `made`, a value of this kind."""
    schema, options = schema_of(made), choices(kind)
    if schema["type"] == "integer" and s.maybe(0.3):
        schema["type"] = "number"
    if options is not None and (kind.startswith("=") or s.maybe(0.25)):
        others = [v for v in options if v != made]
        shown = [made, *s.rng.sample(others, min(len(others), s.number(1, 3)))]
        s.rng.shuffle(shown)
        schema["enum"] = options if kind.startswith("=") else shown
    if s.maybe(0.5):
        spoken = key.replace("_", " ")
        schema["description"] = s.pick(
            f"The {spoken}", f"The {spoken}.", f"the {spoken} to use", f"{spoken.capitalize()}, as the user says it",
            f"The {spoken}, e.g. {value_text(value(s, kind))}", f"{spoken.capitalize()}, for example {value_text(value(s, kind))}.",
            f"{spoken}", "What the user wants", "Required.", f"The {spoken} of the {s.rng.choice(THINGS)}", f"{spoken.capitalize()} of the {s.rng.choice(THINGS)}",
            f"The {spoken} and {s.rng.choice(THINGS)}, e.g. {value_text(value(s, kind))}", f"Which {spoken}", f"The {spoken} to look up",
        )  # fmt: skip
    if s.practice(0.2):
        tell_default(s, schema, value(s, kind))
    return schema


def tell_default(s: Source, schema: dict[str, Any], usual: Any) -> None:
    """Says that the parameter need not be given, or what it is then: one that is given has that as well as one that is
    not."""
    if s.maybe(0.4) and usual in schema.get("enum", [usual]):
        schema["default"] = usual
        return
    text = value_text(usual)
    told = s.pick("(optional)", "(optional)", "Optional.", f"(default {text})", f"Default: {text}", f"{text} if not given")  # fmt: skip
    schema["description"] = f"{schema.get('description', '')} {told}".strip()


def required_of(s: Source, given: Iterable[str], share: float) -> list[str]:
    """Which of the parameters that a request gives must be given. In lessons often not: that one need not be given must
    not tell that it was not."""
    return [key for key in given if s.maybe(share) and not s.practice(0.4)]


def reordered(
    s: Source, properties: dict[str, Any], arguments: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every other tool names its parameters in another order than people say them."""
    if s.maybe(0.5):
        return properties, arguments
    keys = s.rng.sample(list(properties), len(properties))
    return {k: properties[k] for k in keys}, {k: arguments[k] for k in keys if k in arguments}


UNASKED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("unit", {"type": "string", "enum": ["celsius", "fahrenheit"]}),
    ("limit", {"type": "integer"}),
    ("max_results", {"type": "integer", "description": "How many results at most"}),
    ("language", {"type": "string"}),
    ("format", {"type": "string", "enum": ["json", "text"]}),
    ("verbose", {"type": "boolean"}),
    ("page", {"type": "integer", "description": "The page of the results, from 1"}),
    ("notes", {"type": "string", "description": "Anything else, optional"}),
    ("priority", {"type": "string", "enum": ["low", "normal", "high"], "default": "normal"}),
    ("timeout", {"type": "number", "default": 30}),
    ("subject", {"type": "string", "description": "Subject line"}),
    ("currency", {"type": "string", "default": "USD"}),
)


def add_unasked(s: Source, properties: dict[str, Any]) -> None:
    """Sometimes one or two parameters that need not be given, and are not, somewhere among the others."""
    if not s.maybe(0.35):
        return
    for _ in range(s.number(1, 2)):
        key, schema = s.rng.choice((*UNASKED, (s.word(), {"type": s.pick("string", "integer", "boolean")})))
        if key not in properties:
            if s.practice(0.4):
                schema = dict(schema)
                tell_default(s, schema, value(s, USUAL[schema["type"]]))
            put_among(s, properties, key, schema)


USUAL = {"string": "word", "integer": "small", "number": "float", "boolean": "boolean"}


def put_among(s: Source, properties: dict[str, Any], key: str, schema: dict[str, Any]) -> None:
    rows = list(properties.items())
    rows.insert(s.number(0, len(rows)), (key, schema))
    properties.clear()
    properties.update(rows)


POLITE = (", thanks.", " for me.", "!", ", thank you")
WHEN = (" now", " today?", " right now?")  # in natural lessons a day that is said is a value
CONTEXTS = WORDS["contexts"].split(" / ")
QUESTION = re.compile(r"(what|where|who|when|how|which|why|is|are|do|does|did|can|am|will|whose|any|i|my|the|there)\b", re.IGNORECASE)  # fmt: skip


def spoken(s: Source, ask: str, *, value_first: bool = False) -> str:
    """The request as one of many people would put it. A value that it begins with keeps its capital letter."""
    first = ask.split(" ", 1)[0]
    lowers = first[1:].islower() and not value_first
    imperative = lowers and first.isalpha() and not QUESTION.match(ask) and not ask.endswith("?")
    if imperative and s.maybe(0.3):
        lowered = ask[:1].lower() + ask[1:]
        plain = lowered.rstrip(".")
        ask = s.pick(
            f"Please {lowered}", f"Can you {plain}?", f"Could you {plain}?", f"Can you please {plain}?", f"I want you to {lowered}",
            f"Could you please {plain}?", f"I'd like you to {lowered}", f"{plain}, please", f"{plain} please", f"Hey, {lowered}",
        )  # fmt: skip
    elif s.maybe(0.12):
        ask = s.pick("Please help: ", "Hi! ", "I have a question. ", "Hello, ", "Hey, ", "Thanks! ", "One more thing: ", "Quick question: ") + ask  # fmt: skip
    kind = s.rng.random()
    if kind < 0.12:
        ask = ask.rstrip(".?")
    elif kind < 0.18:
        ask = ask.rstrip(".?") + s.pick(*(POLITE if s.natural else (*POLITE, *WHEN)))
    if s.maybe(0.12) and lowers:
        ask = ask[:1].lower() + ask[1:]
    if not s.practice(0.12):
        return ask
    context = s.pick(*CONTEXTS).format(t=s.rng.choice(THINGS), q=s.rng.choice(QUALITIES))
    return f"{context} {ask}" if s.maybe(0.7) else f"{ask}{'' if ask[-1] in '.?!' else '.'} {context}"


def as_written(s: Source, number: float) -> str:
    """A number as people write it, which its JSON has not: 12,000 and 78.20."""
    if isinstance(number, int):
        return f"{number:,}" if abs(number) > 999 else str(number)
    return f"{number:.2f}" if round(number, 2) == number else str(number)


def quoted(s: Source, kind: str, made: Any) -> str:
    """The value as it stands in the request."""
    if isinstance(made, list):
        *first, last = map(value_text, made)
        return ", ".join(first) + s.pick(" and ", " and ", ", ") + last
    text = value_text(made)
    if type(made) in (int, float) and s.practice(0.15):
        return as_written(s, made)
    if kind.startswith("=") and s.practice(0.15):  # the parameter's word for it is in small letters
        return s.pick(text.upper() if len(text) < 5 else text.capitalize(), f"{text}s")
    if kind in ("phrase", "title", "name", "word", "file", "sql", "python", "command", "expression") and s.maybe(0.15):
        return s.pick(f"'{text}'", f'"{text}"')
    return text
