#!/usr/bin/env bash
# mcp 2.3.0: a client over streamable HTTP has no session, unless it asks for the older protocol.
#
# One would guess: a client that stays connected has a session, whose id (`mcp-session-id`) each request carries, so that a server can
# keep state by it; and a tool that is added while the server runs is announced to the clients.
# Behaviour: the protocol that `Client` negotiates by default has no sessions: each request stands alone, without that header. Only
# `mode="legacy"` has it. State has to travel in an argument, or be kept elsewhere. `add_tool` sends no `tools/list_changed`: a client
# that only listens does not learn of the tool, one that lists again does.
# Source: mcp/client/client.py and mcp/server/mcpserver/server.py of the wheel.
#
# Output seen:
#   session ids by default: [None, None]; in legacy mode: one id
#   announced: False; listed again: True
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q mcp==2.3.0
cat >"$dir/show.py" <<'PY'
import asyncio
import logging
import socket
import sys
import threading
import time

import uvicorn
from mcp import Client
from mcp.server.mcpserver import Context, MCPServer

logging.disable(logging.WARNING)
server = MCPServer("finding")


@server.tool()
def session(ctx: Context) -> str:
    """The session id of the request."""
    return str(ctx.headers.get("mcp-session-id"))


@server.tool()
def grow() -> str:
    """Adds a tool."""
    server.add_tool(lambda: "new", name="new", description="New.")
    return "added"


bound = socket.socket()
bound.bind(("127.0.0.1", 0))
bound.listen()
running = uvicorn.Server(uvicorn.Config(server.streamable_http_app(), log_level="critical"))
threading.Thread(target=running.run, args=([bound],), daemon=True).start()
while not running.started:
    time.sleep(0.05)
url = f"http://127.0.0.1:{bound.getsockname()[1]}/mcp"


async def ids(**options):
    async with Client(url, **options) as client:
        return [(await client.call_tool("session", {})).content[0].text for _ in range(2)]


async def announced():
    seen = []

    async def on_message(message):
        seen.append(repr(message))

    async with Client(url, message_handler=on_message) as client:
        await client.call_tool("grow", {})
        await asyncio.sleep(1)
        names = {tool.name for tool in (await client.list_tools()).tools}
    return any("list_changed" in message for message in seen), "new" in names


default, legacy = asyncio.run(ids()), asyncio.run(ids(mode="legacy"))
was_announced, is_listed = asyncio.run(announced())
same = len(set(legacy)) == 1 and legacy[0] != "None"
print(f"session ids by default: [{', '.join(default)}]; in legacy mode: {'one id' if same else legacy}")
print(f"announced: {was_announced}; listed again: {is_listed}")
running.should_exit = True
if (default, same, was_announced, is_listed) != (["None", "None"], True, False, True):
    sys.exit("the behaviour changed")
PY
"$dir/venv/bin/python" "$dir/show.py"
