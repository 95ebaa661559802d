"""Lessons with tools: choose one among several, fill its arguments from the prompt, answer from its result.

Half of the tools are everyday ones, said in everyday words; the others have invented names, so that what is learnt is
to match words and to copy them. Every fifth everyday tool is held out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from src.nano.basics import addition, assistant, memory, spelling, talk, user
from src.nano.everyday import ARCHETYPES, CURRENCIES, DAYS, LANGUAGES, ROOMS
from src.nano.examples import Example, Source
from src.nano.structured import Field, random_field, value_text

VERBS = [
    "get",
    "find",
    "make",
    "create",
    "open",
    "close",
    "start",
    "stop",
    "check",
    "update",
    "list",
    "show",
    "build",
    "fetch",
    "load",
    "save",
    "count",
    "sort",
    "scan",
    "test",
]
INTEGER_KINDS = {"integer", "number"}


@dataclass(frozen=True, slots=True)
class Task:
    """A tool and a request that it fits."""

    definition: dict[str, Any]
    ask: str
    arguments: dict[str, Any]
    results: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.definition["name"])


def _value(s: Source, kind: str) -> Any:
    match kind:
        case "name":
            return s.name()
        case "integer":
            return s.rng.choice((s.number(1, 12), s.number(1, 99), s.number(100, 9999)))
        case "word":
            return s.word()
        case "phrase":
            return s.phrase(1, 4)
        case "file":
            return f"{s.word()}{s.pick('.txt', '.py', '.csv', '.json', '.md')}"
        case _:
            return s.pick(
                *{"language": LANGUAGES, "currency": CURRENCIES, "room": ROOMS, "day": DAYS}[kind]
            )


def everyday(s: Source) -> Task:
    mine = [a for i, a in enumerate(ARCHETYPES) if (i % 5 == 4) == s.unseen]
    archetype = s.rng.choice(mine)
    name = s.pick(*archetype.names)
    if s.maybe(0.15):
        head, *rest = name.split("_")
        name = head + "".join(part.title() for part in rest)
    properties: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    values = []
    for options, kind in archetype.parameters:
        key = s.pick(*options.split("|"))
        value = _value(s, kind)
        schema: dict[str, Any] = {
            "type": s.pick("integer", "number") if kind == "integer" else "string"
        }
        if s.maybe(0.25):
            schema["description"] = s.pick(
                f"The {key}",
                f"the {key.replace('_', ' ')} to use",
                f"{key.title()}, as the user says it",
            )
        if kind in ("language", "currency", "room") and s.maybe(0.2):
            options_shown = [
                value,
                *s.rng.sample(
                    [
                        v
                        for v in {"language": LANGUAGES, "currency": CURRENCIES, "room": ROOMS}[
                            kind
                        ]
                        if v != value
                    ],
                    2,
                ),
            ]
            s.rng.shuffle(options_shown)
            schema["enum"] = options_shown
        properties[key], arguments[key] = schema, value
        values.append(value_text(value))
    ask = s.pick(*archetype.asks).format(*values)
    if s.maybe(0.15):
        ask = s.pick("Please ", "Can you help? ", "Hi! ", "I have a question. ", "Hello, ") + ask
    if s.maybe(0.1):
        ask = ask.rstrip(".?") + s.pick(" please", ", please.", " now", "")
    return Task(
        _definition(name, s.pick(*archetype.descriptions), properties, s),
        ask,
        arguments,
        archetype.results,
    )


def invented(s: Source) -> Task:
    verb = s.pick(*VERBS) if s.maybe(0.6) else s.short_word()
    noun = s.word()
    name = s.pick(
        f"{verb}_{noun}", f"{verb}_{noun}", f"{verb}{noun.title()}", noun, f"{noun}_{verb}"
    )
    description = s.pick(
        f"{verb.title()} the {noun}.", f"{verb.title()} a {noun}.", f"{verb.title()}s the {noun} of a {s.word()}.",
        f"Use this to {verb} the {noun}.", f"{verb} {noun}", "",
    )  # fmt: skip
    taken: set[str] = set()
    fields = [random_field(s, taken) for _ in range(s.rng.choices((0, 1, 2, 3), (1, 5, 4, 2))[0])]
    opening = s.pick(
        f"{verb.title()} the {noun}", f"Please {verb} the {noun}", f"I want to {verb} the {noun}", f"Can you {verb} the {noun}", f"{verb} {noun}",
        f"Use {name}", f"Call {name}", f"I need the {noun}",
    )  # fmt: skip
    ask = opening + _said(s, fields)
    return Task(
        _definition(name, description, {f.name: f.schema for f in fields}, s), ask, {f.name: f.value for f in fields},
        tuple(s.word() for _ in range(2)),
    )  # fmt: skip


def _said(s: Source, fields: list[Field]) -> str:
    if not fields:
        return s.pick(".", "", "?")
    plain = not any(isinstance(f.value, bool) for f in fields)
    if plain and len(fields) == 1 and s.maybe(0.7):  # the key is in the definition alone
        return f" {s.pick('for', 'of', 'with', 'in', 'to')} {fields[0].shown}" + s.pick(
            ".", "", "?"
        )
    if plain and len(fields) == 2 and s.maybe(0.5):
        one, two = fields[0].shown, fields[1].shown
        pair = s.pick(
            f" from {one} to {two}",
            f" with {one} and {two}",
            f" for {one} in {two}",
            f" of {one}: {two}",
        )
        return pair + s.pick(".", "", "?")
    parts = [f.said for f in fields]
    text = ", ".join(parts) if s.maybe(0.5) else " and ".join(parts)
    return s.pick(" with ", ": ", ", ", " where ") + text + s.pick(".", "", "?")


def _definition(
    name: str, description: str, properties: dict[str, Any], s: Source
) -> dict[str, Any]:
    definition: dict[str, Any] = {"name": name}
    if description:
        definition["description"] = description
    if properties or s.maybe(0.5):
        definition["parameters"] = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
        }
    return definition


def _offer(s: Source, task: Task, low: int = 1, high: int = 5) -> list[dict[str, Any]]:
    """The task's tool among others."""
    tools = {task.name: task.definition}
    words = set(task.name.lower().split("_"))
    for _ in range(s.rng.randint(low, high) - 1):
        another = any_task(s)
        if another.name not in tools and not words & set(another.name.lower().split("_")):
            tools[another.name] = another.definition
    listed = list(tools.values())
    s.rng.shuffle(listed)
    return listed


