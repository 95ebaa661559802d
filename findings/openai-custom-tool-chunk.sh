#!/usr/bin/env bash
# openai 3.52.0: a custom tool's call is typed in a whole chat answer, not in a stream's chunks.
#
# One would guess: chunks have the same two types of tool call as messages, `function` and `custom`.
# Behaviour: ChatCompletionMessage.tool_calls is a union of both, but a chunk's ChoiceDeltaToolCall.type is Literal["function"].
# A client with _strict_response_validation=True raises APIResponseValidationError on a stream in which a custom tool is
# called; without it the fields arrive untyped, as extras.
# Source: openai-python, src/openai/types/chat/chat_completion_chunk.py and chat_completion_message_tool_call.py.
#
# Output seen:
#   message: ['custom', 'function']
#   chunk: ['function']
#   strict client: APIResponseValidationError
#   default client: {'name': 'f', 'input': 'text'}
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q openai==3.52.0
cat >"$dir/show.py" <<'PY'
import json
import typing

import httpx2 as httpx
import openai
from openai.types.chat import ChatCompletionMessageToolCallUnion
from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall

union = typing.get_args(ChatCompletionMessageToolCallUnion)[0]
message = sorted(typing.get_args(member.model_fields["type"].annotation)[0] for member in typing.get_args(union))
chunk = [
    value
    for literal in typing.get_args(ChoiceDeltaToolCall.model_fields["type"].annotation)
    for value in typing.get_args(literal)
]
print("message:", message)
print("chunk:", chunk)

call = {"index": 0, "id": "c", "type": "custom", "custom": {"name": "f", "input": "text"}}
body = {
    "id": "a",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None, "logprobs": None}],
}
text = f"data: {json.dumps(body)}\n\ndata: [DONE]\n\n"
seen = []
for strict in (True, False):
    answer = httpx.MockTransport(lambda _: httpx.Response(200, text=text, headers={"content-type": "text/event-stream"}))
    client = openai.OpenAI(
        api_key="none", base_url="http://test/v1", http_client=httpx.Client(transport=answer), _strict_response_validation=strict
    )
    try:
        events = list(client.chat.completions.create(model="m", messages=[], stream=True))
        seen.append(events[0].choices[0].delta.tool_calls[0].custom)
    except openai.APIResponseValidationError as error:
        seen.append(type(error).__name__)
print("strict client:", seen[0])
print("default client:", seen[1])
if message != ["custom", "function"] or chunk != ["function"] or seen != ["APIResponseValidationError", call["custom"]]:
    raise SystemExit("the behaviour changed")
PY
"$dir/venv/bin/python" "$dir/show.py"
