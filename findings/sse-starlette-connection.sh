#!/usr/bin/env bash
# sse-starlette 3.7.0 on uvicorn 0.54.0: a stream has two contradictory Connection headers, depending on the HTTP parser.
#
# One would guess: a client that sends `Connection: close` gets one `Connection: close` back from a stream, with both of
# uvicorn's parsers.
# Behaviour: EventSourceResponse always sets `Connection: keep-alive` itself. uvicorn's httptools protocol adds
# `connection: close` beside it, so the client reads "keep-alive" first and then loses the connection; its h11 protocol
# leaves one header, `Connection: close`. Starlette's own StreamingResponse has one header with both.
# Source: sysid/sse-starlette, sse_starlette/sse.py (_headers["Connection"]); uvicorn/protocols/http/httptools_impl.py.
#
# Output seen:
#   httptools  /sse    connection: ['keep-alive', 'close']
#   httptools  /plain  connection: ['close']
#   h11        /sse    connection: ['close']
#   h11        /plain  connection: ['close']
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q sse-starlette==3.7.0 starlette==1.10.0 uvicorn==0.54.0 h11==0.16.0 httptools==0.9.0
cat >"$dir/show.py" <<'PY'
import socket
import threading
import time

import uvicorn
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route


async def events():
    yield {"data": "x"}


async def chunks():
    yield b"data: x\n\n"


async def sse(request):
    return EventSourceResponse(events())


async def plain(request):
    return StreamingResponse(chunks())


app = Starlette(routes=[Route("/sse", sse), Route("/plain", plain)])


def connection_headers(port, path):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head = answer.split(b"\r\n\r\n")[0].decode().lower().split("\r\n")
    return [line.split(": ")[1] for line in head if line.startswith("connection:")]


seen = {}
for parser in ("httptools", "h11"):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=parser, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.05)
    for path in ("/sse", "/plain"):
        seen[parser, path] = connection_headers(listener.getsockname()[1], path)
        print(f"{parser:<10} {path:<7} connection: {seen[parser, path]}")
    server.should_exit = True
    thread.join()
expected = [["keep-alive", "close"], ["close"], ["close"], ["close"]]
raise SystemExit(0 if list(seen.values()) == expected else "the behaviour changed")
PY
"$dir/venv/bin/python" "$dir/show.py"
