"""Measures a running OpenAI-compatible server, or two in turns.

    python bench/serve.py --url http://127.0.0.1:8000 [--vs http://127.0.0.1:8001] [--json FILE]

Raw completions at temperature 0 with `ignore_eos`, so that every server generates the same number of tokens. With
--vs the two servers take turns, measurement by measurement, and the last column is first / second. `gptoss bench` measures
the same with arrival rates and service levels.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptoss.cli.remote.errors import CommandError
from gptoss.cli.remote.load import Job, Target, prefill, repeated_prefix, short_answers, streams, table, take_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--vs", help="a second server, measured in turns with the first")
    parser.add_argument("--model")
    parser.add_argument("--vs-model")
    parser.add_argument("--vs-plain", action="store_true", help="send the second server no extensions")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=1024, help="words in the long prompt")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=3, help="the median of this many is shown")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    jobs: list[Job] = [lambda t, n=n: streams(t, n, args.tokens) for n in args.streams]  # type: ignore[misc]
    jobs.append(lambda t: prefill(t, args.prefill))
    jobs.append(lambda t: repeated_prefix(t, args.prefill))
    jobs.append(lambda t: short_answers(t, args.requests))
    try:
        targets = [Target(args.url, args.model)] + (
            [Target(args.vs, args.vs_model, plain=args.vs_plain)] if args.vs else []
        )
        results = take_turns(targets, jobs, args.repeat)
    except CommandError as error:
        sys.exit(f"error: {error}")
    print("\n".join(table(results)))
    if args.json:
        args.json.write_text(json.dumps({"targets": [t.url for t in targets], "results": results}, indent=2))


if __name__ == "__main__":
    main()
