"""The entries of /openapi.json for bodies that the routes read themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """A route's `openapi_extra`: its body is a JSON object of this model."""
    schema = model.model_json_schema()
    inlined = _inlined(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined}}}}


def _inlined(value: Any, definitions: dict[str, Any]) -> Any:
    """The schema with its definitions inlined: `#/$defs` would refer to the root of the OpenAPI document."""
    if isinstance(value, list):
        return [_inlined(item, definitions) for item in value]
    if not isinstance(value, dict):
        return value
    name = value.get("$ref")
    if isinstance(name, str):
        return _inlined(definitions[name.removeprefix("#/$defs/")], definitions)
    return {key: _inlined(item, definitions) for key, item in value.items()}
