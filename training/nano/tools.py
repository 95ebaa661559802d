"""Lessons with tools: choose one among several, fill its arguments from the prompt, answer from its result.

Some tools are everyday ones, some are made of a verb and a thing, and some have invented names, so that what is learnt
is to match words and to copy them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from gptoss.harmony.render import ReasoningEffort
from training.nano.attributes import ATTRIBUTES, another_attribute, attribute
from training.nano.basics import addition, assistant, memory, other, spelling, talk, user
from training.nano.categories import COMPARE, another_category, categorised
from training.nano.categories import DEEDS as CATEGORY_DEEDS
from training.nano.described import described, neighbour
from training.nano.everyday import everyday
from training.nano.examples import Example, Source
from training.nano.natural_tools import natural_tool
from training.nano.structured import Field, random_field
from training.nano.switches import switched
from training.nano.tasks import Task, add_unasked, definition, required_of
from training.nano.values import value_text

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
ATTRIBUTES_SHARE = 0.1  # of the tools of lessons
SWITCHES_SHARE = 0.03
CATEGORIES_SHARE = 0.1
NATURAL_TOOLS_SHARE = 0.75  # of the tools of natural lessons are natural themselves
MANY = 9  # tools at most; what a row has room for
DECISIVE = (" yes", " no")  # what is written behind a tool that was looked at
TOLD = " ="  # before the value of a parameter
OPENING: dict[ReasoningEffort, str] = {"low": "Tools:", "medium": "Which tool fits?", "high": "Which of the tools fits?"}  # fmt: skip


def invented(s: Source) -> Task:
    verb = s.pick(*VERBS) if s.maybe(0.6) else s.short_word()
    noun = s.word()
    name = s.pick(f"{verb}_{noun}", f"{verb}_{noun}", f"{verb}{noun.title()}", noun, f"{noun}_{verb}")
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
    properties = {f.name: f.schema for f in fields}
    required = required_of(s, properties, 1)
    add_unasked(s, properties)
    return Task(
        definition(s, name, description, properties, required), ask, {f.name: f.value for f in fields},
        tuple(s.word() for _ in range(2)),
    )  # fmt: skip


def _said(s: Source, fields: list[Field]) -> str:
    if not fields:
        return s.pick(".", "", "?")
    plain = not any(isinstance(f.value, bool) for f in fields)
    if plain and len(fields) == 1 and s.maybe(0.7):  # the key is in the definition alone
        return f" {s.pick('for', 'of', 'with', 'in', 'to')} {fields[0].shown}" + s.pick(".", "", "?")
    if plain and len(fields) == 2 and s.maybe(0.5):
        one, two = fields[0].shown, fields[1].shown
        pair = s.pick(f" from {one} to {two}", f" with {one} and {two}", f" for {one} in {two}", f" of {one}: {two}")
        return pair + s.pick(".", "", "?")
    parts = [f.said for f in fields]
    text = ", ".join(parts) if s.maybe(0.5) else " and ".join(parts)
    return s.pick(" with ", ": ", ", ", " where ") + text + s.pick(".", "", "?")


def any_task(s: Source) -> Task:
    if s.plain:
        return invented(s)
    if s.natural and s.maybe(NATURAL_TOOLS_SHARE):
        return natural_tool(s)
    if s.practice(ATTRIBUTES_SHARE):
        return attribute(s)
    if s.practice(SWITCHES_SHARE):
        return switched(s)
    if s.practice(CATEGORIES_SHARE):
        return categorised(s)
    return s.rng.choices((everyday, described, invented), (6, 5, 2))[0](s)


def _near(s: Source, task: Task) -> Task:
    """A tool like this one that the request does not mean."""
    what, of = task.made_of
    if what in CATEGORY_DEEDS or what == COMPARE:
        return another_category(s, what, of)
    if what in ATTRIBUTES:
        return another_attribute(s, what, of)
    return neighbour(s, task)


def offered(s: Source, task: Task, low: int = 1, high: int = 5) -> list[Task]:
    """The task among others that no request for one of them could mean."""
    tasks = [task]
    count = s.rng.randint(low, high)
    if task.made_of and count > 1 and s.maybe(0.5):
        near = _near(s, task)
        tasks += [near] if near.name != task.name else []
    kind = any_task
    if not s.plain and s.maybe(0.35):
        kind = described if task.made_of else everyday
    while len(tasks) < count:
        another = kind(s)
        if not any(another.confusable(t) for t in tasks):
            tasks.append(another)
    s.rng.shuffle(tasks)
    return tasks


def _definitions(tasks: list[Task]) -> list[dict[str, Any]]:
    return [t.definition for t in tasks]


def _looked_at(names: list[str], chosen: str | None) -> str:
    """One tool after the other until one fits: a name that was just copied stands close to the question whether it is
    meant, which is easier to learn than to point at one of them at once."""
    before = names if chosen is None else names[: names.index(chosen)]
    return ", ".join([n + DECISIVE[1] for n in before] + ([chosen + DECISIVE[0]] if chosen else []))


def _call_analysis(task: Task, tools: list[dict[str, Any]], effort: ReasoningEffort) -> str:
    """Every parameter is told, so that leaving one out is a decision of its own."""
    properties = task.definition.get("parameters", {}).get("properties", {})
    told = dict.fromkeys(properties, "none") | {key: value_text(value) for key, value in task.arguments.items()}
    looked_at = _looked_at([t["name"] for t in tools], task.name)
    values = ", ".join(f"{key}{TOLD} {value}" for key, value in told.items())
    text = f"{OPENING[effort]} {looked_at}" + (f": {values}" if values else "")
    if effort == "low":
        return text
    text += f". So I call {task.name}."
    if effort == "high":
        text += f" There are {len(tools)} tools; this one fits."
    return text


def tool_call(s: Source, *, count: int, kind: Callable[[Source], Task] = any_task) -> Example:
    task = kind(s)
    return _call(s, task, _definitions(offered(s, task, count, count)), s.effort())


def _call(s: Source, task: Task, tools: list[dict[str, Any]], effort: ReasoningEffort) -> Example:
    return Example(
        "tool_call", [user(task.ask)], effort, [_call_analysis(task, tools, effort)], call=(task.name, task.arguments), tools=tools,
    )  # fmt: skip


def same_tools(s: Source) -> list[Example]:
    """Conversations with the same tools on offer: each tool asked for once, then one that needs none, then results."""
    tasks = offered(s, any_task(s), 1, MANY if s.maybe(0.3) else 5)
    tools = _definitions(tasks)
    effort = s.effort()
    made = [_call(s, task, tools, effort) for task in tasks]
    for example in made:
        before = s.rng.random()
        if before < 0.08:
            earlier = s.rng.choice((addition, talk, spelling))(s)
            example.messages = [earlier.messages[-1], assistant(earlier.answer_text), *example.messages]
        elif before < 0.16:
            example.messages = [*_done_before(s, s.rng.choice(tasks)), *example.messages]
    if s.maybe(0.6) and not any(_may_answer(t.name) for t in tasks):
        made.append(_not_needed(s, tools, effort))
    made += [_answer(s, s.rng.choice(tasks), tools, effort) for _ in range(s.number(0, 2))]
    s.rng.shuffle(made)
    return made


def _done_before(s: Source, task: Task) -> list[dict[str, Any]]:
    """A turn in which a tool was called and its result told."""
    content, answer, _ = _result(s, task)
    return [user(task.ask), _called(task), _tool_message(content), assistant(answer)]


def _called(task: Task) -> dict[str, Any]:
    function = {"name": task.name, "arguments": json.dumps(task.arguments)}
    call = {"id": "call_1", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _tool_message(content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call_1", "content": content}


def tool_not_needed(s: Source) -> Example:
    """Tools are offered, and none fits."""
    tasks = offered(s, invented(s), 1, 4)
    return _not_needed(s, [t.definition for t in tasks if not _may_answer(t.name)], s.effort())


def _not_needed(s: Source, tools: list[dict[str, Any]], effort: ReasoningEffort) -> Example:
    told = json.dumps(tools).lower()
    while True:  # a lesson's reasoning is of its effort
        example = s.rng.choice((talk, talk, addition, spelling, memory, other))(s)
        asked = re.findall("[a-z]{4,}", example.messages[-1]["content"].lower())
        taken = any(word in told or word in EVERYDAY for word in asked)
        if example.effort == effort and not taken:
            example.tools = tools
            if tools:
                looked_at = _looked_at([t["name"] for t in tools], None)
                example.analysis.insert(0, f"{OPENING[effort]} {looked_at}. ")
            return example


# what there are tools for: with tools on offer no lesson leaves these to words
EVERYDAY = frozenset(("weather", "joke", "capital", "translate", "time", "meaning", "mean", "compare", "summarize", "recommend", "where"))  # fmt: skip
ANSWERING = ("add", "sum", "calc", "math", "subtract", "multipl", "divi", "difference", "minus", "product", "evaluate", "word",
             "spell", "letter", "text", "grammar", "fact", "quote", "contact", "user", "name", "person", "model", "help", "human",
             "search", "wiki", "look", "google", "query", "document", "knowledge", "quiz", "joke", "tell")  # fmt: skip


def _may_answer(tool_name: str) -> bool:
    """Whether a tool might be meant by small talk, a sum, a word to spell, a name to remember or any question."""
    return any(part in tool_name.lower() for part in ANSWERING)


def tool_result(s: Source) -> Example:
    """The result of a call has come: answer from it."""
    task = any_task(s)
    return _answer(s, task, _definitions(offered(s, task, 1, 4)), s.effort())


def _answer(s: Source, task: Task, tools: list[dict[str, Any]], effort: ReasoningEffort) -> Example:
    content, answer, expected = _result(s, task)
    analysis = answer if effort == "low" else f"The tool {task.name} says: {answer}"
    if effort == "high":
        analysis += " That answers the question."
    made = _called(task)
    if s.maybe(0.4):
        made["reasoning_content"] = _call_analysis(task, tools, effort)
    return Example(
        "tool_result", [user(task.ask), made, _tool_message(content)], effort, [analysis], [answer], tools=tools, expected=expected,
    )  # fmt: skip


def _result(s: Source, task: Task) -> tuple[str, str, list[str]]:
    """-> what the tool gives back, what is answered from it, and what a right answer holds."""
    keys = list(dict.fromkeys(task.results if s.maybe(0.6) else [s.word() for _ in range(s.number(1, 3))]))[
        : s.number(1, 3)
    ]
    values: dict[str, Any] = {k: _result_value(s) for k in keys}
    style = s.rng.random()
    if style < 0.65:
        answer = ", ".join(f"{k}: {value_text(v)}" for k, v in values.items()) + "."
        content = json.dumps(values, separators=(",", ":") if s.maybe(0.2) else None)
        return content, answer, [value_text(v) for v in values.values()]
    if style < 0.9:
        content = s.pick(s.phrase(1, 4), str(_result_value(s)), f"{s.number()} {s.word()} and {s.word()}", f"{s.number()}°C and {s.word()}",
                         f"{s.word()} is {s.number()}", f"{s.name()} {s.number()}")  # fmt: skip
        answer = content + ("" if content.endswith(".") else ".")
    else:
        items = [s.word() for _ in range(s.number(2, 4))]
        content, answer = json.dumps(items), ", ".join(items) + "."
    return content, f"The result is {answer}", [answer.rstrip(".")]


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
