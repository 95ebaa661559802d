"""Measures how long `gptoss` takes to start: the commands that load little, beside what Python itself takes.

python bench/cli_start.py [--repeat 20]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = "127.0.0.1:9"  # the discard port: refused at once
COMMANDS = {
    "python -c 'import argparse, json'": ["-c", "import argparse, json"],
    "gptoss --help": ["-m", "gptoss", "--help"],
    "gptoss status (no server)": ["-m", "gptoss", "status", "--url", NOWHERE],
    "gptoss stop (no server)": ["-m", "gptoss", "stop", "--url", NOWHERE],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20, help="the median of this many is shown")
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.repeat):
        for name, arguments in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True)
            times[name].append(time.perf_counter() - started)
    for name, found in times.items():
        print(f"{name:36}{1e3 * statistics.median(found):8.0f} ms")


if __name__ == "__main__":
    main()
