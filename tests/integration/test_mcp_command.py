"""`gptoss mcp`: our tools for other programs, through the client of the `mcp` library."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import uvicorn
from mcp import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client

from gptoss.cli.main import main
from gptoss.cli.tool_server.server import ToolServer, make_server
from gptoss.cli.tool_server.sessions import CallLimits, SharedSessions
from gptoss.generation.tool_sessions import SessionLimits
from gptoss.generation.tool_types import ToolRunner
from gptoss.tools.browser.build import BrowserSettings, build_browser
from gptoss.tools.python_sandbox.runner import PythonRunner
from tests.support.sandbox import LIMITS, machine_sandbox

ROOT = Path(__file__).resolve().parents[2]
KEY = "key-of-the-tests"


def browser(folder: Path) -> ToolRunner:
    (folder / "pumps.md").write_text("# Pumps\n\nThe blue pump has 12 bar.\n")
    return build_browser(BrowserSettings(backend="folder", folder=folder), lambda text: len(text) // 4, {})


@contextlib.asynccontextmanager
async def serving(
    runners: dict[str, ToolRunner], *, key: str | None = None, max_sessions: int = 4
) -> AsyncIterator[ToolServer]:
    sessions = SharedSessions(SessionLimits(max_sessions, max_sessions, 60), CallLimits(20))
    sessions.start()
    try:
        yield make_server(runners, sessions, key)
    finally:
        await sessions.close()


@contextlib.asynccontextmanager
async def over_http(server: ToolServer) -> AsyncIterator[str]:
    """The URL of the server, as `gptoss mcp --transport http` serves it."""
    bound = socket.create_server(("127.0.0.1", 0))
    http = uvicorn.Server(uvicorn.Config(server.streamable_http_app(), log_level="warning"))
    task = asyncio.create_task(http.serve([bound]))
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/mcp"
    finally:
        http.should_exit = True
        await task


def text(result: Any) -> str:
    return "\n".join(part.text for part in result.content if part.type == "text")


async def test_the_browser_keeps_its_pages_for_a_connection(tmp_path: Path) -> None:
    async with serving({"browser": browser(tmp_path)}) as server, Client(server) as client:
        names = [tool.name for tool in (await client.list_tools()).tools]
        assert names == ["browser_search", "browser_open", "browser_find"]
        assert "【0†Pumps】" in text(await client.call_tool("browser_search", {"query": "pump"}))
        assert "L4: The blue pump" in text(await client.call_tool("browser_open", {"id": 0}))
        assert "match at L4" in text(await client.call_tool("browser_find", {"pattern": "12 BAR"}))
        failed = await client.call_tool("browser_open", {"cursor": 9})
        assert failed.is_error and "no cursor 9" in text(failed)


async def test_python_returns_text_images_and_errors() -> None:
    async with serving({"python": PythonRunner(machine_sandbox(), LIMITS)}) as server, Client(server) as client:
        (tool,) = (await client.list_tools()).tools
        assert tool.name == "python" and "20.0 seconds" in (tool.description or "")
        assert text(await client.call_tool("python", {"code": "x = 20"})).startswith("[The code printed nothing")
        assert text(await client.call_tool("python", {"code": "x + 1"})) == "21"
        drawn = await client.call_tool("python", {"code": "class P:\n    def _repr_png_(self): return b'png'\nP()"})
        assert [(part.type, getattr(part, "mime_type", "")) for part in drawn.content] == [("image", "image/png")]
        raised = await client.call_tool("python", {"code": "1 / 0"})
        assert not raised.is_error and "ZeroDivisionError" in text(raised)
        ended = await client.call_tool("python", {"code": "import os; os._exit(1)"})
        assert ended.is_error and "variables and files are lost" in text(ended)
        gone = await client.call_tool("python", {"code": "x"})
        assert gone.is_error and "expired" in text(gone)
        assert "NameError" in text(await client.call_tool("python", {"code": "x"}))


async def test_over_http_a_call_is_continued_by_its_session_id(tmp_path: Path) -> None:
    runners = {"browser": browser(tmp_path)}
    async with serving(runners, max_sessions=2) as server, over_http(server) as url, Client(url) as client:
        found = await client.call_tool("browser_search", {"query": "pump"})
        session = (found.meta or {})["session_id"]
        assert f"[session_id: {session}]" in text(found)
        opened = await client.call_tool("browser_open", {"id": 0, "session_id": session})
        assert "The blue pump" in text(opened)
        assert "No page is open" in text(await client.call_tool("browser_open", {"id": 0}))
        for _ in range(2):  # make the first one give way
            await client.call_tool("browser_search", {"query": "pump"})
        lost = await client.call_tool("browser_open", {"id": 0, "session_id": session})
        assert lost.is_error and "it has expired, or never was" in text(lost)
        async with streamable_client(url, {"x-session-id": "one"}) as named:
            await named.call_tool("browser_search", {"query": "pump"})
            assert "The blue pump" in text(await named.call_tool("browser_open", {"id": 0}))
        async with Client(url, mode="legacy") as older:  # with a session of the protocol's
            await older.call_tool("browser_search", {"query": "pump"})
            assert "The blue pump" in text(await older.call_tool("browser_open", {"id": 0}))


@contextlib.asynccontextmanager
async def streamable_client(url: str, headers: dict[str, str]) -> AsyncIterator[Client]:
    async with (
        httpx2.AsyncClient(headers=headers) as http,
        Client(streamable_http_client(url, http_client=http)) as client,
    ):
        yield client


async def test_a_key_is_required_of_every_request(tmp_path: Path) -> None:
    async with serving({"browser": browser(tmp_path)}, key=KEY) as server, over_http(server) as url:
        async with httpx2.AsyncClient() as http:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
                for path in (url, url.removesuffix("mcp"), f"{url}/x"):
                    assert (await http.post(path, headers=headers, json={})).status_code == 401
        async with streamable_client(url, {"authorization": f"Bearer {KEY}"}) as client:
            assert len((await client.list_tools()).tools) == 3


async def test_a_foreign_host_header_is_refused(tmp_path: Path) -> None:
    async with (
        serving({"browser": browser(tmp_path)}) as server,
        over_http(server) as url,
        httpx2.AsyncClient() as http,
    ):
        assert (await http.post(url, headers={"host": "evil.example"}, json={})).status_code == 421


async def test_the_command_over_stdio_leaves_nothing_behind() -> None:
    machine_sandbox()
    command = StdioServerParameters(command=sys.executable, args=["-m", "gptoss", "mcp", "--python"], cwd=ROOT)
    before = psutil.Process().children(recursive=True)  # other modules of this process may have servers
    async with Client(stdio_client(command)) as client:
        assert text(await client.call_tool("python", {"code": "import os\nx = 2\nos.getuid()"})) == "1000"
        assert text(await client.call_tool("python", {"code": "x"})) == "2"
        mine = [one for one in psutil.Process().children(recursive=True) if one not in before]
        assert [one for one in mine if one.name() == "bwrap"]
    psutil.wait_procs(mine, timeout=10)
    assert not [one for one in mine if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 2, "choose what to offer"),
        (["--browser", "folder"], 1, "needs browser_folder"),
        (["--browser", "exa"], 1, "needs its key in EXA_API_KEY"),
        (["--python", "--transport", "http", "--host", "0.0.0.0"], 2, "set a key in GPTOSS_API_KEY"),
        (["--python"], 1, "enable_python_tool: bubblewrap (bwrap) is not installed; apt-get install bubblewrap"),
    ],
)
def test_what_cannot_be_served(
    argv: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("EXA_API_KEY", "GPTOSS_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert main(["mcp", *argv]) == code
    assert message in capsys.readouterr().err
    assert os.environ["PATH"] == str(tmp_path)


def test_a_port_in_use_is_told_before_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = ["--browser", "folder", "--browser-folder", str(tmp_path), "--transport", "http", "--port", str(port)]
        assert main(["mcp", *options]) == 2
    assert capsys.readouterr().err == f"error: cannot listen on 127.0.0.1, port {port}: Address already in use\n"
