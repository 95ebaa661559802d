"""Parts of /openapi.json that FastAPI cannot derive: bodies, query parameters, errors, API keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel

from gptoss.api.http.paths import ALWAYS_OPEN

Schema = dict[str, Any]
_WHEN = {"description": "Required if the server has API keys."}
_KEYS: Schema = {
    "bearer": {"type": "http", "scheme": "bearer"} | _WHEN,
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"} | _WHEN,
    "api-key": {"type": "apiKey", "in": "header", "name": "api-key"} | _WHEN,
}
_STRING: Schema = {"type": "string"}
_NULLABLE: Schema = {"type": ["string", "null"]}


class DocumentedApi(FastAPI):
    """An app whose /openapi.json has the bodies of json_body, and the headers of API keys."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._routers: list[APIRouter] = []  # an app's own list of routes does not have those of its routers

    def include_router(self, router: APIRouter, **options: Any) -> None:
        self._routers.append(router)
        super().include_router(router, **options)

    def openapi(self) -> Schema:
        if self.openapi_schema is None:
            for router in self._routers:
                for route in router.routes:
                    if isinstance(route, APIRoute) and route.openapi_extra:
                        _write_schema(route.openapi_extra)
        schema = super().openapi()
        if "security" not in schema:
            schema.setdefault("components", {})["securitySchemes"] = _KEYS
            schema["security"] = [{name: []} for name in _KEYS]
            for path in ALWAYS_OPEN & schema["paths"].keys():
                schema["paths"][path]["get"]["security"] = []
        return schema


@dataclass(frozen=True, slots=True)
class Body:
    """A model with what an endpoint changes of its schema."""

    model: type[BaseModel]
    required: Sequence[str] = ()  # fields that the endpoint, unlike the model, requires
    optional: Sequence[str] = ()  # fields that the endpoint, unlike the model, does not require
    fields: Callable[[], Mapping[str, Schema]] = dict  # schemas of fields that the model leaves untyped

    def schema(self) -> Schema:
        """The schema, without references."""
        schema = inlined(self.model.model_json_schema())
        names = [name for name in schema.get("required", ()) if name not in self.optional]
        schema["required"] = [*names, *self.required]
        schema["properties"] |= self.fields()
        for name in self.required:
            schema["properties"][name].pop("default", None)
        return schema


def json_body(*bodies: type[BaseModel] | Body, streams: bool = False) -> Schema:
    """A route's `openapi_extra`: its body is a JSON object of one of these models.

    The schema is written when a DocumentedApi is first asked for it: all of them together take 0.1 s.
    `streams`: whether the answer may be server-sent events.
    """
    known = [body if isinstance(body, Body) else Body(body) for body in bodies]
    extra: Schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": known}}}}
    if streams:
        extra["responses"] = {"200": {"content": {"text/event-stream": {"schema": _STRING}}}}
    return extra


def _write_schema(extra: Schema) -> None:
    """Replaces the bodies of a json_body by their schema."""
    json = extra.get("requestBody", {}).get("content", {}).get("application/json", {})
    bodies = json.get("schema")
    if isinstance(bodies, list):
        schemas = [body.schema() for body in bodies]
        json["schema"] = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def query(model: type[BaseModel]) -> Schema:
    """A route's `openapi_extra`: the fields of the model are its query parameters."""
    schema = Body(model).schema()
    return {
        "parameters": [
            {"name": name, "in": "query", "required": name in schema["required"], "schema": _without_null(value)}
            for name, value in schema["properties"].items()
        ]
    }


def _without_null(field: Schema) -> Schema:
    return {key: value for key, value in field.items() if (key, value) != ("default", None)}


def error_responses(error: Schema) -> dict[int | str, Schema]:
    """The `responses` of routes that answer every error with this schema."""
    answer = {"content": {"application/json": {"schema": error}}}
    return {
        "4XX": {"description": "The request's error"} | answer,
        "5XX": {"description": "The server's error"} | answer,
    }


def object_of(fields: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """The schema of an object that has `fields`, all of them required, and may have the `optional` ones."""
    return {"type": "object", "required": [*fields], "properties": {**fields, **(optional or {})}}


def parts_schema(allowed: Mapping[str, str]) -> Schema:
    """The schema of an array of content parts. `allowed`: type -> field with the text."""
    parts = [object_of({"type": {"const": kind}, field: _STRING}) for kind, field in allowed.items()]
    return {"type": "array", "items": parts[0] if len(parts) == 1 else {"anyOf": parts}}


OPENAI_ERROR = object_of(
    {"error": object_of({"message": _STRING, "type": _STRING, "param": _NULLABLE, "code": _NULLABLE})}
)
ANTHROPIC_ERROR = object_of(
    {
        "type": {"const": "error"},
        "error": object_of({"type": _STRING, "message": _STRING}, {"details": {"type": "object"}}),
        "request_id": _NULLABLE,
    }
)


def inlined(schema: Schema) -> Schema:
    """The schema with its definitions inlined: `#/$defs` would refer to the root of the OpenAPI document."""
    definitions = schema.get("$defs", {})
    whole: Schema = _inlined({key: value for key, value in schema.items() if key != "$defs"}, definitions)
    return whole


def _inlined(value: Any, definitions: Schema) -> Any:
    if isinstance(value, list):
        return [_inlined(item, definitions) for item in value]
    if not isinstance(value, dict):
        return value
    name = value.get("$ref")
    if isinstance(name, str):
        return _inlined(definitions[name.removeprefix("#/$defs/")], definitions)
    return {key: _inlined(item, definitions) for key, item in value.items()}
