"""Sends the requests that `gptoss generate --record FILE` wrote again, and compares the answers.

    gptoss replay requests.jsonl

exit codes: 0 all equal, 1 some differ, 2 usage, 3 server not reachable, 4 server refused to be used at all
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptoss.cli.remote.answer import Answer, read
from gptoss.cli.remote.connection import Connection
from gptoss.cli.remote.errors import NO, OK, Refused, UsageError
from gptoss.cli.remote.options import add_server_options, command_parser, connection_of
from gptoss.cli.remote.recording import differences, prompt_token_ids, read_records
from gptoss.cli.terminal.style import Style

TOLERANCE = 0.01
STOPPING = (401, 403)  # the server would refuse every other request too


def main(argv: list[str] | None = None) -> int:
    args = options_parser().parse_args(argv)
    connection, style = connection_of(args), Style.of(sys.stdout)
    results = []
    for number, record in read_records(args.file):
        result = replay(connection, record, args.model, args.tolerance)
        results.append({"line": number, **result})
        if not args.json:
            sys.stdout.write("\n".join(lines(number, result, style)) + "\n")
            sys.stdout.flush()
    if not results:
        raise UsageError(f"{args.file} holds no request")
    equal = sum(not result["differences"] for result in results)
    if args.json:
        sys.stdout.write(json.dumps({"equal": equal, "requests": len(results), "results": results}, indent=2) + "\n")
    else:
        sys.stdout.write(f"{equal} of {len(results)} equal\n")
    return OK if equal == len(results) else NO


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    parser = command_parser(__doc__ or "", epilog="")
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON lines of `gptoss generate --record`")
    add_server_options(parser)
    parser.add_argument("--model", help="ask this model instead of the recorded one")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help="largest difference of two logprobs that counts as equal (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def replay(connection: Connection, record: dict[str, Any], model: str | None, tolerance: float) -> dict[str, Any]:
    """Returns the differences from the recorded answer, and the timings of both. Raises CommandError."""
    request, answer = dict(record["request"]), Answer()
    if model:
        request["model"] = model
    try:
        for _ in read(connection.stream(record["path"], request), answer):
            pass
    except Refused as error:
        if error.status in STOPPING:
            raise
        return {"differences": [str(error)], "timings": None, "recorded_timings": record["timings"]}
    prompt_ids = prompt_token_ids(connection, record["path"], request)
    return {
        "differences": differences(record, prompt_ids, answer, tolerance),
        "timings": asdict(answer.timings),
        "recorded_timings": record["timings"],
    }


def lines(number: int, result: dict[str, Any], style: Style) -> list[str]:
    """Returns what a person reads about one request."""
    verdict = style("differs", "red") if result["differences"] else style("equal", "green")
    times = ""
    if result["timings"]:
        old, new = result["recorded_timings"].get("total_s"), result["timings"]["total_s"]
        times = f", {new:.2f} s" + (f" (recorded {old:.2f} s)" if old else "")
    return [f"line {number}: {verdict}{times}", *(f"  {text}" for text in result["differences"])]
