"""Counts what a step reads of the experts' weights, beside the bytes of the experts that its rows have chosen.

    python bench/expert_reads.py [--size mini] [--rows 1 4 16 64]

Needs valgrind: its cachegrind counts the lines that the AVX2 kernels read and that a cache of 256 KiB does not have (for 20b 1 MiB),
without counting prefetches. An expert that is read once for all its rows costs its bytes once. The counts do not depend on
what else runs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.cpu_products import compiled
from gptoss.engine.model.named_sizes import SIZES
from gptoss.kernels.cpu import native

PER_TOKEN, LINE = 4, 64
CACHE_KIB = {"mini": 256, "20b": 1024}  # less than an expert, more than the part of it that a piece of work reads
MISSES = re.compile(r"LLd misses:.*\(\s*([\d,]+) rd")


def build(folder: Path) -> list[str]:
    """Compiles the kernels and the program that calls them; returns the program and the library."""
    compiled(native.SOURCE, native.INSTRUCTION_SETS["avx2"][1], folder)
    program = folder / "expert_reads"
    source = Path(__file__).with_suffix(".cpp")
    flags = ("-O2", "-std=c++17", "-fopenmp", "-Wl,--no-as-needed", "-ldl")
    subprocess.run(["c++", str(source), "-o", str(program), *flags], check=True)
    return [str(program), str(folder / f"{native.SOURCE.stem}-{native.SOURCE.parent.name}.so")]


def lines_missed(command: list[str], cache_kib: int) -> tuple[int, int]:
    """Returns the lines read from memory, and the experts chosen."""
    grind = ["valgrind", "--tool=cachegrind", "--cache-sim=yes", f"--LL={cache_kib * 1024},16,{LINE}"]
    grind.append("--cachegrind-out-file=/dev/null")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*grind, *command], capture_output=True, text=True, env=environment)
    found = MISSES.search(done.stderr)
    if done.returncode or found is None:
        sys.exit(f"error: valgrind failed:\n{done.stderr[-2000:]}")
    return int(found[1].replace(",", "")), int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=CACHE_KIB, default="mini")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    args = parser.parse_args()
    if shutil.which("valgrind") is None:
        sys.exit("error: valgrind is not installed (apt-get install valgrind)")
    size = SIZES[args.size]
    expert = 3 * size.hidden * size.intermediate * 17 // 32
    print("| rows | experts chosen | their bytes, MB | bytes read, MB | read / chosen | one read for each row |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        program, library = build(Path(temporary))
        for rows in args.rows:
            sizes = [str(n) for n in (rows, PER_TOKEN, size.experts, size.hidden, size.intermediate)]
            idle, used = lines_missed([program, library, "0", *sizes], CACHE_KIB[args.size])
            busy, _ = lines_missed([program, library, "1", *sizes], CACHE_KIB[args.size])
            read, chosen = (busy - idle) * LINE, used * expert
            ratios = f"{read / chosen:.2f} | {rows * PER_TOKEN / used:.2f}"
            print(f"| {rows} | {used} | {chosen / 1e6:.1f} | {read / 1e6:.1f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
