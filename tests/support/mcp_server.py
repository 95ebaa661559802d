"""A small MCP server: `python tests/support/mcp_server.py stdio`, or `http PORT`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import uvicorn
from mcp.server import MCPServer
from mcp.types import ToolAnnotations


def make_server() -> MCPServer:
    server = MCPServer("tests", instructions="Adds numbers.")
    read_only = ToolAnnotations(read_only_hint=True)

    @server.tool(annotations=read_only)
    def add(a: int, b: int) -> str:
        """Adds two numbers."""
        return str(a + b)

    @server.tool()
    def fail() -> str:
        """Always fails."""
        raise ValueError("secret of the server")

    @server.tool()
    async def sleep(seconds: float) -> str:
        """Takes its time."""
        await asyncio.sleep(seconds)
        return "slept"

    @server.tool()
    def die() -> str:
        """Ends the process."""
        os._exit(3)

    @server.tool()
    def grow(name: str) -> str:
        """Adds a tool."""
        server.add_tool(lambda: name, name=name, description="New.")
        return f"{name} is there"

    return server


@contextlib.contextmanager
def mcp_over_http() -> Iterator[str]:
    """The URL of the server, which runs in a thread of this process."""
    app = make_server().streamable_http_app()
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while not server.started:
                assert thread.is_alive() and time.monotonic() < deadline
                time.sleep(0.01)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}/mcp"
        finally:
            server.should_exit = True
            thread.join(10)


def main() -> None:
    if sys.argv[1] == "stdio":
        make_server().run(transport="stdio")
    else:
        make_server().run(transport="streamable-http", host="127.0.0.1", port=int(sys.argv[2]))


if __name__ == "__main__":
    main()