def any_task(s: Source) -> Task:
    return everyday(s) if s.maybe(0.5) else invented(s)


def _call_analysis(s: Source, task: Task, tools: list[dict[str, Any]], effort: str) -> str:
    values = ", ".join(f"{key} = {value_text(value)}" for key, value in task.arguments.items())
    if effort == "low":
        return f"{task.name}: {values}" if values else task.name
    text = f"The tool is {task.name}" + (f" with {values}." if values else ".")
    if effort == "high":
        text += f" There are {len(tools)} tools; this one fits."
    return text


def tool_call(
    s: Source, *, count: int | None = None, kind: Callable[[Source], Task] = any_task
) -> Example:
    task = kind(s)
    tools = _offer(s, task, *((count, count) if count else (1, 5)))
    effort = s.effort()
    messages = [user(task.ask)]
    if s.maybe(0.12):
        before = s.rng.choice((addition, talk, spelling))(s)
        messages = [before.messages[-1], assistant(before.answer_text), *messages]
    return Example(
        "tool_call", messages, effort, [_call_analysis(s, task, tools, effort)], call=(task.name, task.arguments), tools=tools,
    )  # fmt: skip


def tool_not_needed(s: Source) -> Example:
    """Tools are offered, and none fits."""
    example = s.rng.choice((talk, talk, addition, spelling, memory))(s)
    example.tools = [
        t for t in _offer(s, invented(s), 1, 4) if "add" not in t["name"] and "sum" not in t["name"]
    ]
    return example


def tool_result(s: Source) -> Example:
    """The result of a call has come: answer from it."""
    task = any_task(s)
    tools = _offer(s, task, 1, 4)
    effort = s.effort()
    keys = list(
        dict.fromkeys(task.results if s.maybe(0.6) else [s.word() for _ in range(s.number(1, 3))])
    )[: s.number(1, 3)]
    values: dict[str, Any] = {k: _result_value(s) for k in keys}
    style = s.rng.random()
    if style < 0.65:
        content, answer = (
            json.dumps(values),
            ", ".join(f"{k}: {value_text(v)}" for k, v in values.items()) + ".",
        )
        if s.maybe(0.2):
            content = json.dumps(values, separators=(",", ":"))
    elif style < 0.9:
        content = s.pick(s.phrase(1, 4), str(_result_value(s)), f"{s.number()} {s.word()} and {s.word()}", f"{s.number()}°C and {s.word()}",
                         f"{s.word()} is {s.number()}", f"{s.name()} {s.number()}")  # fmt: skip
        answer = content + ("" if content.endswith(".") else ".")
    else:
        items = [s.word() for _ in range(s.number(2, 4))]
        content, answer = json.dumps(items), ", ".join(items) + "."
    analysis = answer if effort == "low" else f"The tool {task.name} says: {answer}"
    if effort == "high":
        analysis += " That answers the question."
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": task.name, "arguments": json.dumps(task.arguments)},
    }
    made: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [call]}
    if s.maybe(0.4):
        made["reasoning_content"] = _call_analysis(s, task, tools, effort)
    expected = [value_text(v) for v in values.values()] if style < 0.65 else [answer.rstrip(".")]
    return Example(
        "tool_result", [user(task.ask), made, {"role": "tool", "tool_call_id": "call_1", "content": content}], effort, [analysis],
        [f"The result is {answer}" if style >= 0.65 else answer], tools=tools, expected=expected,
    )  # fmt: skip


def _result_value(s: Source) -> Any:
    return s.rng.choice(
        (
            s.number(),
            s.number(100, 9999),
            round(s.rng.uniform(0, 100), 1),
            s.word(),
            s.name(),
            s.phrase(2, 3),
            s.maybe(0.5),
        )
    )
