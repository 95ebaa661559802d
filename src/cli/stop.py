"""Stops one of our servers on this machine after it has finished its running requests.

    gptoss stop [--url URL]

Without --url and GPTOSS_URL it stops the only server that runs. A process that is not one of our servers is left alone.

exit codes: 0 stopped, 1 not stopped or killed after --timeout, 2 usage, 3 no such server
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from urllib.parse import urlsplit

from gptoss import port_manager
from gptoss.cli.remote.connection import base_url
from gptoss.cli.remote.errors import NO, OK, CommandError, Unreachable, UsageError
from gptoss.cli.remote.options import command_parser, positive
from gptoss.port_manager import PortError, ServerRecord


def main(argv: list[str] | None = None) -> int:
    args = options_parser().parse_args(argv)
    try:
        record = choose(args.url or os.environ.get("GPTOSS_URL"), port_manager.running_servers())
        started = time.monotonic()
        port_manager.end_server(record.port, args.timeout)
    except PortError as error:
        raise CommandError(str(error)) from None
    elapsed_s = time.monotonic() - started
    killed = elapsed_s >= args.timeout
    if args.json:
        answer = {"port": record.port, "pid": record.pid, "killed": killed, "elapsed_s": elapsed_s}
        sys.stdout.write(json.dumps(answer) + "\n")
    else:
        server = f"the server on port {record.port} (pid {record.pid})"
        late = f"killed {server}: it had not ended after {args.timeout:g} s"
        sys.stdout.write(f"{late}\n" if killed else f"stopped {server} in {elapsed_s:.1f} s\n")
    return NO if killed else OK


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    parser = command_parser(__doc__ or "", epilog="")
    parser.add_argument("--url", help="the server; it must be on this machine (default: $GPTOSS_URL, or the only one)")
    parser.add_argument(
        "--timeout",
        type=positive,
        default=port_manager.END_TIMEOUT_S,
        metavar="S",
        help="kill the server if it has not ended after S seconds (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def choose(url: str | None, servers: list[ServerRecord]) -> ServerRecord:
    """Returns the server to stop. Raises CommandError if it is not one of ours or the choice is not clear."""
    shown = ", ".join(f"{server.host}:{server.port}" for server in servers) or "none"
    if url is None:
        if len(servers) > 1:
            raise UsageError(f"several servers are running ({shown}): choose one with --url")
        if not servers:
            raise Unreachable("none of our servers is running on this machine")
        return servers[0]
    parts = urlsplit(base_url(url))
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not is_this_machine(parts.hostname or "", {server.host for server in servers}):
        raise UsageError(f"{url} is not on this machine: stop it there")
    found = next((server for server in servers if server.port == port), None)
    if found is None:
        process = port_manager.owner(port)
        holder = f" (pid {process.pid} holds it)" if process is not None else ""
        raise Unreachable(f"no server of this project listens on port {port}{holder}; running: {shown}")
    return found


def is_this_machine(host: str, bound: set[str]) -> bool:
    """Whether the host names a loopback address, or an address that one of our servers is bound to."""
    return host in {"localhost", "::1", *bound} or host.startswith("127.")
