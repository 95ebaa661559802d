#!/usr/bin/env bash
# anthropic 2.14.0: the tool runner sends only new messages after the first turn; `temperature` is no argument.
#
# One would guess: `beta.messages.tool_runner` sends the whole conversation with each request, as `messages.create` does, and
# `messages.create` takes `temperature`, `top_p` and `top_k`, which the API has.
# Behaviour: the first request has `"thread": {"type": "create"}`. Each later one has `"thread": {"type": "continue", ...}` and the new
# messages alone, whatever the base URL: a server that ignores unknown fields sees a tool's result without its call.
# An error 400 whose details have the code `thread_unsupported_request` makes the runner send the whole conversation, then
# and later. The three sampling options are gone from the signature: `extra_body={"temperature": 0}` sends them.
# Source: anthropic-sdk-python, src/anthropic/lib/tools/ and resources/messages/messages.py.
#
# Output seen:
#   ignoring server: [('create', ['user']), ('continue', ['user'])]
#   refusing server: [('create', ['user']), (None, ['user']), (None, ['user', 'assistant', 'user'])]
#   sampling arguments: []
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q anthropic==2.14.0
cat >"$dir/show.py" <<'PY'
import inspect
import json

import anthropic
import httpx2 as httpx
from anthropic import beta_tool


@beta_tool
def add(a: int, b: int) -> str:
    """Adds two numbers."""
    return str(a + b)


def run(refuses: bool) -> list[tuple[str | None, list[str]]]:
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        thread = (body.get("thread") or {}).get("type")
        seen.append((thread, [message["role"] for message in body["messages"]]))
        if refuses and thread is not None:
            error = {"type": "invalid_request_error", "message": "no", "details": {"error_code": "thread_unsupported_request"}}
            return httpx.Response(400, json={"type": "error", "error": error})
        done = any(isinstance(m["content"], list) and m["content"][0]["type"] == "tool_result" for m in body["messages"])
        call = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1, "b": 2}}
        content = [{"type": "text", "text": "3"}] if done else [call]
        message = {
            "id": f"msg_{len(seen)}",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": content,
            "stop_reason": "end_turn" if done else "tool_use",
            "stop_sequence": None,
            "usage": {"input_tokens": 1, "output_tokens": 1},
        }
        return httpx.Response(200, json=message)

    client = anthropic.Anthropic(
        api_key="none", base_url="http://test", max_retries=0, http_client=httpx.Client(transport=httpx.MockTransport(answer))
    )
    ask = [{"role": "user", "content": "1 + 2?"}]
    client.beta.messages.tool_runner(model="m", max_tokens=100, tools=[add], messages=ask).until_done()
    return seen


ignoring, refusing = run(False), run(True)
parameters = inspect.signature(anthropic.resources.Messages.create).parameters
arguments = [name for name in ("temperature", "top_p", "top_k") if name in parameters]
print("ignoring server:", ignoring)
print("refusing server:", refusing)
print("sampling arguments:", arguments)
if (
    ignoring != [("create", ["user"]), ("continue", ["user"])]
    or refusing != [("create", ["user"]), (None, ["user"]), (None, ["user", "assistant", "user"])]
    or arguments
):
    raise SystemExit("the behaviour changed")
PY
"$dir/venv/bin/python" "$dir/show.py"
