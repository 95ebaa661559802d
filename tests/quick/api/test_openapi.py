"""/openapi.json has JSON Schema keywords only, lists each endpoint once, and says what it accepts and answers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import pytest
from jsonschema import Draft202012Validator

from gptoss.api.app import ROUTERS
from gptoss.api.http.openapi import OPENAI_ERROR, DocumentedApi, error_responses

KEYWORDS = {
    "$ref",
    "additionalProperties",
    "anyOf",
    "const",
    "default",
    "description",
    "enum",
    "exclusiveMinimum",
    "items",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "not",
    "oneOf",
    "pattern",
    "properties",
    "propertyNames",
    "required",
    "title",
    "type",
}
TEXT = ("/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
OTHER_TYPES = {path: {"text/plain"} for path in TEXT} | {"/v1/files/{file_id}/content": {"application/octet-stream"}}
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")


@cache
def document() -> dict[str, Any]:
    app = DocumentedApi(responses=error_responses(OPENAI_ERROR))
    for router in ROUTERS:
        app.include_router(router)
    return app.openapi()


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def body(path: str) -> dict[str, Any]:
    content = document()["paths"][path]["post"]["requestBody"]["content"]
    return cast(dict[str, Any], content["application/json"]["schema"])


def accepts(path: str, value: dict[str, Any]) -> bool:
    return bool(Draft202012Validator(body(path)).is_valid(value))


def schemas(value: Any) -> Iterator[dict[str, Any]]:
    """The schemas in a part of the document, outermost ones."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "schema":
                yield item
            else:
                yield from schemas(item)
    elif isinstance(value, list):
        for item in value:
            yield from schemas(item)


def keywords(schema: Any) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    yield from schema
    for key in ("items", "additionalProperties", "propertyNames"):
        yield from keywords(schema.get(key))
    for inner in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("properties", {}).values()):
        yield from keywords(inner)


def test_schemas_have_json_schemas_keywords_only() -> None:
    found = [*schemas(document()["paths"])]
    assert len(found) > 50
    for schema in found:
        Draft202012Validator.check_schema(schema)
        assert set(keywords(schema)) <= KEYWORDS


def test_each_endpoint_is_listed_once() -> None:
    listed = [(method, path.removeprefix("/v1")) for method, path, _ in operations()]
    assert len(listed) == len(set(listed)) > 15
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(ids) == len(set(ids))
    assert "/v1/messages/batches" not in document()["paths"]


@pytest.mark.parametrize(
    ("path", "field", "bounds"),
    [
        ("/v1/chat/completions", "temperature", {"minimum": 0, "maximum": 2}),
        ("/v1/messages", "temperature", {"minimum": 0, "maximum": 1}),
        ("/v1/responses", "repetition_penalty", {"exclusiveMinimum": 0, "maximum": 2}),
        ("/v1/completions", "presence_penalty", {"minimum": -2, "maximum": 2}),
    ],
)
def test_numbers_have_their_bounds(path: str, field: str, bounds: dict[str, int]) -> None:
    number, null = body(path)["properties"][field]["anyOf"]
    assert number == {"type": "number"} | bounds
    assert null == {"type": "null"}


