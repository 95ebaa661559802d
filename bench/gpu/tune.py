"""Tries launch configurations on this card and writes the best into the launch table, a row at a time.

    python -m bench.gpu.tune --kernels moe_w1 qkv --tokens 1 32 [--models 20b 120b] [--write]

A row of the table is tried at the numbers of tokens given that it serves, with all models together. The candidates are
compiled first, by as many processes as there are cores. What is found is printed, and with --write kept, row by row, so
that a run that is ended has what it found so far.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bench.arguments import whole
from bench.gpu.kernels import DEVICE, Bench, Layer
from bench.gpu.timing import time_us
from gptoss.kernels.triton import configs, support
from gptoss.kernels.triton.configs import TileConfig, load_table

CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "moe_w1": {"block_n": (32, 64, 128), "block_m": (8, 16), "warps": (1, 2, 4), "stages": (3, 4, 5)},
    "moe_w2": {
        "block_n": (16, 32, 64),
        "block_m": (8, 16),
        "warps": (1, 2, 4),
        "stages": (3, 4, 5),
        "split": (1, 2, 3),
    },
    "qkv": {"block_n": (16, 32, 64), "block_m": (8, 16, 32), "warps": (1, 2, 4), "stages": (3, 4, 6)},
    "out": {"block_n": (16, 32), "block_m": (8, 16, 32), "warps": (1, 2), "stages": (4, 6, 8)},
    "router": {"block_n": (1, 2, 4, 8), "block_m": (1, 2), "warps": (2, 4, 8), "stages": (1,)},
    "lm_head": {"block_n": (32, 64, 128), "block_m": (8, 16, 32), "warps": (2, 4, 8), "stages": (3, 4, 5)},
}
LARGE = {"block_n": (64, 128), "block_m": (32, 64, 128, 256), "warps": (4, 8), "stages": (2, 3, 4)}
EXPERTS = ("moe_w1", "moe_w2")  # both walk the same tiles
DIRECT_TOKENS = 4  # kernels/triton/fused_layers.py: more are listed, and one program takes all columns


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of the launch table, tried at `tokens`."""

    kernel: str
    index: int
    tokens: int
    old: TileConfig

    def candidates(self) -> list[TileConfig]:
        """The present configuration first."""
        grid = LARGE if self.tokens > 64 else CANDIDATES[self.kernel]
        keys = ("block_n", "block_m", "warps", "stages", "split")
        found = [TileConfig(*values) for values in itertools.product(*(grid.get(k, (1,)) for k in keys))]
        if self.kernel in EXPERTS:
            found = [c for c in found if c.block_m == self.old.block_m]
            found = [c for c in found if c.split == 1 or self.tokens <= DIRECT_TOKENS]
        return [self.old, *(c for c in found if c != self.old)]


Table = dict[str, list[tuple[int, TileConfig]]]


def rows(table: Table, kernels: list[str], sizes: list[int]) -> Iterator[TableRow]:
    for kernel in kernels:
        for tokens in sizes:
            index = next(i for i, (limit, _) in enumerate(table[kernel]) if tokens <= limit)
            yield TableRow(kernel, index, tokens, table[kernel][index][1])


def best(benches: list[Bench], candidates: list[TileConfig]) -> tuple[TileConfig, float] | None:
    """The configuration with the least time of all `benches` together, in us; None if none runs.

    Those that do not fit the card are passed over.
    """
    times: dict[TileConfig, float] = {}
    for config in candidates:
        try:
            times[config] = sum(time_us(lambda b=bench, c=config: b.launch(c), repeat_ms=20) for bench in benches)
        except Exception as error:
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            what = str(error).splitlines() or [type(error).__name__]
            sys.stderr.write(f"{benches[0].name} {config}: {what[0][:100]}\n")
    if not times:
        return None
    config = min(times, key=lambda c: times[c])
    return config, times[config]


def tune(table: Table, wanted: list[TableRow], layers: list[Layer], keep: Callable[[], None]) -> None:
    """Changes `table`, and calls `keep` after each row that was changed."""
    for row in wanted:
        benches = [
            b for x in layers for b in x.benches(row.tokens) if b.kernel == row.kernel and "cuBLAS" not in b.name
        ]
        before, found = best(benches, [row.old]), best(benches, row.candidates()[1:])
        name = f"{row.kernel}, {row.tokens} tokens"
        if found is None:
            sys.stdout.write(f"{name}: no candidate runs\n")
            continue
        config, us = found
        old_us = f"{before[1]:.1f} us" if before else "does not run"
        sys.stdout.write(f"{name}: {old_us} with {row.old}, {us:.1f} us with {config}\n")
        sys.stdout.flush()
        if before is None or us < before[1]:
            limit, _ = table[row.kernel][row.index]
            table[row.kernel][row.index] = (limit, config)
            keep()


def write(architecture: str, table: Table) -> None:
    """Puts the architecture's rows into the launch table, which is whole at any time."""
    whole = load_table() | {architecture: table}
    raw = {
        a: {k: [{"tokens": n, **c.as_dict()} for n, c in rows] for k, rows in kernels.items()}
        for a, kernels in whole.items()
    }
    text = json.dumps(raw, indent=1)
    made = configs.TABLE.with_suffix(".new")
    made.write_text(f"{text}\n")
    made.replace(configs.TABLE)


def compile_ahead(models: list[str], wanted: list[TableRow], architecture: str) -> None:
    """Fills triton's cache with the candidates, in a process that has not started CUDA."""
    capability = architecture.removeprefix("sm_")
    jobs = [(m, r.kernel, r.tokens, [c.as_dict() for c in r.candidates()]) for m in models for r in wanted]
    command = [sys.executable, "-m", "bench.kernels.dry_run", "--candidates", json.dumps(jobs)]
    command += ["--capability", capability, "--workers", str(max(1, (os.cpu_count() or 2) - 2))]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.stderr.write("some candidates were not compiled ahead\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["20b"], choices=("20b", "120b"))
    parser.add_argument(
        "--kernels", nargs="+", default=["moe_w1", "moe_w2", "qkv", "out", "router"], choices=CANDIDATES
    )
    parser.add_argument("--tokens", nargs="+", type=whole(1, 131_072), default=[1, 32])
    parser.add_argument("--write", action="store_true", help="write the launch table")
    args = parser.parse_args(argv)
    if not support.interpreted() and not torch.cuda.is_available():
        sys.stderr.write("no NVIDIA GPU here: there is nothing to tune\n")
        return 3
    architecture = support.architecture(DEVICE)
    known = load_table()
    table = {kernel: list(rows) for kernel, rows in known[configs.nearest(architecture)].items()}
    wanted = list(rows(table, args.kernels, args.tokens))
    if not support.interpreted():
        compile_ahead(args.models, wanted, architecture)
    tune(table, wanted, [Layer(m) for m in args.models], lambda: write(architecture, table) if args.write else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
