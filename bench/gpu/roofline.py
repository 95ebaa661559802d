"""Estimates the time of a decode step on a card, kernel by kernel, from bytes and instructions.

    python -m bench.gpu.roofline [--card H200] [--model 20b] [--batch 1 32] [--context 1024] [--json FILE]
    python -m bench.gpu.roofline --context 8192 32768 --fp8 none kv both

Instructions come from the kernels compiled for the card, bytes from the model's shapes. Three things limit a kernel:
its bytes at the memory's rate, the instructions of the busiest scheduler, and loads that wait for each other:

    time = max(bytes / bandwidth / 0.78 (0.96 above 500 MB), warps of a scheduler x instructions / clock / IPC + 0.6 us
    x dependent trips)

IPC is 0.6 for one warp, which cannot issue in the clocks after most instructions, and 0.8 for two or more. A launch in
a graph costs 1 us more. Weights that are requested before the wait arrive while the previous kernel leaves the memory
idle, and afterwards at the L2 cache's rate. All these figures are estimates, to be confirmed on a card.
`BEFORE` are the counts of commit 656da0c, to which the same formula is applied.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

from bench.arguments import new_file, whole
from bench.kernels.cases import PREFILL_TOKENS, cases
from bench.kernels.cross_compile import Compiled, cross_compile
from bench.kernels.fp8_cases import fp8_cases
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.kernels.triton import attention, fused_layers
from gptoss.kernels.triton.configs import TileConfig, config_for

MEMORY, STREAM, ONE_WARP, MORE_WARPS, TRIP_US, GAP_US = 0.78, 0.96, 0.6, 0.8, 0.6, 1.0
STREAM_MEGABYTES = 500
OUTSIDE_US = 45.0  # embedding, sampler and copies between two graphs
CONTEXT = 1024
MAX_BATCH, MAX_CONTEXT = 1024, 131_072  # of a server
TILE_KEYS = 64
FP8_PARTS = {"none": frozenset[str](), "kv": frozenset({"kv"}), "both": frozenset({"kv", "head"})}


@dataclass(frozen=True, slots=True)
class Card:
    capability: int
    sms: int
    gigahertz: float
    terabytes: float  # a second, of a copy
    l2_terabytes: float


CARDS = {
    "H200": Card(90, 132, 1.98, 4.3, 5.5),
    "H100": Card(90, 132, 1.98, 3.0, 5.5),
    "A100": Card(80, 108, 1.41, 1.8, 4.0),
    "B200": Card(100, 148, 1.85, 7.0, 9.0),
    "RTX 5090": Card(120, 170, 2.4, 1.6, 5.0),
}


@dataclass(frozen=True, slots=True)
class Work:
    """One launch. `calls` a layer: 0.5 is one of two kinds of layer."""

    kernel: str
    ctas: int
    warps: int
    instructions: int
    megabytes: float
    trips: int = 0
    early_bytes: int = 0  # of a warp
    calls: float = 1.0
    tail: int = 0  # instructions that only the last program executes, after the others


# on sm_90 at commit 656da0c, batch 1, counted in the same way: CTAs, warps, instructions of a warp, dependent trips
BEFORE = {
    "20b": {
        "qkv": (160, 2, 7816, 0),
        "attention full": (32, 2, 3600, 8),
        "attention sliding": (8, 2, 2700, 4),
        "out": (180, 1, 5700, 0),
        "router": (2, 1, 12_064, 0),
        "moe_w1": (720, 1, 9804, 0),
        "moe_w2": (360, 1, 9980, 2),
    },
    "120b": {
        "qkv": (160, 2, 7894, 0),
        "attention full": (32, 2, 3571, 8),
        "attention sliding": (8, 2, 2636, 4),
        "out": (180, 1, 5692, 0),
        "router": (8, 1, 11_776, 0),
        "moe_w1": (720, 1, 9847, 0),
        "moe_w2": (360, 1, 10_033, 2),
    },
}


class Step:
    """A model's decode step of `batch` sequences."""

    def __init__(
        self, model: str, batch: int, card: Card, context: int = CONTEXT, fp8: frozenset[str] = frozenset()
    ) -> None:
        """`context`: tokens of each sequence. `fp8`: "kv" for keys and values in FP8, "head" for the output head."""
        self.model, self.batch, self.card, self.context = model, batch, card, context
        self.fp8 = {"attention": "kv" in fp8, "qkv": "kv" in fp8, "lm_head": "head" in fp8}
        self.c = ModelConfig.from_json(hf_config(SIZES[model]))
        self.architecture = f"sm_{card.capability}"
        made = [*cases(model, self.architecture), *fp8_cases(model, self.architecture)]
        self._cases = {case.name: case for case in made}

    def _compiled(self, kernel: str, suffix: str = "") -> tuple[Compiled, TileConfig]:
        from gptoss.kernels.triton.configs import load_table, nearest

        tokens = 1 if kernel == "attention" else self.batch
        config = config_for(self.architecture, kernel, tokens)
        rows = load_table()[nearest(self.architecture)][kernel]
        limit = next(n for n, _ in rows if tokens <= n)
        upto = "prefill" if limit > PREFILL_TOKENS else f"<={limit}"
        name = f"{kernel} {upto}{suffix}"
        case = self._cases[f"fp8 {name}" if self.fp8.get(kernel) else name]
        return cross_compile(case, self.card.capability), config

    def work(self) -> list[Work]:
        c, b = self.c, self.batch
        hidden, inter, k = c.hidden_size, c.intermediate_size, c.experts_per_token
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        used = c.num_experts * (1 - (1 - k / c.num_experts) ** b)  # distinct experts, evenly routed
        direct = b <= fused_layers.DIRECT_TOKENS
        suffix = " direct" if direct else ""
        tiles = b * k if direct else math.ceil(used)
        return [
            self._dense("qkv", q + 2 * kv, hidden),
            *self._attention(),
            self._dense("out", hidden, q),
            self._router(),
            self._experts("moe_w1", suffix, tiles, 2 * inter, hidden, used, 0),
            self._experts("moe_w2", suffix, tiles, hidden, inter, used, 2),
        ]

    def head(self) -> Work:
        return self._dense("lm_head", self.c.vocab_size, self.c.hidden_size, 1e-6 if self.fp8["lm_head"] else 2e-6)

    def _dense(self, kernel: str, rows: int, columns: int, element: float = 2e-6) -> Work:
        made, config = self._compiled(kernel)
        ctas = math.ceil(rows / config.block_n) * math.ceil(self.batch / config.block_m)
        count = made.longest(math.ceil(columns / 64))
        return Work(kernel, ctas, config.warps, count, rows * columns * element, 0, made.early_bytes)

    def _attention(self) -> list[Work]:
        c, b = self.c, self.batch
        groups, dim = c.num_key_value_heads, c.head_dim
        tiles = math.ceil(self.context / TILE_KEYS)
        pieces = min(attention.MAX_PIECES, tiles, max(1, attention.MAX_PROGRAMS // (b * groups)))
        each = math.ceil(tiles / pieces)
        pieces = math.ceil(tiles / each)
        row_bytes = 2 * groups * dim * (1e-6 if self.fp8["attention"] else 2e-6)
        full, config = self._compiled("attention", " full")
        sliding, _ = self._compiled("attention", " sliding")
        seen = min(c.sliding_window, self.context)
        window = min(math.ceil(seen / TILE_KEYS) + 1, tiles)
        rounds = math.ceil(pieces / attention.TOGETHER)
        return [
            Work(
                "attention full",
                b * groups * pieces,
                config.warps,
                full.longest(each),
                b * self.context * row_bytes,
                3 + rounds,
                calls=0.5,
            ),
            Work(
                "attention sliding",
                b * groups,
                config.warps,
                sliding.longest(window),
                b * seen * row_bytes,
                2,
                calls=0.5,
            ),
        ]

    def _router(self) -> Work:
        made, config = self._compiled("router")
        experts, hidden = self.c.num_experts, self.c.hidden_size
        ctas = math.ceil(experts / config.block_n) * math.ceil(self.batch / config.block_m)
        tail = made.instructions - made.ordinary
        trips = 2 if self.batch <= fused_layers.DIRECT_TOKENS else 5
        return Work(
            "router", ctas, config.warps, made.ordinary, experts * hidden * 2e-6, trips, made.early_bytes, 1.0, tail
        )

    def _experts(self, kernel: str, suffix: str, tiles: int, rows: int, columns: int, used: float, trips: int) -> Work:
        made, config = self._compiled(kernel, suffix)
        split = config.split if suffix else 1
        ctas = math.ceil(rows / config.block_n) * tiles * split
        count = made.longest(math.ceil(math.ceil(columns / 128) / split), last=True)
        return Work(kernel, ctas, config.warps, count, used * rows * columns * 17 / 32 * 1e-6, trips, made.early_bytes)

    def before(self, now: list[Work]) -> list[Work] | None:
        """The same kernels as they were, where they were counted."""
        if (self.batch, self.card.capability) != (1, 90):
            return None
        return [
            Work(w.kernel, ctas, warps, count, w.megabytes, trips, 0, w.calls)
            for w in now
            for ctas, warps, count, trips in [BEFORE[self.model][w.kernel]]
        ]


@dataclass(frozen=True, slots=True)
class Time:
    work: Work
    warps_a_scheduler: float
    roof_us: float
    floor_us: float
    us: float


def times(works: list[Work], card: Card) -> list[Time]:
    """In the order of the step: what a kernel asks for early comes while the one before leaves the memory idle."""
    found: list[Time] = []
    idle_us = 0.0
    schedulers = 4 * card.sms
    for w in works:
        warps = w.ctas * w.warps
        depth = math.ceil(warps / schedulers)
        clocks = depth * w.instructions
        ipc = ONE_WARP if depth == 1 else MORE_WARPS
        floor = clocks / card.gigahertz / 1e3
        chain = floor / ipc + w.tail / ONE_WARP / card.gigahertz / 1e3 + TRIP_US * w.trips
        roof = w.megabytes / card.terabytes
        early = min(w.early_bytes * warps / 1e6, w.megabytes, idle_us * MEMORY * card.terabytes)
        reached = STREAM if w.megabytes > STREAM_MEGABYTES else MEMORY
        memory = (w.megabytes - early) / card.terabytes / reached
        if early:
            memory = max(memory, w.megabytes / card.l2_terabytes)
        us = max(memory, chain)
        found.append(Time(w, warps / schedulers, roof, floor, us))
        if w.calls == 1.0 or "full" in w.kernel:
            idle_us = max(0.0, us - roof / MEMORY)
    return found


def step_us(found: list[Time], head: Time, layers: int) -> tuple[float, float]:
    """-> (a layer, the step)."""
    launches = sum(t.work.calls for t in found)
    layer = sum(t.us * t.work.calls for t in found) + GAP_US * launches
    return layer, layers * layer + head.us + GAP_US + OUTSIDE_US


def report(
    model: str, batch: int, card: Card, context: int = CONTEXT, fp8: frozenset[str] = frozenset()
) -> dict[str, Any]:
    step = Step(model, batch, card, context, fp8)
    now, head = step.work(), step.head()
    found, head_time = times(now, card), times([head], card)[0]
    layer, total = step_us(found, head_time, step.c.num_layers)
    result: dict[str, Any] = {
        "model": model,
        "batch": batch,
        "context": context,
        "fp8": sorted(fp8),
        "layer_us": round(layer, 1),
        "step_us": round(total),
        "tok_s": round(batch / total * 1e6),
        "kernels": [asdict(t) for t in [*found, head_time]],
    }
    old = step.before(now) if context == CONTEXT and not fp8 else None
    if old is not None:
        times_before = times(old, card)
        layer, total = step_us(times_before, head_time, step.c.num_layers)
        result["before"] = {
            "layer_us": round(layer, 1),
            "step_us": round(total),
            "tok_s": round(batch / total * 1e6),
            "kernels": [asdict(t) for t in times_before],
        }
    return result


def show(result: dict[str, Any]) -> None:
    out = sys.stdout.write
    names = {"kv": "KV cache", "head": "output head"}
    cache = f", {' and '.join(names[part] for part in result['fp8'])} in FP8" if result["fp8"] else ""
    out(f"\n{result['model']}, batch {result['batch']}, {result['context']} tokens of context{cache}\n\n")
    head = "| kernel | CTAs x warps | warps a scheduler | MB | roof us | instructions of a warp | floor us | early KB a CTA | us"
    before = {t["work"]["kernel"]: t for t in result.get("before", {}).get("kernels", [])}
    out(head + (" | before: CTAs x warps | instructions | us |\n" if before else " |\n"))
    out("|" + "---|" * (12 if before else 9) + "\n")
    for t in result["kernels"]:
        w = t["work"]
        tail = f" + {w['tail']} once" if w["tail"] else ""
        line = (
            f"| {w['kernel']} | {w['ctas']}x{w['warps']} | {t['warps_a_scheduler']:.2f} | {w['megabytes']:.1f} | "
            f"{t['roof_us']:.1f} | {w['instructions']:,}{tail} | {t['floor_us']:.1f} | "
            f"{w['early_bytes'] * w['warps'] / 1e3:.1f} | {t['us']:.1f} |"
        )
        if before:
            o = before.get(w["kernel"])
            line += (
                f" {o['work']['ctas']}x{o['work']['warps']} | {o['work']['instructions']:,} | {o['us']:.1f} |"
                if o
                else " | | |"
            )
        out(line + "\n")
    was = result.get("before")
    compared = f" (before: {was['layer_us']} us, {was['tok_s']:,} tok/s)" if was else ""
    out(f"\na layer {result['layer_us']} us, a step {result['step_us']:,} us, {result['tok_s']:,} tok/s{compared}\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="H200", choices=CARDS)
    parser.add_argument("--model", nargs="+", default=["20b", "120b"], choices=("20b", "120b"))
    parser.add_argument("--batch", nargs="+", type=whole(1, MAX_BATCH), default=[1, 32])
    parser.add_argument(
        "--context", nargs="+", type=whole(1, MAX_CONTEXT), default=[CONTEXT], help="tokens of each sequence"
    )
    parser.add_argument("--fp8", nargs="+", default=["none"], choices=FP8_PARTS, help="what is in FP8")
    parser.add_argument("--json", type=new_file)
    args = parser.parse_args(argv)
    card = CARDS[args.card]
    if args.fp8 != ["none"] and card.capability < 89:
        parser.error(f"--fp8 needs sm_89 or later, and {args.card} is sm_{card.capability}")
    results = [
        report(m, b, card, context, FP8_PARTS[kind])
        for m in args.model
        for b in args.batch
        for context in args.context
        for kind in args.fp8
    ]
    for result in results:
        show(result)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
