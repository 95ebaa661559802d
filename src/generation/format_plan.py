"""An output format, compiled to what the grammar enforces and what the prompt shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptoss.generation.errors import GenerationError
from gptoss.generation.relaxed_schema import RelaxedSchema
from gptoss.generation.request import OutputFormat
from gptoss.harmony.conversation import ResponseSchema
from gptoss.harmony.grammar import begin_error, choice_rule, grammar_error, json_rule, pattern_rule, text_grammar
from gptoss.harmony.schema.checks import SchemaError
from gptoss.harmony.schema.enforce import enforceable


@dataclass(frozen=True, slots=True)
class FormatPlan:
    """The format of the final message's text: JSON of a schema, or a rule of the grammar."""

    shown: ResponseSchema | None = None  # in the developer message
    schema: Mapping[str, Any] | None = None
    text_rule: str | None = None
    relaxed: tuple[RelaxedSchema, ...] = ()

    @property
    def rule(self) -> str:
        """The rule in the language of the grammar; any text if there is no format."""
        if self.schema is not None:
            return json_rule(self.schema)
        return self.text_rule or "TEXT"


FREE_TEXT = FormatPlan()


def plan_format(wanted: OutputFormat | None) -> FormatPlan:
    """The plan of an output format. Raises GenerationError for what cannot be enforced."""
    if wanted is None:
        return FREE_TEXT
    if wanted.kind == "json":
        return _of_schema(wanted)
    rule = choice_rule(wanted.value) if wanted.kind == "choice" else pattern_rule(wanted.value)
    problem = grammar_error(text_grammar(rule))
    if problem is not None:
        raise GenerationError(
            f"'{wanted.field}' cannot be enforced: {_reason(problem)}.", ("output_format", wanted.field)
        )
    problem = begin_error(f"start: {rule}") if wanted.kind == "regex" else None
    if problem is not None:
        raise GenerationError(f"'{wanted.field}' cannot be enforced: {problem}.", ("output_format", wanted.field))
    return FormatPlan(text_rule=rule)


def _of_schema(wanted: OutputFormat) -> FormatPlan:
    try:
        enforced = enforceable(wanted.value, wanted.strict)
    except SchemaError as error:
        message = f"Invalid schema for '{wanted.field}': {error}"
        raise GenerationError(message, ("output_format", wanted.field), "invalid_json_schema") from None
    shown = ResponseSchema(wanted.name, wanted.value, wanted.description)
    relaxed = tuple(RelaxedSchema(*wanted.reported_as, one) for one in enforced.relaxed)
    return FormatPlan(shown, enforced.schema, relaxed=relaxed)


def _reason(problem: str) -> str:
    """The fault of the regular expression, without the lines of the grammar around it."""
    lines = problem.splitlines()
    for line in lines:
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    if "lexer error" in lines[0]:
        return "the pattern ends within an escape"
    return lines[0].rpartition("(in regex): ")[2]
