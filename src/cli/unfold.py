"""Writes the embedded model as a checkpoint that any gpt-oss loader reads.

gptoss unfold --out models/gpt-oss-nano
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from gptoss.parent_process import end_with_parent


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--asset", type=Path, help="the folded model (default: the embedded one)")
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this process ends")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = options_parser().parse_args(argv)
    if args.parent is not None:
        end_with_parent(args.parent)
    from gptoss.cli.remote.errors import UsageError
    from gptoss.embedded.unfold import ASSET, unfold

    if args.asset and not args.asset.is_file():
        raise UsageError(f"--asset: there is no file {str(args.asset)!r}")
    started = time.perf_counter()
    unfold(args.asset or ASSET, args.out)
    sys.stdout.write(f"{args.out}: in {time.perf_counter() - started:.1f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
