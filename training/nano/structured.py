"""Lessons in JSON: fill the fields of a schema from what the user says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from training.nano.basics import user
from training.nano.examples import Example, Source
from training.nano.values import value_text

NAME_FIELDS = (
    "name",
    "city",
    "country",
    "author",
    "title",
    "company",
    "street",
    "owner",
    "person",
    "first_name",
    "location",
)
WORD_FIELDS = (
    "color",
    "animal",
    "food",
    "job",
    "material",
    "category",
    "language",
    "status",
    "product",
    "item",
    "topic",
)
INTEGER_FIELDS = (
    "age",
    "count",
    "quantity",
    "year",
    "price",
    "number",
    "size",
    "pages",
    "seats",
    "score",
    "weight",
    "days",
)
BOOLEAN_FIELDS = ("active", "married", "open", "new", "available", "urgent", "paid", "student")


@dataclass(frozen=True, slots=True)
class Field:
    """One value with its schema and the words that a user might give it in."""

    name: str
    schema: dict[str, Any]
    value: Any
    said: str  # as in "age is 34"

    @property
    def shown(self) -> str:
        return value_text(self.value)


def random_field(s: Source, taken: set[str]) -> Field:
    while True:
        field = _random_field(s)
        if field.name not in taken:
            taken.add(field.name)
            return field


def _random_field(s: Source) -> Field:
    kind = s.rng.choices(("name", "word", "integer", "boolean", "new"), (4, 3, 4, 1, 4))[0]
    if kind == "new":
        name = s.word() if s.maybe(0.7) else f"{s.word()}_{s.word()}"
        kind = s.rng.choice(("name", "word", "integer"))
    else:
        name = s.rng.choice(
            {"name": NAME_FIELDS, "word": WORD_FIELDS, "integer": INTEGER_FIELDS, "boolean": BOOLEAN_FIELDS}[kind]
        )
    spoken = name.replace("_", " ")
    schema: dict[str, Any] = {"type": "string"}
    value: Any
    if kind == "name":
        value = s.name()
    elif kind == "word":
        value = s.word() if s.maybe(0.8) else s.phrase(2, 3)
        if s.maybe(0.15) and " " not in value:
            options = [value, *(s.word() for _ in range(s.number(1, 3)))]
            s.rng.shuffle(options)
            schema = {"type": "string", "enum": options}
    elif kind == "integer":
        value, schema = (
            s.rng.choice((s.number(), s.number(0, 9), s.number(100, 2030))),
            {"type": s.pick("integer", "integer", "number")},
        )
    else:
        value, schema = s.maybe(0.5), {"type": "boolean"}
        return Field(name, schema, value, s.pick(*((f"{spoken} is true", f"{spoken}: yes", f"{spoken}") if value else
                                                   (f"{spoken} is false", f"{spoken}: no", f"not {spoken}"))))  # fmt: skip
    shown = value_text(value)
    return Field(
        name,
        schema,
        value,
        s.pick(f"{spoken} is {shown}", f"{spoken}: {shown}", f"{spoken} {shown}", f"the {spoken} is {shown}"),
    )


def json_object(s: Source) -> Example:
    if s.maybe(0.3):
        fields, text = _person(s)
    else:
        taken: set[str] = set()
        fields = [random_field(s, taken) for _ in range(s.number(1, 4))]
        said = [f.said for f in fields]
        if s.maybe(0.3):
            s.rng.shuffle(said)
        text = s.pick(", ", ", ", "; ", ". ").join(said)
        if s.maybe(0.3) and len(said) > 1:
            text = ", ".join(said[:-1]) + " and " + said[-1]
    values = {f.name: f.value for f in fields}
    with_schema = s.maybe(0.8)
    spoken = ", ".join(f.name for f in fields)
    if with_schema:
        ask = s.pick(
            text, f"{text}.", f"Extract the data: {text}.", f"Fill in the fields: {text}", f"Extract: {text}", f"Make JSON of this: {text}",
            f"Extract the {spoken} from this text: {text}.", f"Give me JSON. {text}.", f"Extract the information. {text}.",
        )  # fmt: skip
    else:
        ask = s.pick(
            f"Give me a JSON object with {text}.", f"Write as JSON: {text}", f"Make JSON of this: {text}", f"As JSON: {text}",
            f"Return a JSON object with {spoken}: {text}.",
        )  # fmt: skip
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {f.name: f.schema for f in fields},
        "required": [f.name for f in fields],
    }
    if s.maybe(0.5):
        schema["additionalProperties"] = False
    response_format = {
        "name": s.pick("answer", "person", "output", "result", "response", "data", s.word()),
        "schema": schema,
    }
    effort = s.effort()
    listed = ", ".join(f"{f.name} = {f.shown}" for f in fields)
    analysis = listed if effort == "low" else f"JSON with {listed}."
    if effort == "high":
        analysis += f" There are {len(fields)} fields, in this order."
    return Example(
        "json", [user(ask)], effort, [analysis], [json.dumps(values, ensure_ascii=False)],
        response_format=response_format if with_schema else None, expected=[json.dumps(values, ensure_ascii=False)],
    )  # fmt: skip


def _person(s: Source) -> tuple[list[Field], str]:
    name, age, town, job = s.name(), s.number(1, 99), s.name(), s.word()
    whole = [
        Field("name", {"type": "string"}, name, ""), Field("age", {"type": s.pick("integer", "number")}, age, ""),
        Field(s.pick("city", "town", "location"), {"type": "string"}, town, ""), Field(s.pick("job", "occupation"), {"type": "string"}, job, ""),
    ]  # fmt: skip
    count = s.number(2, 4)
    texts = {
        2: (f"{name} is {age} years old.", f"{name} is {age}.", f"My name is {name} and I am {age} years old.", f"{name}, aged {age}", f"Name {name}, age {age}",
            f"My friend {name} is {age} years old."),
        3: (f"{name} is {age} years old and lives in {town}.", f"{name}, {age}, from {town}.", f"I am {name}, {age} years old, and I live in {town}.",
            f"{name} lives in {town} and is {age} years old."),
        4: (f"{name} is a {job} from {town}, {age} years old.", f"{name}, {age}, is a {job} and lives in {town}.",
            f"{name} is {age} years old, lives in {town} and works as a {job}."),
    }  # fmt: skip
    return whole[:count], s.pick(*texts[count])


def json_array(s: Source) -> Example:
    """Words as strings: many times what is hardest in arguments, to write a word that stands behind a space behind a
    quote."""
    items = [s.name() if s.maybe(0.3) else s.word() for _ in range(s.number(2, 8))]
    joined = ", ".join(items[:-1]) + s.pick(", ", " and ") + items[-1]
    in_object = s.maybe(0.4)
    key = s.pick("items", "words", "names", "list", "results", "tags", "values") if s.maybe(0.6) else s.word()
    ask = s.pick(
        f"Make a JSON array of {joined}.", f"Write as a JSON array: {joined}", f"Turn this into a JSON list: {joined}", f"As a JSON array: {joined}",
        f"Return a JSON array with {joined}.", f"JSON array of strings: {joined}",
    )  # fmt: skip
    schema = {"type": "object", "properties": {key: {"type": "array", "items": {"type": "string"}}}, "required": [key]}  # fmt: skip
    if in_object:
        ask = s.pick(f"Extract the {key}: {joined}.", f"The {key} are {joined}.", f"{key}: {joined}", f"Give me the {key} as JSON: {joined}", joined)  # fmt: skip
    effort = s.effort()
    analysis = f"{len(items)} strings" if effort == "low" else f"A JSON array of {len(items)} strings."
    if effort == "high":
        analysis += f" The first is {items[0]}, the last is {items[-1]}."
    answer = json.dumps({key: items} if in_object else items)
    return Example(
        "json array", [user(ask)], effort, [analysis], [answer],
        response_format={"name": s.pick("answer", "list", "output", "response"), "schema": schema} if in_object else None, expected=[answer],
    )  # fmt: skip
