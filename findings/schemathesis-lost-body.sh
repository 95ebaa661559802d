#!/usr/bin/env bash
# fastapi 0.165.0, pydantic 2.14.3 and schemathesis 4.32.5: a model's schema in openapi_extra costs the request its body.
#
# One would guess: `openapi_extra={"requestBody": ... Model.model_json_schema()}`, the form in FastAPI's guide, documents the
# body for nested models too; and if a reference in it leads nowhere, a tool that generates requests from it fails.
# Behaviour: model_json_schema() writes `#/$defs/Item` for a nested model. Inside an OpenAPI document `#` is the root of
# that document, which has no $defs, so the reference leads nowhere. FastAPI embeds it as it is. Schemathesis
# then drops the *required* body without an error: its positive cases are requests without a body, and the negative
# strategy is unsatisfiable. Without the nested model, or with the definitions inlined, the body is there.
# Source: schemathesis, specs/openapi/adapter/parameters.py (_is_skippable); the operation lists it in skipped_parameters.
#
# Output seen:
#   /flat    valid cases with a body: 5 of 5; skipped references: []
#   /nested  valid cases with a body: 0 of 1; skipped references: ['#/$defs/Item']
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q fastapi==0.165.0 pydantic==2.14.3 schemathesis==4.32.5 hypothesis==6.170.15
cat >"$dir/show.py" <<'PY'
import schemathesis
from fastapi import FastAPI, Request
from hypothesis import HealthCheck, Phase, given, settings
from pydantic import BaseModel
from schemathesis.core import NotSet


class Item(BaseModel):
    name: str


class Order(BaseModel):
    items: list[Item]


app = FastAPI()


def add(path, model):
    body = {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}

    @app.post(path, openapi_extra={"requestBody": body})
    async def endpoint(request: Request):
        return {}


add("/flat", Item)
add("/nested", Order)
schema = schemathesis.openapi.from_asgi("/openapi.json", app)


def bodies(operation):
    found = []

    @settings(max_examples=5, phases=[Phase.generate], database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy())
    def collect(case):
        found.append(not isinstance(case.body, NotSet))

    collect()
    return found


seen = {}
for path in ("/flat", "/nested"):
    operation = schema[path]["post"]
    found = bodies(operation)
    skipped = [parameter.reference for parameter in operation.skipped_parameters]
    seen[path] = (all(found), any(found), skipped)
    print(f"{path:<8} valid cases with a body: {sum(found)} of {len(found)}; skipped references: {skipped}")
expected = {"/flat": (True, True, []), "/nested": (False, False, ["#/$defs/Item"])}
raise SystemExit(0 if seen == expected else "the behaviour changed")
PY
"$dir/venv/bin/python" "$dir/show.py"
