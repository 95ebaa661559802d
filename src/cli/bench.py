"""Measures latency and throughput of any OpenAI-compatible server, or of two in turns.

    gptoss bench --streams 1 16 --tokens 128
    gptoss bench --rate 4 --requests 100 --sla-ttft-ms 500 --sla-itl-ms 50
    gptoss bench --url http://127.0.0.1:8000 --vs http://127.0.0.1:8001 --plot bench.png

itl is the time between tokens. goodput counts only requests that keep the service level. The median of --repeat runs is
shown; with --vs the last column is first / second.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gptoss.cli.remote.errors import OK
from gptoss.cli.remote.load import (
    PROMPT_WORDS,
    Job,
    ServiceLevel,
    Target,
    arrivals,
    prefill,
    repeated_prefix,
    short_answers,
    streams,
    table,
    take_turns,
)
from gptoss.cli.remote.options import add_server_options, api_key_of, command_parser, count, positive, url_of
from gptoss.cli.remote.plot import check_plot, write_plot
from gptoss.cli.terminal.style import Style, printable


def main(argv: list[str] | None = None) -> int:
    args = options_parser().parse_args(argv)
    if args.plot:
        check_plot(args.plot)
    more = {"prefix_share": args.prefix_share, "timeout_s": args.timeout}
    targets = [Target(url_of(args), args.model, plain=args.plain, api_key=api_key_of(args), **more)]
    if args.vs:
        targets.append(Target(args.vs, args.vs_model, plain=args.vs_plain, api_key=args.vs_api_key, **more))
    results = take_turns(targets, jobs(args), args.repeat)
    if args.plot:
        write_plot(args.plot, [f"{target.model} at {target.url}" for target in targets], results)
    if args.json:
        measured = [
            {"url": target.url, "model": target.model, "figures": figures}
            for target, figures in zip(targets, results, strict=True)
        ]
        sys.stdout.write(json.dumps({"targets": measured, "ratios": ratios(results)}, indent=2) + "\n")
        return OK
    style = Style.of(sys.stdout)
    for number, target in enumerate(targets, 1):
        sys.stdout.write(style(f"{number}: {printable(target.model)} at {target.url}", "bold") + "\n")
    sys.stdout.write("\n".join(table(results)) + "\n")
    return OK


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    parser = command_parser(__doc__ or "")
    add_server_options(parser)
    parser.add_argument("--vs", metavar="URL", help="a second server, measured in turns with the first")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--vs-model", metavar="MODEL")
    parser.add_argument("--vs-api-key", metavar="KEY", help="of the second server, which is not sent the first one's")
    parser.add_argument("--plain", action="store_true", help="send no fields that OpenAI's API does not know")
    parser.add_argument("--vs-plain", action="store_true", help="the same for the second server")
    parser.add_argument("--streams", type=count, nargs="+", metavar="N", help="streams at once (default: 1 4 16)")
    parser.add_argument("--rate", type=positive, nargs="+", metavar="R", help="instead, requests a second that arrive")
    parser.add_argument("--tokens", type=count, default=64, help="of each answer (default: %(default)s)")
    parser.add_argument(
        "--words", type=count, default=PROMPT_WORDS, help="of each prompt, about one token each (default: %(default)s)"
    )
    parser.add_argument("--prefix-share", type=_share, default=0.0, metavar="X", help="0 to 1: of the words, shared")
    parser.add_argument("--prefill", type=count, default=1024, metavar="WORDS", help="of the long prompt")
    parser.add_argument("--requests", type=count, default=200, help="short ones, or at each --rate (default: 200)")
    parser.add_argument("--repeat", type=count, default=3, help="the median of this many is shown (default: 3)")
    parser.add_argument("--sla-ttft-ms", type=positive, metavar="MS", help="service level: time to the first token")
    parser.add_argument("--sla-itl-ms", type=positive, metavar="MS", help="service level: mean time between tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figures: .png, .svg or .pdf")
    return parser


def jobs(args: argparse.Namespace) -> list[Job]:
    """Returns the measurements that the options ask for."""
    level = ServiceLevel(_seconds(args.sla_ttft_ms), _seconds(args.sla_itl_ms))
    if args.rate:
        return [lambda t, r=r: arrivals(t, r, args.requests, args.tokens, args.words, level) for r in args.rate]  # type: ignore[misc]
    found: list[Job] = [
        lambda t, n=n: streams(t, n, args.tokens, args.words, level)  # type: ignore[misc]
        for n in args.streams or (1, 4, 16)
    ]
    return [
        *found,
        lambda t: prefill(t, args.prefill),
        lambda t: repeated_prefix(t, args.prefill),
        lambda t: short_answers(t, args.requests),
    ]


def ratios(results: list[dict[str, float]]) -> dict[str, float] | None:
    """Returns first / second of each figure, None with one target."""
    if len(results) < 2:
        return None
    return {name: value / results[1][name] for name, value in results[0].items() if results[1][name]}


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value
