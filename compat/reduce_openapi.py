"""Makes compat/openai.yaml: the requests of OpenAI's specification that this server serves, and nothing else of it.

python compat/reduce_openapi.py openapi.json     # of github.com/openai/openai-openapi (MIT)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

OUT = Path(__file__).with_name("openai.yaml")
SERVED = {
    "/chat/completions": ("post",),
    "/completions": ("post",),
    "/models": ("get",),
    "/models/{model}": ("get",),
    "/responses": ("post",),
    "/responses/{response_id}": ("get", "delete"),
    "/responses/{response_id}/input_items": ("get",),
    "/responses/input_tokens": ("post",),
}
# any other model is a 404 that hides what comes after
MODEL = {"type": "string", "const": "gpt-oss-nano"}
# with these nearly every request would be a 400
REFUSED = ("background", "conversation", "previous_response_id")
SAID_TO_PEOPLE = ("description", "summary", "title", "example", "examples", "deprecated")


def main(source: Path) -> None:
    spec: dict[str, Any] = json.loads(source.read_text())
    paths = {
        path: {method: _request(spec["paths"][path][method]) for method in methods} for path, methods in SERVED.items()
    }
    schemas: dict[str, Any] = {}
    _collect(paths, spec["components"]["schemas"], schemas)
    reduced = {
        "openapi": spec["openapi"],
        "info": {"title": "OpenAI API, reduced", "version": spec["info"]["version"]},
        "paths": paths,
        "components": {"schemas": dict(sorted(schemas.items()))},
    }
    OUT.write_text(yaml.safe_dump(reduced, width=160, sort_keys=False))
    sys.stdout.write(f"{OUT.name}: {len(schemas)} schemas, {OUT.stat().st_size} bytes\n")


def _request(operation: dict[str, Any]) -> dict[str, Any]:
    kept = {name: _bare(operation[name]) for name in ("parameters", "requestBody") if name in operation}
    return {"operationId": operation["operationId"], **kept, "responses": {"default": {"description": "Any."}}}


def _bare(part: Any) -> Any:
    """Without what is for people and OpenAI's own tools, without REFUSED, and with MODEL for every model."""
    if isinstance(part, list):
        return [_bare(each) for each in part]
    if not isinstance(part, dict):
        return part
    made = {}
    for key, value in part.items():
        if key == "properties":  # their names may be those of what is left out
            made[key] = {
                name: dict(MODEL) if name == "model" else _bare(schema)
                for name, schema in value.items()
                if name not in REFUSED
            }
        elif key not in SAID_TO_PEOPLE and not key.startswith("x-"):
            made[key] = _bare(value)
    return made


def _collect(part: Any, schemas: dict[str, Any], found: dict[str, Any]) -> None:
    """All schemas that are referred to."""
    if isinstance(part, list):
        for each in part:
            _collect(each, schemas, found)
    elif isinstance(part, dict):
        name = str(part.get("$ref", "")).removeprefix("#/components/schemas/")
        if name in schemas and name not in found:
            found[name] = _bare(schemas[name])
            _collect(found[name], schemas, found)
        for value in part.values():
            _collect(value, schemas, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
