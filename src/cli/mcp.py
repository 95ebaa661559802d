"""Offers our browser and Python tools to other programs, as an MCP server.

    gptoss mcp --python
    gptoss mcp --browser folder --browser-folder docs --transport http --port 8001

Over stdio the program that starts it is the only client. Over HTTP (streamable, path /mcp) a key is required unless the
address is a loopback one.

exit codes: 0 done, 1 a tool cannot run here, 2 usage, 130 ctrl-C
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import ipaddress
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss.cli.remote.errors import CommandError, UsageError
from gptoss.cli.remote.options import command_parser, count, port_number, positive
from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig

if TYPE_CHECKING:
    from gptoss.generation.tool_types import ToolRunner

KEY_VARIABLE = "GPTOSS_API_KEY"


def main(argv: list[str] | None = None) -> int:
    args = options_parser().parse_args(argv)
    if not (args.python or args.browser):
        raise UsageError("choose what to offer: --python, --browser BACKEND, or both")
    if importlib.util.find_spec("mcp") is None:
        raise UsageError(
            "gptoss mcp requires mcp; install the package's extra 'tools', or run: pip install 'mcp>=2.3,<3'"
        )
    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    if args.transport == "http" and key is None and not _is_loopback(args.host):
        raise UsageError(f"--host {args.host} can be reached from other machines: set a key in {KEY_VARIABLE}")
    try:
        runners = _runners(args)
    except ConfigError as error:
        raise CommandError(str(error)) from None
    asyncio.run(_serve(args, runners, key))
    return 0


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    parser = command_parser(__doc__ or "", epilog="")
    add = parser.add_argument
    add("--python", action="store_true", help="offer `python`, which runs code in a sandbox (needs bubblewrap)")
    add(
        "--python-interpreter",
        type=Path,
        metavar="FILE",
        help="Python of the sandbox (default: the one that runs this)",
    )
    add("--python-timeout", type=positive, default=120.0, metavar="S", help="time of one call (default: %(default)g)")
    add("--browser", choices=("folder", "searxng", "exa", "you"), help="offer `browser_search`, `_open` and `_find`")
    add("--browser-folder", type=Path, metavar="DIR", help="the documents of --browser folder")
    add("--browser-url", metavar="URL", help="the server of --browser searxng")
    add("--transport", choices=("stdio", "http"), default="stdio", help="default: %(default)s")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=port_number, default=8001, help="port to listen on (default: %(default)s)")
    add(
        "--api-key",
        metavar="KEY",
        help=f"key that requests must carry as bearer token (default: ${KEY_VARIABLE}, which others cannot read)",
    )
    add("--max-sessions", type=count, default=16, metavar="N", help="live sessions (default: %(default)s)")
    add("--idle", type=positive, default=1200.0, metavar="S", help="end sessions unused so long (default: %(default)g)")
    return parser


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _runners(args: argparse.Namespace) -> dict[str, ToolRunner]:
    """The tools that are offered. Raises ConfigError."""
    runners: dict[str, ToolRunner] = {}
    if args.python:
        from gptoss.tools.python_sandbox.build import build_python

        config = ServerConfig(
            enable_python_tool=True,
            python_tool_interpreter=args.python_interpreter,
            python_tool_timeout_s=args.python_timeout,
        )
        python = build_python(config)
        assert python is not None
        runners["python"] = python
    if args.browser:
        runners["browser"] = _browser(args)
    return runners


def _browser(args: argparse.Namespace) -> ToolRunner:
    from gptoss.harmony.vocabulary_files import VocabularyError, load_vocabulary
    from gptoss.tools.browser.build import BrowserSettings, build_browser

    def count_tokens(text: str) -> int:
        return len(vocabulary.encode(text))

    settings = BrowserSettings(backend=args.browser, folder=args.browser_folder, url=args.browser_url)
    browser = build_browser(settings, count_tokens, os.environ)
    try:
        vocabulary = load_vocabulary()
    except VocabularyError as error:
        raise CommandError(str(error)) from None
    return browser


def _check_address(host: str, port: int) -> None:
    """Raises UsageError if no server can listen there."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        why = (
            os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        )  # of a host, from getaddrinfo
        raise UsageError(f"cannot listen on {host}, port {port}: {why}") from None


async def _serve(args: argparse.Namespace, runners: Mapping[str, ToolRunner], key: str | None) -> None:
    """Serves until the client closes standard input, or a signal ends it."""
    from gptoss.cli.tool_server.server import make_server
    from gptoss.cli.tool_server.sessions import CallLimits, SharedSessions
    from gptoss.generation.tool_sessions import SessionLimits

    limits = SessionLimits(args.max_sessions, args.max_sessions, args.idle)
    sessions = SharedSessions(limits, CallLimits(timeout_s=args.python_timeout + 5))
    server = make_server(runners, sessions, key)
    sessions.start()
    try:
        if args.transport == "stdio":
            await server.run_stdio_async()
        else:
            _check_address(args.host, args.port)
            sys.stderr.write(f"serving http://{args.host}:{args.port}/mcp\n")
            await server.run_streamable_http_async(host=args.host, port=args.port)
    finally:
        await sessions.close()
        for runner in runners.values():
            await runner.close()
