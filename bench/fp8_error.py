"""What `--kv-cache-dtype fp8` and `--lm-head-dtype fp8` change in the answers, and what other scales would gain.

    python bench/fp8_error.py [--model nano mini] [--tokens 64] [--results bench/RESULTS.md]

Models and prompts are those of int8_error.py, on plain torch. Logits are those of each position of bfloat16's own
greedy answers, so all read the same tokens. Scales are compared in float32, where nothing else is rounded: 1; one for
the keys and one for the values of each layer, which map the largest number of these very prompts to 448; one for each
token and head beside its numbers, which maps its largest to 448.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.int8_error import Case, Difference, Tokens, common, engine, greedy, logits, models
from gptoss.engine.core.core import EngineCore
from gptoss.engine.worker.worker import Worker
from gptoss.kernels.cpu import native
from gptoss.kernels.fp8 import LARGEST, dequantize_fp8, quantize_fp8
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.reference import backend as reference

Scale = Callable[
    [torch.Tensor, float], torch.Tensor | float
]  # of rows [T, G, D], given the largest number of the layer


@dataclass
class Layers:
    """The largest key and value of each layer, in the order in which layers are computed."""

    largest: list[float] = field(default_factory=list)
    at: int = 0


def constant(_: torch.Tensor, largest: float) -> float:
    return 1.0


def of_layer(_: torch.Tensor, largest: float) -> float:
    return largest / LARGEST


def of_token_and_head(rows: torch.Tensor, largest: float) -> torch.Tensor:
    return rows.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / LARGEST


SCALES: dict[str, Scale] = {"1": constant, "of a layer": of_layer, "of a token and head": of_token_and_head}


class Rounding:
    """Sums over all rows that were stored of what rounding changed in them."""

    def __init__(self) -> None:
        self.squares = {"keys": 0.0, "values": 0.0}
        self.whole = {"keys": 0.0, "values": 0.0}
        self.largest = {"keys": 0.0, "values": 0.0}
        self.smallest_layer = {"keys": float("inf"), "values": float("inf")}  # root mean square

    def add(self, kind: str, rows: torch.Tensor, rounded: torch.Tensor) -> None:
        self.squares[kind] += float((rows - rounded).double().square().sum())
        self.whole[kind] += float(rows.double().square().sum())
        self.largest[kind] = max(self.largest[kind], float(rows.abs().max()))
        self.smallest_layer[kind] = min(self.smallest_layer[kind], float(rows.square().mean().sqrt()))

    def relative(self, kind: str) -> float:
        return float((self.squares[kind] / self.whole[kind]) ** 0.5)


@contextmanager
def rounded(scale: Scale, layers: dict[str, Layers], found: Rounding) -> Iterator[None]:
    """Meanwhile keys and values are rounded to FP8 when they are stored in a cache of another type."""

    def store(key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        for kind, rows, stored in (("keys", key, cache.key), ("values", value, cache.value)):
            mine = layers[kind]
            factor = scale(rows, mine.largest[mine.at % len(mine.largest)])
            mine.at += 1
            new = dequantize_fp8(quantize_fp8(rows, factor), factor, rows.dtype)
            found.add(kind, rows, new)
            stored.flatten(0, 1).index_copy_(0, slots, new)

    with mock.patch.object(reference, "store_kv_ref", store):
        yield


def largest_numbers(core: EngineCore, cases: list[Case]) -> dict[str, Layers]:
    worker = core.executor.worker
    assert isinstance(worker, Worker)
    count = worker.config.model.num_layers
    layers = {kind: Layers([0.0] * count) for kind in ("keys", "values")}
    original = reference.store_kv_ref

    def store(key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        for kind, rows in (("keys", key), ("values", value)):
            mine = layers[kind]
            at = mine.at % count
            mine.largest[at] = max(mine.largest[at], float(rows.abs().max()))
            mine.at += 1
        original(key, value, cache, slots)

    with mock.patch.object(reference, "store_kv_ref", store):
        for case in cases:
            logits(core, case)
    return layers


def compare(name: str, folder: Path, prompts: list[Tokens], stop: tuple[int, ...], count: int) -> str:
    with mock.patch.object(native, "supports", lambda dtype: False):  # plain torch for bfloat16 too
        plain = engine(folder, dtype="bfloat16")
        fp8 = engine(folder, dtype="bfloat16", kv_cache_dtype="fp8")
        head = engine(folder, dtype="bfloat16", lm_head_dtype="fp8")
        exact = engine(folder, dtype="float32")
    cases = [Case(*pair) for pair in zip(prompts, greedy(plain, prompts, count, stop), strict=True)]
    others = {"cache": greedy(fp8, prompts, count, stop), "head": greedy(head, prompts, count, stop)}
    added, rounding, both, of_head = Difference(), Difference(), Difference(), Difference()
    by_scale = {scale: (Difference(), Rounding()) for scale in SCALES}
    layers = largest_numbers(exact, cases)
    for case in cases:
        three = [logits(core, case) for core in (exact, plain, fp8)]
        rounding.add(three[0], three[1])
        added.add(three[1], three[2])
        both.add(three[0], three[2])
        of_head.add(three[1], logits(head, case))
        for scale, (difference, found) in by_scale.items():
            with rounded(SCALES[scale], layers, found):
                difference.add(three[0], logits(exact, case, torch.float32))
    total = sum(len(case.answer) for case in cases)
    lines = [
        f"{name}: {len(cases)} prompts, {total} tokens of bfloat16's greedy answers.",
        "",
        "| | relative RMS of the logits | KL divergence, nats | same most likely token |",
        "|---|---|---|---|",
        row("FP8 cache against bfloat16", added),
        row("FP8 head against bfloat16", of_head),
        row("bfloat16 against float32", rounding),
        row("FP8 cache against float32", both),
        *(row(f"in float32, scale {scale}", found) for scale, (found, _) in by_scale.items()),
        "",
        *(agreement(name, cases, found) for name, found in others.items()),
        "",
        "| scale | relative RMS of keys | of values | largest key | largest value | smallest RMS of a layer's values |",
        "|---|---|---|---|---|---|",
        *(
            f"| {scale} | {r.relative('keys'):.4f} | {r.relative('values'):.4f} | {r.largest['keys']:.1f} | "
            f"{r.largest['values']:.1f} | {r.smallest_layer['values']:.3f} |"
            for scale, (_, r) in by_scale.items()
        ),
        "",
    ]
    return "\n".join(lines)


def agreement(name: str, cases: list[Case], others: list[Tokens]) -> str:
    pairs = [(case.answer, other) for case, other in zip(cases, others, strict=True)]
    total, before = sum(len(answer) for answer, _ in pairs), sum(common(*pair) for pair in pairs)
    equal = sum(answer == other for answer, other in pairs)
    return (
        f"Greedy answers with a {name} in FP8: {equal} of {len(pairs)} equal; {before} of {total} tokens before the "
        "first difference."
    )


def row(name: str, d: Difference) -> str:
    rms = (d.squares / d.reference_squares) ** 0.5
    return f"| {name} | {rms:.4f} | {d.divergence / d.count:.1e} | {d.same} / {d.count} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=("nano", "mini"), default=["nano", "mini"])
    parser.add_argument("--tokens", type=int, default=64, help="of each answer, at most")
    parser.add_argument("--results", type=Path, help="file to append the tables to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name, folder, prompts, stop in models(args.model, Path(temporary)):
            text = compare(name, folder, prompts, stop, args.tokens)
            print(text, flush=True)
            if args.results:
                with args.results.open("a") as file:
                    file.write(f"\n{text}")


if __name__ == "__main__":
    main()
