"""Runs evaluations against a server, from local files, and compares them with OpenAI's scores.

    gptoss eval gpqa aime25 --data DIR --effort low medium high
    gptoss eval bfcl --data DIR --limit 100
    gptoss eval healthbench --data DIR --grader-url https://api.openai.com --grader-model gpt-4.1
    gptoss eval --report evals/run

The same command with the same --out continues an interrupted run. Nothing is downloaded: docs/evaluations.md says which
files DIR holds. Needs inspect-ai: pip install 'gpt-oss-server[eval]'.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from gptoss.cli.remote.errors import INTERRUPTED, NO, OK, UsageError
from gptoss.cli.remote.options import add_server_options, api_key_of, command_parser, connection_of, count

TASKS = {
    "gpqa": "GPQA Diamond: science questions with four choices",
    "aime25": "AIME 2025: mathematics, integer answers",
    "mmlu_pro": "MMLU-Pro: questions with up to ten choices",
    "ifeval": "IFEval: instructions that a program can check",
    "healthbench": "HealthBench: conversations about health, graded by another model",
    "healthbench_hard": "its hard part",
    "healthbench_consensus": "its part that physicians agree on",
    "bfcl": "BFCL v4, single turn: function calls",
}
EFFORTS = ("low", "medium", "high")
BFCL_LIMIT = 100  # of each category


def label(text: str) -> str:
    """Returns a name that can be a folder below --out, for argparse."""
    if "/" in text or text in (".", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be the name of a folder")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = options_parser()
    args = parser.parse_args(argv)
    if not args.tasks and not args.report:
        parser.error("name an evaluation, or a folder with --report")
    check_packages()
    from gptoss.cli.evals import report, run

    if args.report:
        rows = report.rows_of(args.report)
        return _print(rows, as_json=args.json)
    if args.data is None:
        parser.error("--data: name the folder of the evaluation's files")
    connection = connection_of(args)
    tasks = run.read_tasks(args)
    model = args.model or connection.first_model()
    try:
        completed = run.run(tasks, args, model, f"{connection.url}/v1", api_key_of(args))
        code = OK if completed else NO
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code != OK:
        sys.stderr.write("not complete: run the same command again to continue\n")
    _print(report.rows_of(args.out), as_json=args.json)
    return code


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    width = max(map(len, TASKS)) + 2
    listed = "\n".join(f"  {name:{width}}{text}" for name, text in TASKS.items())
    parser = command_parser(f"{__doc__}\nevaluations:\n{listed}\n")
    parser.add_argument("tasks", nargs="*", type=_task, metavar="EVALUATION", help="see above")
    add_server_options(parser)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the evaluations' files")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--effort", nargs="+", choices=EFFORTS, default=["medium"], help="default: medium")
    parser.add_argument("--limit", type=count, metavar="N", help="samples of each evaluation, chosen by --seed")
    parser.add_argument(
        "--full", action="store_true", help=f"bfcl: all samples, not {BFCL_LIMIT} of each category chosen by --seed"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling, of --limit and of shuffled choices")
    parser.add_argument("--epochs", type=count, default=1, help="times that each sample is asked (default: 1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1, as OpenAI measured")
    parser.add_argument("--max-tokens", type=count, metavar="N", help="of one answer (default: the server's)")
    parser.add_argument("--connections", type=count, default=16, help="requests at once (default: 16)")
    parser.add_argument("--label", type=label, default="", help="a name for this run in the table")
    parser.add_argument("--out", type=Path, default=Path("evals"), metavar="DIR", help="logs (default: evals)")
    parser.add_argument("--report", type=Path, metavar="DIR", help="only print the table of the logs in this folder")
    parser.add_argument("--grader-url", metavar="URL", help="healthbench: the server of the model that grades")
    parser.add_argument("--grader-model", metavar="MODEL", help="healthbench: its name")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _task(name: str) -> str:
    if name not in TASKS:
        raise argparse.ArgumentTypeError(f"no evaluation {name!r}: {', '.join(TASKS)}")
    return name


def check_packages() -> None:
    """Raises UsageError if inspect-ai is not installed."""
    missing = [name for name in ("inspect_ai", "openai") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"evaluations need {' and '.join(missing)}: pip install 'gpt-oss-server[eval]', "
            "or -r requirements-eval.txt in a checkout"
        )


def _print(rows: list[dict[str, object]], *, as_json: bool) -> int:
    from gptoss.cli.evals.report import markdown

    sys.stdout.write(json.dumps(rows, indent=2) + "\n" if as_json else markdown(rows))
    return OK
