"""The mixture of lessons, and the skills that are examined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training.nano import basics, structured, tools
from training.nano.basics import Skill
from training.nano.examples import Example, Source

TOOLS_SHARE = 0.4  # of draws; each is a row of its own
NATURAL_SHARE = 0.85  # of the lessons, once they are all there
PLAIN_SHARE = 0.85  # while lessons are plain
MIXTURE: tuple[tuple[Skill, float], ...] = (
    (basics.addition, 16.0),
    (basics.subtraction, 8.0),
    (basics.multiplication, 10.0),
    (basics.counting, 5.0),
    (basics.spelling, 9.0),
    (basics.reversing, 9.0),
    (basics.echo, 8.0),
    (basics.listing, 3.0),
    (basics.memory, 3.0),
    (basics.talk, 4.0),
    (basics.other, 3.0),
    (structured.json_object, 14.0),
    (structured.json_array, 10.0),
)
INSTRUCTIONS = (
    "You are a helpful assistant.", "You are a helpful assistant", "Answer in short.", "Be brief.", "You are a friendly assistant.",
    "You are a helpful assistant. Use the tools when they fit.", "Be concise and correct.", "You answer questions.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Plain lessons until step `begin`, in which tools are asked for with the words of their names; by step `end` all
    kinds.

    Natural tools are few enough to be known by heart, and a network of random weights learns them so. That a tool fits
    whose words are in the request has to be learnt first.
    """

    begin: int = 0
    end: int = 0

    def ready(self, step: int) -> float:
        """-> 0 while lessons are plain, 1 when all kinds are there, as in those before the first that only count
        tokens."""
        if step >= self.end or step < 0:
            return 1.0
        return max(0.0, (step - self.begin) / (self.end - self.begin))


ALL_KINDS = Curriculum()  # from the first step on


def lesson(s: Source, natural_share: float = NATURAL_SHARE, plain_share: float = 0.0) -> list[Example]:
    """Conversations that may share a row: several with the same tools, or one of the mixture; sometimes under a system
    prompt."""
    s.natural = not s.unseen and s.maybe(natural_share)
    s.plain = s.maybe(plain_share)
    if s.maybe(TOOLS_SHARE):
        made = tools.same_tools(s)
    else:
        skills, weights = zip(*MIXTURE, strict=True)
        made = [s.rng.choices(skills, weights)[0](s)]
    system = instructions(s)
    for example in made:
        example.messages = [*system, *example.messages]
    return made


def instructions(s: Source) -> list[dict[str, Any]]:
    """A system prompt, in one of five conversations."""
    if not s.maybe(0.2):
        return []
    text = s.rng.choice(INSTRUCTIONS) if s.maybe(0.8) else f"You are {s.name()}, a {s.phrase(1, 3)} assistant."
    return [{"role": "system", "content": text}]
