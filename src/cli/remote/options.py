"""The options that every command which talks to a server has."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator

from gptoss.cli.remote.connection import DEFAULT_URL, Connection
from gptoss.cli.remote.errors import UsageError

EXIT_CODES = "exit codes: 0 done, 1 the answer is no, 2 usage, 3 server not reachable, 4 server refused, 130 ctrl-C"


def command_parser(description: str, **more: str) -> argparse.ArgumentParser:
    """Returns a parser whose help shows `description` as written and ends with the exit codes."""
    return argparse.ArgumentParser(
        description=description,
        epilog=more.get("epilog", EXIT_CODES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_server_options(parser: argparse.ArgumentParser, timeout_s: float = 600.0) -> None:
    """Adds --url, --api-key and --timeout."""
    parser.add_argument("--url", help=f"the server (default: $GPTOSS_URL, or {DEFAULT_URL})")
    parser.add_argument("--api-key", metavar="KEY", help="default: $GPTOSS_API_KEY, or $OPENAI_API_KEY")
    parser.add_argument(
        "--timeout",
        type=positive,
        default=timeout_s,
        metavar="S",
        help="seconds to wait for an answer, or for the next part of one (default: %(default)g)",
    )


def url_of(args: argparse.Namespace) -> str:
    """Returns the URL from the flag, the environment or the default."""
    return args.url or os.environ.get("GPTOSS_URL") or DEFAULT_URL


def api_key_of(args: argparse.Namespace) -> str | None:
    """Returns the key from the flag or the environment."""
    return args.api_key or os.environ.get("GPTOSS_API_KEY") or os.environ.get("OPENAI_API_KEY")


def connection_of(args: argparse.Namespace) -> Connection:
    """Returns the connection that the options describe. Raises UsageError."""
    return Connection(url_of(args), api_key_of(args), args.timeout)


def add_local_options(parser: argparse.ArgumentParser) -> None:
    """Adds --local and --config."""
    parser.add_argument(
        "--local",
        action="store_true",
        help="load the model here instead: --model, --config and GPTOSS_... as for serve",
    )
    parser.add_argument("--config", metavar="FILE", help="with --local: the server's YAML file")


@contextlib.contextmanager
def opened_connection(args: argparse.Namespace) -> Iterator[tuple[Connection, str]]:
    """Yields a connection, to a server or with --local, and the model's name. Raises CommandError."""
    if not args.local:
        if args.config:
            raise UsageError("--config has a meaning only with --local")
        connection = connection_of(args)
        yield connection, args.model or connection.first_model()
        return
    if args.url:
        raise UsageError("--url and --local contradict each other")
    from gptoss.cli.remote.local import local_connection

    with local_connection(args.model, args.config, args.timeout) as connection:
        yield connection, connection.first_model()


def positive(text: str) -> float:
    """Returns a number above 0, for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def count(text: str) -> int:
    """Returns an integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not an integer of at least 1")
    return value


def port_number(text: str) -> int:
    """Returns a number from 1 to 65535, for argparse."""
    value = int(text)
    if not 1 <= value <= 65_535:
        raise argparse.ArgumentTypeError(f"{text} is not a port (1 to 65535)")
    return value
