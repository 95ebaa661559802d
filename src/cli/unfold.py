"""Writes the embedded model as a checkpoint that any gpt-oss loader reads.

gptoss unfold --out models/gpt-oss-nano
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(pid: int) -> None:
    """Makes Linux kill this process when its parent ends, for whatever reason."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != pid:
        sys.exit("the parent process ended")


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
