"""Writes the answer to a prompt, from the command line or standard input, as it is generated.

gptoss generate 'What is 12 + 30?'
gptoss generate --local --model 20b 'What is 12 + 30?'
gptoss generate --raw 'Once upon a time' --max-tokens 50 < /dev/null
git diff | gptoss generate --system 'Write a commit message.' --record requests.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gptoss.cli.remote.answer import CHAT, COMPLETIONS, WITH_USAGE, Answer, read
from gptoss.cli.remote.connection import Connection, reason
from gptoss.cli.remote.errors import OK, UsageError
from gptoss.cli.remote.options import add_local_options, add_server_options, command_parser, count, opened_connection
from gptoss.cli.remote.recording import open_record, write_record
from gptoss.cli.terminal.style import Style, printable

RAW_MAX_TOKENS = 256  # OpenAI's default of 16 is not what a person means
CHAT_ONLY = ("system", "effort", "profile", "show_reasoning")


def main(argv: list[str] | None = None) -> int:
    parser = options_parser()
    args = parser.parse_args(argv)
    if args.raw and (given := [name for name in CHAT_ONLY if getattr(args, name)]):
        parser.error(f"--{given[0].replace('_', '-')} has no meaning with --raw, which sends the prompt as it is")
    prompt = read_prompt(args.prompt)
    with ExitStack() as stack:
        connection, model = stack.enter_context(opened_connection(args))
        record = stack.enter_context(open_record(args.record)) if args.record else None
        path, request = request_of(args, prompt)
        request["model"] = model
        answer = Answer()
        write_answer(connection, path, request, answer, args)
        if record is not None:
            write_record(record, connection, path, request, answer)
    return OK


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    parser = command_parser(__doc__ or "")
    parser.add_argument("prompt", nargs="?", help="the prompt (default, or with -: standard input)")
    add_server_options(parser)
    add_local_options(parser)
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without Harmony")
    parser.add_argument("--system", metavar="TEXT", help="instructions before the prompt")
    parser.add_argument("--effort", choices=("low", "medium", "high"), help="reasoning effort")
    parser.add_argument("--profile", help="latency_first, balanced or quality_first")
    parser.add_argument(
        "--max-tokens", type=count, metavar="N", help=f"default: the server's; {RAW_MAX_TOKENS} with --raw"
    )
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument(
        "--seed", type=int, help="equal seeds give equal answers; --record chooses one if none is given"
    )
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text; repeatable")
    parser.add_argument("--logprobs", type=int, metavar="N", help="logprobs with N alternatives, on standard error")
    parser.add_argument("--schema", type=Path, metavar="FILE", help="JSON schema that the answer follows")
    parser.add_argument("--show-reasoning", action="store_true", help="also write the reasoning, on standard error")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append request, answer and timings as a JSON line")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    return parser


def read_prompt(text: str | None) -> str:
    """Returns the prompt. Raises UsageError if there is none."""
    if text is None and sys.stdin.isatty():
        raise UsageError("no prompt: give one as an argument, or on standard input")
    if text is None or text == "-":
        try:
            text = sys.stdin.read()
            text.encode()  # in the C locale, Python reads what is not UTF-8 as surrogates
        except UnicodeError:
            raise UsageError("standard input is not UTF-8 text") from None
    if not text:
        raise UsageError("the prompt is empty")
    return text


def request_of(args: argparse.Namespace, prompt: str) -> tuple[str, dict[str, Any]]:
    """Returns the path and the body of the request. Raises UsageError."""
    seed = random.getrandbits(31) if args.record and args.seed is None else args.seed
    fields = {
        "max_tokens": args.max_tokens or (RAW_MAX_TOKENS if args.raw else None),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": seed,
        "stop": args.stop,
        "response_format": response_format(args.schema) if args.schema else None,
    }
    if args.raw:
        fields |= {"prompt": prompt, "logprobs": args.logprobs}
    else:
        system = [{"role": "system", "content": args.system}] if args.system else []
        has_logprobs = args.logprobs is not None
        fields |= {
            "messages": [*system, {"role": "user", "content": prompt}],
            "reasoning_effort": args.effort,
            "profile": args.profile,
            "logprobs": True if has_logprobs else None,
            "top_logprobs": args.logprobs if has_logprobs else None,
        }
    given = {name: value for name, value in fields.items() if value is not None}
    return COMPLETIONS if args.raw else CHAT, given | WITH_USAGE


def response_format(path: Path) -> dict[str, Any]:
    """Returns the field that makes the answer follow the schema in the file. Raises UsageError."""
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {reason(error)}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {reason(error)}") from None
    name = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)[:64] or "answer"
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


def write_answer(
    connection: Connection, path: str, request: dict[str, Any], answer: Answer, args: argparse.Namespace
) -> None:
    """Writes the answer as it arrives, or as JSON once it is complete. Raises CommandError."""
    notes = Style.of(sys.stderr)
    show = printable if sys.stdout.isatty() else str
    in_reasoning = False
    for kind, piece in read(connection.stream(path, request), answer):
        if kind == "text" and not args.json:
            if in_reasoning:
                sys.stderr.write("\n")
                in_reasoning = False
            sys.stdout.write(show(piece))
            sys.stdout.flush()
        elif kind == "reasoning" and args.show_reasoning:
            in_reasoning = True
            sys.stderr.write(notes(printable(piece), "dim"))
            sys.stderr.flush()
    if args.json:
        sys.stdout.write(json.dumps(answer.as_json(), indent=2) + "\n")
    elif not answer.text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    if not args.json:
        for entry in answer.logprobs:
            sys.stderr.write(logprob_line(entry) + "\n")
    if answer.finish_reason == "length":
        sys.stderr.write(notes("the answer ends here because it reached its limit of tokens\n", "yellow"))


def logprob_line(entry: dict[str, Any]) -> str:
    """Returns `-0.0123  'token'  ('other' -4.5)`."""
    others = ", ".join(f"{token!r} {value:.4f}" for token, value in entry["top"].items())
    value = "-" if entry["logprob"] is None else f"{entry['logprob']:.4f}"
    return f"{value:>9}  {entry['token']!r}" + (f"  ({others})" if others else "")
