"""Fields that request an output format.

They are `response_format`, and those of vLLM and llama.cpp with the same purpose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gptoss.api.http.errors import InvalidRequest
from gptoss.api.http.fields import SamplingFields, Strict, contract_error
from gptoss.generation.request import OutputFormat

NOT_SUPPORTED = ("grammar", "guided_grammar", "guided_whitespace_pattern", "structural_tag")
FIELDS = ("guided_json", "guided_regex", "guided_choice", "json_schema")
KINDS = ("json", "regex", "choice", "grammar", "json_object")  # of which `structured_outputs` has one
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
SchemaName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
FormatType = Literal["text", "json_object", "json_schema"]


class JsonSchemaFormat(Strict):
    name: SchemaName
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """`response_format` of chat, and of completions as an extension."""

    type: FormatType
    json_schema: JsonSchemaFormat | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None  # llama.cpp's form

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if self.schema_ is not None and (self.type == "text" or self.json_schema is not None):
            raise contract_error(
                "'response_format.schema' needs type 'json_object', or 'json_schema' without the field of that name.",
                "response_format.schema",
            )
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise contract_error(
                "Missing required parameter: 'response_format.json_schema'.",
                "response_format.json_schema",
                "missing_required_parameter",
            )
        return self

    @property
    def output_format(self) -> OutputFormat | None:
        """The format that the answer must follow; None for free text."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return named_format("response_format.schema", self.type, self.schema_)
        named = self.json_schema
        field = "response_format.json_schema.schema"
        return named_format(field, named.name, named.schema_, named.description, strict=bool(named.strict))


def named_format(
    field: str,
    name: str,
    schema: Mapping[str, Any] | None,
    description: str | None = None,
    *,
    strict: bool = False,
) -> OutputFormat:
    """JSON of a schema, or any object. `field`: of the schema in the request."""
    if schema is None and name == "json_object":
        description = "any JSON object"
    value = ANY_OBJECT if schema is None else schema
    return OutputFormat("json", value, field, ("response_format", name), name, description, strict)


def output_format(request: SamplingFields, own: OutputFormat | None) -> OutputFormat | None:
    """The format that a request asks for; `own`: by the endpoint's own field. None for free text.

    Raises InvalidRequest naming the field for two formats at once, or one that is not supported.
    """
    wanted = _wanted(request)
    names = [*(["response_format"] if own is not None else []), *wanted]
    if len(names) > 1:
        raise InvalidRequest(f"'{names[1]}' cannot be combined with '{names[0]}'.", names[1])
    for field, value in wanted.items():
        if request.ignore_eos:
            raise InvalidRequest(f"'{field}' cannot be combined with 'ignore_eos'.", field)
        return _read(field, value)
    return own


def _wanted(request: SamplingFields) -> dict[str, Any]:
    """The fields that ask for a format, and their values."""
    for field in NOT_SUPPORTED:
        value = getattr(request, field)
        if value is not None and (field, value) != ("grammar", ""):  # as llama.cpp's clients write none
            raise _not_supported(field)
    wanted = {field: getattr(request, field) for field in FIELDS if getattr(request, field) is not None}
    if request.structured_outputs is None:
        return wanted
    asked = {name.removesuffix("_"): value for name, value in request.structured_outputs}
    asked = {name: value for name, value in asked.items() if value is not None and value is not False}
    for name in asked:
        if name not in KINDS or name == "grammar":
            raise _not_supported(f"structured_outputs.{name}")
    if not asked:
        raise InvalidRequest(
            "'structured_outputs' needs one of 'json', 'regex', 'choice' and 'json_object'.",
            "structured_outputs",
            "missing_required_parameter",
        )
    return wanted | {f"structured_outputs.{name}": value for name, value in asked.items()}


def _not_supported(field: str) -> InvalidRequest:
    return InvalidRequest(f"'{field}' is not supported.", field, "unsupported_parameter")


def _read(field: str, value: Any) -> OutputFormat:
    kind = field.rpartition(".")[2].removeprefix("guided_")
    reported_as = (field.partition(".")[0], field)
    if kind == "regex" or kind == "choice":
        return OutputFormat("regex" if kind == "regex" else "choice", value, field, reported_as)
    if kind == "json_object":
        return OutputFormat("json", ANY_OBJECT, field, reported_as, kind, "any JSON object")
    return OutputFormat("json", _schema(field, value), field, reported_as, field.replace(".", "_"))


def _schema(field: str, value: Any) -> Mapping[str, Any]:
    """A schema, or its JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"'{field}' is not valid JSON: {error}.", field) from None
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"'{field}' must be a JSON schema, as an object or as its text.", field, "invalid_type")
    return value
