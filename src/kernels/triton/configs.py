"""How kernels are launched: tile sizes, warps and pipeline stages.

They depend on architecture, kernel and number of tokens. The table is launch_configs.json, written by bench/gpu/tune.py
from measurements and kept in the repository: nothing is tuned at start-up. An architecture that is not in it takes the
one with the nearest lower number.

`block_n` counts rows of the weights, `block_m` tokens (or assignments).
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("launch_configs.json")
INVARIANT = "invariant"  # the entry for batch_invariant: one kind of matrix instruction at every size


@dataclass(frozen=True, slots=True)
class TileConfig:
    block_n: int
    block_m: int
    warps: int
    stages: int
    split: int = 1  # programs that share the sum over K

    def as_dict(self) -> dict[str, int]:
        """`split` only where there is one, as in the table."""
        return {key: n for key, n in asdict(self).items() if key != "split" or n > 1}


@functools.cache
def load_table() -> dict[str, dict[str, list[tuple[int, TileConfig]]]]:
    """{architecture: {kernel: [(largest number of tokens, config), ...]}}"""
    raw: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(TABLE.read_text())
    return {
        architecture: {
            kernel: [
                (int(row["tokens"]), TileConfig(**{k: int(v) for k, v in row.items() if k != "tokens"})) for row in rows
            ]
            for kernel, rows in kernels.items()
        }
        for architecture, kernels in raw.items()
    }


@functools.cache
def config_for(architecture: str, kernel: str, tokens: int, *, invariant: bool = False) -> TileConfig:
    """The configuration of a kernel for that many tokens; with `invariant`, all sizes round alike."""
    table = load_table()[nearest(architecture)]
    rows = table[f"{kernel}.{INVARIANT}"] if invariant and f"{kernel}.{INVARIANT}" in table else table[kernel]
    return next((config for limit, config in rows if tokens <= limit), rows[-1][1])


def step_sizes(architecture: str) -> list[int]:
    """Numbers of tokens that together use every configuration of the architecture."""
    rows = (row for rows in load_table()[nearest(architecture)].values() for row in rows[:-1])
    return sorted({1, 2, *(limit + 1 for limit, _ in rows)})


@functools.cache
def nearest(architecture: str) -> str:
    names = list(load_table())
    if architecture in names:
        return architecture
    number = int(architecture.removeprefix("sm_"))
    older = [n for n in names if n.startswith("sm_") and int(n.removeprefix("sm_")) <= number]
    return max(older, key=lambda n: int(n.removeprefix("sm_")))
