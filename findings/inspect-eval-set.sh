#!/usr/bin/env bash
# inspect-ai 0.3.285: an interrupted `eval_set` returns success without a log; tools are sent as strict.
#
# One would guess: after ctrl-C, `eval_set` raises KeyboardInterrupt or returns False, as it documents the first value as whether all
# tasks completed; a tool's definition goes to an OpenAI-compatible server as the task wrote it.
# Behaviour: after SIGINT it returns (True, []), while the log on disk has the status "cancelled": a caller that trusts the first value
# reports an unfinished run as done. The provider `openai-api` adds `"strict": true` to every tool, whatever its schema, and a server that
# checks strict schemas refuses requests that it would take without; the model argument `strict_tools=False` ends that.
# Source: inspect_ai/_eval/evalset.py and inspect_ai/model/_providers/openai_compatible.py of the wheel.
#
# Output seen:
#   eval_set returned True with 0 logs; the log's status: cancelled
#   strict in the request: True, with strict_tools=False: False
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q inspect-ai==0.3.285 openai==3.57.0
cat >"$dir/show.py" <<'PY'
import asyncio
import json
import os
import signal
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from inspect_ai import Task, eval_set
from inspect_ai.dataset import Sample
from inspect_ai.log import list_eval_logs, read_eval_log
from inspect_ai.model import get_model
from inspect_ai.solver import solver
from inspect_ai.tool import ToolInfo


@solver
def waits():
    async def solve(state, generate):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        await asyncio.sleep(60)
        return state

    return solve


folder = tempfile.mkdtemp()
success, logs = eval_set(
    Task(dataset=[Sample(input="x")], solver=waits()), log_dir=folder, model="mockllm/model", display="none", retry_attempts=0
)
(info,) = list_eval_logs(folder)
status = read_eval_log(info).status
print(f"eval_set returned {success} with {len(logs)} logs; the log's status: {status}")

seen = []


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        seen.append(body["tools"][0]["function"].get("strict"))
        message = {"role": "assistant", "content": "hi"}
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
        answer["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_address[1]}/v1"


async def ask():
    for more in ({}, {"strict_tools": False}):
        model = get_model("openai-api/local/m", base_url=url, api_key="none", memoize=False, **more)
        await model.generate("hi", tools=[ToolInfo(name="f", description="a function")])


asyncio.run(ask())
print(f"strict in the request: {seen[0]}, with strict_tools=False: {seen[1]}")
if (success, len(logs), status, seen) != (True, 0, "cancelled", [True, False]):
    sys.exit("the behaviour changed")
PY
"$dir/venv/bin/python" "$dir/show.py"
