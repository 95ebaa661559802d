"""Tries launch configurations on this card and writes the best into the launch table.

    python -m bench.gpu.tune --models 20b 120b [--write]

Each row of the table is tried at the largest number of tokens that it serves. Without --write it only prints.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys

import torch

from bench.gpu.kernels import DEVICE, Bench, Layer
from bench.gpu.timing import time_us
from gptoss.kernels.triton import support
from gptoss.kernels.triton.configs import TABLE, TileConfig, load_table

CANDIDATES = {
    "moe_w1": {"block_n": (32, 64, 128), "block_m": (8, 16), "warps": (1, 2, 4), "stages": (3, 4, 5)},
    "moe_w2": {"block_n": (16, 32, 64), "block_m": (8, 16), "warps": (1, 2, 4), "stages": (3, 4, 5)},
    "qkv": {"block_n": (16, 32, 64), "block_m": (16, 32), "warps": (1, 2, 4), "stages": (3, 4, 5)},
    "out": {"block_n": (16, 32), "block_m": (16, 32), "warps": (1, 2), "stages": (4, 5, 6)},
    "router": {"block_n": (1, 2, 4, 8), "block_m": (1, 2), "warps": (2, 4, 8), "stages": (1,)},
    "lm_head": {"block_n": (32, 64, 128), "block_m": (16, 32), "warps": (2, 4, 8), "stages": (3, 4, 5)},
    "attention": {"block_n": (64,), "block_m": (16,), "warps": (1, 2, 4), "stages": (2, 3, 4)},
}
LARGE = {"block_n": (64, 128), "block_m": (32, 64, 128, 256), "warps": (4, 8), "stages": (2, 3, 4)}
SIZES = {4: 1, 16: 16, 64: 32, 512: 128, 1 << 20: 8192}  # the row's limit -> tokens to try it at


def candidates(kernel: str, tokens: int) -> list[TileConfig]:
    grid = LARGE if tokens > 64 and kernel != "attention" else CANDIDATES[kernel]
    return [
        TileConfig(*values)
        for values in itertools.product(*(grid[k] for k in ("block_n", "block_m", "warps", "stages")))
    ]


def best(bench: Bench, configs: list[TileConfig]) -> tuple[TileConfig, float]:
    """Configurations that do not fit the card are passed over."""
    times: dict[TileConfig, float] = {}
    for config in configs:
        try:
            times[config] = time_us(lambda c=config: bench.launch(c), repeat_ms=20)
        except Exception as error:
            torch.cuda.synchronize()
            sys.stderr.write(f"{bench.name} {config}: {str(error).splitlines()[0][:100]}\n")
    config = min(times, key=lambda c: times[c])
    return config, times[config]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["20b"], choices=("20b", "120b"), help="the last one decides")
    parser.add_argument("--kernels", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--write", action="store_true", help="write the launch table")
    args = parser.parse_args(argv)
    architecture = support.architecture(DEVICE)
    table = {a: {k: [(n, c) for n, c in rows] for k, rows in kernels.items()} for a, kernels in load_table().items()}
    mine = table.setdefault(architecture, dict(table[max(a for a in table if a.startswith("sm_"))]))
    for model in args.models:
        layer = Layer(model)
        for kernel in args.kernels:
            for index, (limit, old) in enumerate(mine[kernel]):
                tokens = SIZES.get(limit, min(limit, 8192))
                for bench in layer.benches(tokens):
                    if bench.kernel != kernel or "cuBLAS" in bench.name:
                        continue
                    before = time_us(lambda b=bench, c=old: b.launch(c))
                    config, us = best(bench, candidates(kernel, tokens))
                    sys.stdout.write(f"{bench.name}: {before:.1f} us with {old}, {us:.1f} us with {config}\n")
                    sys.stdout.flush()
                    if us < before:
                        mine[kernel][index] = (limit, config)
    if args.write:
        raw = {
            a: {k: [{"tokens": n, **c.as_dict()} for n, c in rows] for k, rows in kernels.items()}
            for a, kernels in table.items()
        }
        TABLE.write_text(json.dumps(raw, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
