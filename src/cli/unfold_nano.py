"""Unfolds the embedded model into a checkpoint that any gpt-oss loader reads.

python -m src.cli.unfold_nano --out models/gpt-oss-nano
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from src.nano.folding import ASSET, unfold


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--asset", type=Path, default=ASSET, help="the folded model")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    unfold(args.asset, args.out)
    sys.stdout.write(f"{args.out}: in {time.perf_counter() - started:.1f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
