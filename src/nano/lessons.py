"""The mixture of lessons, and the skills that are examined."""

from __future__ import annotations

from src.nano import basics, structured, tools
from src.nano.basics import Skill
from src.nano.examples import Example, Source

MIXTURE: tuple[tuple[Skill, float], ...] = (
    (basics.addition, 5.0),
    (basics.subtraction, 5.0),
    (basics.multiplication, 3.0),
    (basics.counting, 3.0),
    (basics.spelling, 8.0),
    (basics.reversing, 7.0),
    (basics.echo, 7.0),
    (basics.listing, 2.0),
    (basics.memory, 4.0),
    (basics.talk, 3.0),
    (basics.other, 3.0),
    (structured.json_object, 14.0),
    (tools.tool_call, 38.0),
    (tools.tool_result, 5.0),
    (tools.tool_not_needed, 5.0),
)
INSTRUCTIONS = (
    "You are a helpful assistant.", "You are a helpful assistant", "Answer in short.", "Be brief.", "You are a friendly assistant.",
    "You are a helpful assistant. Use the tools when they fit.", "Be concise and correct.", "You answer questions.",
)  # fmt: skip


def example(s: Source) -> Example:
    """One lesson of the mixture, sometimes under a system prompt."""
    skills, weights = zip(*MIXTURE, strict=True)
    return with_instructions(s, s.rng.choices(skills, weights)[0](s))


def with_instructions(s: Source, made: Example) -> Example:
    if s.maybe(0.2):
        text = (
            s.rng.choice(INSTRUCTIONS)
            if s.maybe(0.8)
            else f"You are {s.name()}, a {s.phrase(1, 3)} assistant."
        )
        made.messages.insert(0, {"role": "system", "content": text})
    return made
