"""What the text of an answer must follow: `response_format`, and vLLM's and llama.cpp's fields of the same purpose."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptoss.api.chat.schema import JsonSchemaFormat, ResponseFormat
from gptoss.api.http.errors import InvalidRequest
from gptoss.api.http.fields import SamplingFields
from gptoss.harmony.conversation import ResponseSchema
from gptoss.harmony.grammar import choice_rule, grammar_error, json_rule, pattern_rule, text_grammar
from gptoss.harmony.schema.checks import SchemaError
from gptoss.harmony.schema.enforce import Enforced, enforceable

NOT_SUPPORTED = ("grammar", "guided_grammar", "guided_whitespace_pattern", "structural_tag")
FIELDS = ("guided_json", "guided_regex", "guided_choice", "json_schema")
KINDS = ("json", "regex", "choice", "grammar", "json_object")  # of which `structured_outputs` has one


@dataclass(frozen=True, slots=True)
class FinalFormat:
    """The format of the final message's text: JSON of a schema, or a rule of the grammar."""

    field: str  # of the request
    name: str
    shown: ResponseSchema | None = None  # in the developer message
    enforced: Enforced | None = None
    text_rule: str | None = None

    @property
    def rule(self) -> str:
        """In the language of the grammar."""
        if self.enforced is not None:
            return json_rule(self.enforced.schema)
        assert self.text_rule is not None
        return self.text_rule


def final_format(request: SamplingFields, response_format: ResponseFormat | None) -> FinalFormat | None:
    """None for free text. Raises InvalidRequest naming the field for what cannot be enforced."""
    wanted = _wanted(request, response_format)
    if len(wanted) > 1:
        first, second = list(wanted)[:2]
        raise InvalidRequest(f"'{second}' cannot be combined with '{first}'.", second)
    for field, value in wanted.items():
        if request.ignore_eos and field != "response_format":
            raise InvalidRequest(f"'{field}' cannot be combined with 'ignore_eos'.", field)
        kind = field.rpartition(".")[2].removeprefix("guided_")
        if kind == "response_format":
            return _of_response_format(value)
        if kind in ("json", "json_schema"):
            return _of_schema(field, field.replace(".", "_"), None, _read_schema(field, value))
        if kind == "json_object":
            return _of_schema(field, kind, "any JSON object", {"type": "object"})
        return _of_rule(field, choice_rule(value) if kind == "choice" else pattern_rule(value))
    return None


def _wanted(request: SamplingFields, response_format: ResponseFormat | None) -> dict[str, Any]:
    """The fields that ask for a format, and their values."""
    for field in NOT_SUPPORTED:
        value = getattr(request, field)
        if value is not None and (field, value) != ("grammar", ""):  # as llama.cpp's clients write none
            raise _not_supported(field)
    wanted: dict[str, Any] = {}
    if response_format is not None and response_format.type != "text":
        wanted["response_format"] = response_format
    for field in FIELDS:
        if getattr(request, field) is not None:
            wanted[field] = getattr(request, field)
    options = request.structured_outputs
    if options is None:
        return wanted
    for name, value in options:
        name = name.removesuffix("_")
        if value is None or value is False:
            continue
        if name not in KINDS or name == "grammar":
            raise _not_supported(f"structured_outputs.{name}")
        wanted[f"structured_outputs.{name}"] = value
    if not any(field.startswith("structured_outputs") for field in wanted):
        raise InvalidRequest(
            "'structured_outputs' needs one of 'json', 'regex', 'choice' and 'json_object'.",
            "structured_outputs",
            "missing_required_parameter",
        )
    return wanted


def _not_supported(field: str) -> InvalidRequest:
    return InvalidRequest(f"'{field}' is not supported.", field, "unsupported_parameter")


def _of_response_format(wanted: ResponseFormat) -> FinalFormat:
    named = wanted.json_schema or JsonSchemaFormat.model_validate({"name": wanted.type, "schema": wanted.schema_})
    inner = "schema" if wanted.json_schema is None else "json_schema.schema"
    description = named.description
    if named.schema_ is None and wanted.json_schema is None:
        description = "any JSON object"
    return _of_schema(
        f"response_format.{inner}",
        named.name,
        description,
        {"type": "object"} if named.schema_ is None else named.schema_,
        strict=bool(named.strict),
    )


def _of_schema(
    field: str, name: str, description: str | None, schema: Mapping[str, Any], *, strict: bool = False
) -> FinalFormat:
    try:
        enforced = enforceable(schema, strict)
    except SchemaError as error:
        place = f"response_format '{name}'" if field.startswith("response_format") else f"'{field}'"
        raise InvalidRequest(f"Invalid schema for {place}: {error}", field, "invalid_json_schema") from None
    return FinalFormat(field, name, ResponseSchema(name, schema, description), enforced)


def _read_schema(field: str, value: Any) -> Mapping[str, Any]:
    """A schema, or its JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"'{field}' is not valid JSON: {error}.", field) from None
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"'{field}' must be a JSON schema, as an object or as its text.", field, "invalid_type")
    return value


def _of_rule(field: str, rule: str) -> FinalFormat:
    problem = grammar_error(text_grammar(rule))
    if problem is not None:
        raise InvalidRequest(f"'{field}' cannot be enforced: {_reason(problem)}.", field)
    return FinalFormat(field, field.replace(".", "_"), text_rule=rule)


def _reason(problem: str) -> str:
    """The regular expression's fault, without the lines of the grammar that it stands in."""
    lines = problem.splitlines()
    for line in lines:
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    if "lexer error" in lines[0]:
        return "the pattern ends within an escape"
    return lines[0].rpartition("(in regex): ")[2]


def asks_for_format(request: SamplingFields) -> bool:
    """Whether `final_format` has to look; compiling a schema takes a while."""
    fields: Sequence[str] = (*NOT_SUPPORTED, *FIELDS)
    return request.structured_outputs is not None or any(getattr(request, field) is not None for field in fields)