USER = {"role": "user", "content": "Hi"}
CHAT = {"model": "m", "messages": [USER]}
RESPONSE = {"model": "m", "input": "Hi"}
COMPLETION = {"model": "m", "prompt": "Hi"}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "1"}]}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("/tokenize", {"prompt": "Hi"}),
        ("/tokenize", {"messages": [USER]}),
        ("/v1/responses/input_tokens", {"input": "Hi"}),
        ("/v1/responses", RESPONSE | {"input": [USER, CALL, OUTPUT, {"type": "web_search_call", "id": "w"}]}),
        ("/v1/responses", RESPONSE | {"tool_choice": {"type": "function", "name": "f"}}),
        ("/v1/responses", RESPONSE | {"tool_choice": {"type": "shell"}}),
        ("/v1/completions", COMPLETION),
        ("/v1/completions", COMPLETION | {"prompt": ["a", "b"]}),
        ("/v1/completions", COMPLETION | {"prompt": [1, 2]}),
        ("/v1/completions", COMPLETION | {"prompt": [[1], [2]]}),
        ("/v1/chat/completions", CHAT | {"stop": "."}),
        ("/v1/chat/completions", CHAT | {"stop": ["."]}),
        ("/v1/chat/completions", CHAT | {"stop": None, "tool_choice": None}),
        ("/v1/chat/completions", CHAT | {"messages": [USER | {"content": [{"type": "text", "text": "Hi"}]}]}),
        ("/v1/chat/completions", CHAT | {"messages": [USER, {"role": "assistant", "content": None}]}),
        ("/v1/chat/completions", CHAT | {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
        (
            "/v1/chat/completions",
            CHAT
            | {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]},
                }
            },
        ),
        ("/v1/chat/completions", CHAT | {"function_call": {"name": "f"}, "logit_bias": {"1": -100}}),
    ],
)
def test_schemas_accept_what_the_endpoints_accept(path: str, value: dict[str, Any]) -> None:
    assert accepts(path, value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("/tokenize", {}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/responses", RESPONSE | {"input": 1}),
        ("/v1/responses", RESPONSE | {"input": [{"type": "function_call"}]}),
        ("/v1/completions", {"model": "m"}),
        ("/v1/completions", COMPLETION | {"prompt": None}),
        ("/v1/completions", COMPLETION | {"prompt": [1, "a"]}),
        ("/v1/chat/completions", CHAT | {"stop": ""}),
        ("/v1/chat/completions", CHAT | {"temperature": 3}),
        ("/v1/chat/completions", CHAT | {"messages": [USER | {"content": 1}]}),
        ("/v1/chat/completions", CHAT | {"messages": [USER | {"content": [{"type": "image_url"}]}]}),
        ("/v1/chat/completions", CHAT | {"messages": [USER | {"role": "nobody"}]}),
        ("/v1/chat/completions", CHAT | {"tool_choice": "f"}),
        ("/v1/chat/completions", CHAT | {"logit_bias": {"a": 1}}),
        ("/v1/chat/completions", CHAT | {"metadata": {str(i): "" for i in range(17)}}),
    ],
)
def test_schemas_refuse_what_the_endpoints_refuse(path: str, value: dict[str, Any]) -> None:
    assert not accepts(path, value)


def test_answers() -> None:
    for method, path, operation in operations():
        answers = operation["responses"]
        streams = method == "post" and path in GENERATING
        types = {"application/json", "text/event-stream"} if streams else {"application/json"}
        types = OTHER_TYPES.get(path, types)
        assert set(answers["200"]["content"]) == types, path
        assert "422" not in answers
        error = answers["4XX"]["content"]["application/json"]["schema"]
        assert ("request_id" in error["properties"]) == path.startswith("/v1/messages"), path
    assert "HTTPValidationError" not in document().get("components", {}).get("schemas", {})


def test_query_parameters() -> None:
    def of(path: str) -> dict[str, Any]:
        parameters = document()["paths"][path]["get"]["parameters"]
        return {one["name"]: one["schema"] for one in parameters if one["in"] == "query"}

    assert of("/v1/responses/{response_id}")["stream"]["type"] == "boolean"
    items = of("/v1/responses/{response_id}/input_items")
    assert (items["limit"]["minimum"], items["limit"]["maximum"], items["limit"]["default"]) == (1, 100, 20)
    assert items["order"]["enum"] == ["asc", "desc"]
    assert items["after"] == {"type": "string", "title": "After"}


def test_keys() -> None:
    found = document()
    schemes = found["components"]["securitySchemes"]
    assert {scheme.get("scheme") or scheme["name"] for scheme in schemes.values()} == {"bearer", "x-api-key", "api-key"}
    assert {name for one in found["security"] for name in one} == set(schemes)
    open_paths = {path for _, path, operation in operations() if operation.get("security") == []}
    assert open_paths == {"/health", "/ready"}
