"""Python functions as tools: signature and docstring to a schema, and the call itself."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

from docstring_parser import parse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import to_json

ToolFunction = Callable[..., Any]


class ToolError(Exception):
    """Raised by a tool to report what went wrong; the model reads its message as the result."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function with the model of its arguments."""

    function: ToolFunction
    name: str
    description: str
    arguments: type[BaseModel]

    @classmethod
    def of(cls, function: ToolFunction) -> Tool:
        """Raises TypeError for a signature that JSON cannot call: positional-only, *args or **kwargs."""
        if not inspect.isroutine(function):
            raise TypeError(f"{function!r} cannot be a tool: only functions and methods can")
        name = function.__name__
        docstring = parse(inspect.getdoc(function) or "")
        texts = [text for text in (docstring.short_description, docstring.long_description) if text]
        described = {param.arg_name: param.description for param in docstring.params}
        return cls(function, name, "\n\n".join(texts), _arguments_model(function, name, described))

    @property
    def definition(self) -> Any:
        """The tool as a chat request describes it."""
        schema = self.arguments.model_json_schema()
        schema.pop("title", None)
        for field in schema.get("properties", {}).values():
            field.pop("title", None)
        function: dict[str, Any] = {"name": self.name, "parameters": schema}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": function}

    def read(self, arguments: str) -> dict[str, Any]:
        """The keyword arguments of a call. Raises ToolError if they do not fit the signature."""
        try:
            read = self.arguments.model_validate_json(arguments or "{}")
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in error.errors())
            raise ToolError(f"invalid arguments: {problems}") from None
        return {name: getattr(read, name) for name in type(read).model_fields if name in read.model_fields_set}


def tool_definition(function: ToolFunction) -> Any:
    """Returns the `tools` entry for a function. Raises TypeError for a signature that JSON cannot call."""
    return Tool.of(function).definition


def result_text(result: Any) -> str:
    """What the model reads of a result: text as it is, anything else as JSON. Raises ToolError."""
    if isinstance(result, str):
        return result
    try:
        return to_json(result).decode()
    except ValueError as error:
        raise ToolError(f"the result is not JSON: {error}") from None


def failure_text(error: Exception) -> str:
    """What the model reads of an error."""
    message = str(error) if isinstance(error, ToolError) else f"{type(error).__name__}: {error}"
    return json.dumps({"error": message}, ensure_ascii=False)


def _arguments_model(function: ToolFunction, name: str, described: dict[str, str | None]) -> type[BaseModel]:
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"{name}: parameter {parameter} cannot be a tool's: only named parameters can")
        default = ... if parameter.default is parameter.empty else parameter.default
        kind = hints.get(parameter.name, Any)
        fields[parameter.name] = (kind, Field(default, description=described.get(parameter.name)))
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=False)
    return create_model(name, __config__=config, **fields)
