"""Lists every launch of a Triton kernel by the model: gpt-oss-20b and -120b, each row of the launch table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from bench.kernels.cross_compile import Case
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.kernels.lora import NUM_MODULES
from gptoss.kernels.triton import attention, dense, experts, lora, routing, sampling, truncated
from gptoss.kernels.triton.configs import TileConfig, load_table, nearest
from gptoss.kernels.triton.fused_layers import DIRECT_TOKENS, FUSED_TOKENS
from gptoss.kernels.triton.metadata import TILE_TOKENS

BLOCK_SIZE = 64
LOGITS = {"logits_ptr": "*fp32"}
LIST = dict.fromkeys(("tile_expert_ptr", "tile_first_ptr", "tile_count_ptr", "rows_ptr"), "*i32")
PREFILL_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the launch table: for up to `tokens` tokens."""

    kernel: str
    tokens: int
    config: TileConfig
    invariant: bool

    @property
    def name(self) -> str:
        upto = "prefill" if self.tokens > PREFILL_TOKENS else f"<={self.tokens}"
        return f"{self.kernel}{' invariant' if self.invariant else ''} {upto}"


Maker = Callable[[ModelConfig, Row], Iterator[Case]]


def table_rows(architecture: str) -> Iterator[Row]:
    for key, rows in load_table()[nearest(architecture)].items():
        kernel, _, kind = key.partition(".")
        for tokens, config in rows:
            yield Row(kernel, tokens, config, bool(kind))


def cases(model: str, architecture: str) -> list[Case]:
    """`model`: "20b" or "120b"."""
    c = ModelConfig.from_json(hf_config(SIZES[model]))
    return [*distinct(c, architecture, _MAKERS), *_sampling(c), _norm(c), *_lora(c)]


def distinct(c: ModelConfig, architecture: str, makers: dict[str, Maker]) -> list[Case]:
    """What `makers` make of the rows of the launch table, each compilation once."""
    made: dict[tuple[Any, ...], Case] = {}
    for row in table_rows(architecture):
        for case in makers[row.kernel](c, row) if row.kernel in makers else ():
            key = (case.kernel.__name__, case.warps, *sorted((k, str(v)) for k, v in case.constexprs.items()))
            made.setdefault(key, case)
    return list(made.values())


def _tile(config: TileConfig) -> dict[str, Any]:
    return {"BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "STAGES": config.stages, "COMPUTE": tl.bfloat16}


def _absent(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def _moe(c: ModelConfig, row: Row) -> Iterator[Case]:
    shape = {
        "HIDDEN": c.hidden_size,
        "INTER": c.intermediate_size,
        "NUM_EXPERTS": c.num_experts,
        "PADDED_EXPERTS": triton.next_power_of_2(c.num_experts),
        "PER_TOKEN": c.experts_per_token,
        "ASM": True,
    }
    first = row.tokens <= FUSED_TOKENS and row.invariant
    kinds = (True, False) if row.tokens <= DIRECT_TOKENS or first else (False,)
    # steps with adapters list their tiles at every size
    for is_direct, has_lora in [*((kind, False) for kind in kinds), (False, True)]:
        lists = _absent(*LIST) if is_direct else {}
        constexprs = {**shape, **_tile(row.config), "DIRECT": is_direct, **lists}
        name = f"{'lora ' if has_lora else ''}{row.name}{' direct' if is_direct else ''}"
        weights = row.config.block_n * 128
        if row.kernel == "moe_w1":
            signature = {
                "x_ptr": "*bf16",
                "r_ptr": "*fp32",
                "words_ptr": "*i16",
                "scales_ptr": "*i32",
                "bias_ptr": "*bf16",
                "act_ptr": "*bf16",
                "num_tokens_ptr": "*i32",
                "limit": "fp32",
                "delta_ptr": "*fp32",
                **LOGITS,
                **LIST,
            }
            constexprs |= {} if has_lora else _absent("delta_ptr")
            yield Case(name, experts._moe_w1_kernel, signature, constexprs, row.config.warps, weights)
        else:
            signature = {
                "act_ptr": "*bf16",
                "words_ptr": "*i16",
                "scales_ptr": "*i32",
                "bias_ptr": "*bf16",
                "residual_ptr": "*bf16",
                "out_ptr": "*bf16",
                "parts_ptr": "*fp32",
                "counters_ptr": "*i32",
                "weights_ptr": "*fp32",
                "num_tokens_ptr": "*i32",
                "batch_size": "i32",
                **LOGITS,
                **LIST,
            }
            if is_direct:
                constexprs |= _absent("weights_ptr")
            constexprs["SPLIT"] = row.config.split if is_direct else 1
            yield Case(name, experts._moe_w2_kernel, signature, constexprs, row.config.warps, weights)


def _norms(row: Row) -> set[str]:
    return {"done"} if row.invariant or row.tokens > FUSED_TOKENS else {"fused"}


def _linear_case(
    row: Row, name: str, outputs: int, inputs: int, norm: str, out: str, *, rows: bool, residual: bool, bias: bool
) -> Case:
    absent = _absent(
        "w_scale_ptr",
        *(() if bias else ("bias_ptr",)),
        *(() if residual else ("residual_ptr",)),
        *(() if rows else ("rows_ptr",)),
        *(() if norm == "fused" else ("norm_ptr",)),
        *(() if norm == "done" else ("r_ptr",)),
    )
    signature = {
        "x_ptr": "*bf16",
        "w_ptr": "*bf16",
        "w_scale_ptr": "*fp32",
        "bias_ptr": "*bf16",
        "residual_ptr": "*bf16",
        "out_ptr": out,
        "rows_ptr": "*i64",
        "norm_ptr": "*bf16",
        "r_ptr": "*fp32",
        "eps": "fp32",
        "num_rows": "i32",
    }
    constexprs = {
        **_tile(row.config),
        "N": outputs,
        "K": inputs,
        "NORM": norm,
        "BLOCK_K": dense.BLOCK_K,
        "PREFETCH": norm == "none" and dense._prefetches(row.config),
        **absent,
    }
    weights = row.config.block_n * dense.BLOCK_K
    return Case(name, dense._linear_kernel, signature, constexprs, row.config.warps, weights)


def _out(c: ModelConfig, row: Row) -> Iterator[Case]:
    width = c.num_attention_heads * c.head_dim
    yield _linear_case(row, row.name, c.hidden_size, width, "none", "*bf16", rows=False, residual=True, bias=True)


def _lm_head(c: ModelConfig, row: Row) -> Iterator[Case]:
    for norm in _norms(row):
        fused = norm == "fused"
        yield _linear_case(
            row, row.name, c.vocab_size, c.hidden_size, norm, "*fp32", rows=fused, residual=False, bias=False
        )


def _router(c: ModelConfig, row: Row) -> Iterator[Case]:
    yield from _router_cases(c, row, has_lora=False)
    yield from _router_cases(c, row, has_lora=True)


def _router_cases(c: ModelConfig, row: Row, *, has_lora: bool) -> Iterator[Case]:
    name = f"{'lora ' if has_lora else ''}{row.name}"
    experts, hidden = c.num_experts, c.hidden_size
    padded = triton.next_power_of_2(experts)
    signature = {
        "x_ptr": "*bf16",
        "norm_ptr": "*bf16",
        "w_ptr": "*bf16",
        "bias_ptr": "*bf16",
        "scaled_ptr": "*bf16",
        "r_ptr": "*fp32",
        "eps": "fp32",
        "num_rows": "i32",
        "num_tokens_ptr": "*i32",
        "counter_ptr": "*i32",
        "chosen_ptr": "*i32",
        "counts_ptr": "*i32",
        "weights_ptr": "*fp32",
        "max_tiles": "i32",
        "delta_ptr": "*fp32",
        **LOGITS,
        **LIST,
    }
    shared = {
        **({} if has_lora else _absent("delta_ptr")),
        "N": experts,
        "K": hidden,
        "PER_TOKEN": c.experts_per_token,
        "LOCAL_FIRST": 0,
        "LOCAL": experts,
        "PADDED_LOCAL": padded,
    }
    if row.invariant or row.tokens > routing.FEW_TOKENS:
        constexprs = {
            **shared,
            **_tile(row.config),
            "BLOCK_K": routing.BLOCK_K,
            "BLOCK_N": max(row.config.block_n, padded),
        }
        yield Case(name, routing._route_many_kernel, signature, constexprs, row.config.warps)
        place = {
            "PER_TOKEN": c.experts_per_token,
            "PADDED_LOCAL": padded,
            "TOKENS": row.config.block_m,
            "CHUNK": min(32, 4096 // padded),
            "BLOCK_M": 16,
        }
        yield Case(f"place {row.name}", routing._place_kernel, signature, place, routing.PLACE_WARPS, mma=False)
        return
    direct = row.tokens <= DIRECT_TOKENS and not has_lora
    left = 1 << (hidden.bit_length() - 1)
    constexprs = {
        **shared,
        "LEFT": left,
        "RIGHT": triton.next_power_of_2(hidden - left),
        "ROWS": row.config.block_n,
        "TOKENS": row.config.block_m,
        "ALL_TOKENS": 0 if direct else routing._padded_tokens(row.tokens),
        "PADDED_EXPERTS": padded,
        "BLOCK_M": 0 if direct else 16,
        **(_absent("counter_ptr", "weights_ptr", "chosen_ptr", *LIST) if direct else {}),
    }
    yield Case(name, routing._route_few_kernel, signature, constexprs, row.config.warps, mma=False)


def _qkv(c: ModelConfig, row: Row) -> Iterator[Case]:
    signature = {
        "x_ptr": "*bf16",
        "w_ptr": "*bf16",
        "bias_ptr": "*bf16",
        "norm_ptr": "*bf16",
        "r_ptr": "*fp32",
        "eps": "fp32",
        "positions_ptr": "*i64",
        "rope_ptr": "*fp32",
        "slots_ptr": "*i64",
        "q_ptr": "*bf16",
        "key_ptr": "*bf16",
        "value_ptr": "*bf16",
        "num_rows": "i32",
    }
    for norm in _norms(row):
        absent = _absent("r_ptr") if norm == "fused" else _absent("norm_ptr")
        constexprs = {
            **_tile(row.config),
            "HEADS": c.num_attention_heads,
            "GROUPS": c.num_key_value_heads,
            "D": c.head_dim,
            "K": c.hidden_size,
            "NORM": norm,
            "BLOCK_K": dense.BLOCK_K,
            "PREFETCH": dense._prefetches(row.config),
            "ASM": True,
            **_absent("key_factor", "value_factor"),
            **absent,
        }
        yield Case(
            row.name, dense._qkv_kernel, signature, constexprs, row.config.warps, row.config.block_n * dense.BLOCK_K
        )


def _attention(c: ModelConfig, row: Row) -> Iterator[Case]:
    prefill = row.tokens > PREFILL_TOKENS
    signature = {
        "q_ptr": "*bf16",
        "key_ptr": "*bf16",
        "value_ptr": "*bf16",
        "sinks_ptr": "*bf16",
        "out_ptr": "*bf16",
        "tile_seq_ptr": "*i32",
        "tile_first_ptr": "*i32",
        "query_start_ptr": "*i32",
        "length_ptr": "*i32",
        "table_ptr": "*i32",
        "peaks_ptr": "*fp32",
        "totals_ptr": "*fp32",
        "parts_ptr": "*fp32",
        "counters_ptr": "*i32",
        "scale_log2": "fp32",
        "table_width": "i32",
        "max_pieces": "i32",
    }
    heads = c.num_attention_heads // c.num_key_value_heads
    rows = TILE_TOKENS * heads if prefill else row.config.block_m
    for window, split in ((0, False), (c.sliding_window, False)) if prefill else ((0, True), (c.sliding_window, False)):
        absent = {} if prefill else _absent("tile_seq_ptr", "tile_first_ptr")
        if not split:
            absent |= _absent("peaks_ptr", "totals_ptr", "parts_ptr")
        constexprs = {
            "HEADS": c.num_attention_heads,
            "GROUPS": c.num_key_value_heads,
            "D": c.head_dim,
            "BS": BLOCK_SIZE,
            "WINDOW": window,
            "SPLIT": split,
            "FIXED": row.invariant,
            "TOGETHER": attention.TOGETHER,
            "SHORT": attention.SHORT_SPLIT,
            "NUM_SHORT": attention.NUM_SHORT,
            "LONG": attention.LONG_SPLIT,
            "BLOCK_M": rows,
            "TILE": row.config.block_n,
            "STAGES": row.config.stages,
            "COMPUTE": tl.bfloat16,
            "value_scale": None,
            **absent,
        }
        name = f"{row.name} {'sliding' if window else 'full'}"
        yield Case(name, attention._attention_kernel, signature, constexprs, row.config.warps)


def _sampling(c: ModelConfig) -> list[Case]:
    tiles = triton.cdiv(c.vocab_size, sampling.TILE)
    signature = {
        "words_ptr": "*i32",
        "mask_rows_ptr": "*i32",
        "temperature_ptr": "*fp32",
        "uniform_ptr": "*fp32",
        "peaks_ptr": "*fp32",
        "places_ptr": "*i32",
        "sums_ptr": "*fp32",
        "tokens_ptr": "*i64",
        "best_ptr": "*fp32",
        "rows_ptr": "*i64",
        "candidates_ptr": "*i64",
        "numbers_ptr": "*fp64",
        "right_ptr": "*i8",
        "count": "i32",
        **LOGITS,
    }
    shape = {"VOCAB": c.vocab_size, "WORDS": triton.cdiv(c.vocab_size, 32), "TILES": tiles, "TILE": sampling.TILE}
    padded = {"PADDED_TILES": triton.next_power_of_2(tiles)}
    top = {"TOP": truncated.TOP}
    draw = {"VOCAB": c.vocab_size, "TILES": tiles, **padded, **top}
    return [
        Case("sample tiles", sampling._tile_kernel, signature, shape, 8, mma=False),
        Case("sample pick", sampling._pick_kernel, signature, shape | padded, 8, mma=False),
        Case("candidates", truncated._candidates_kernel, signature, shape | top, truncated.WARPS, mma=False),
        Case("draw", truncated._draw_kernel, signature, draw, truncated.WARPS, mma=False),
    ]


def _norm(c: ModelConfig) -> Case:
    signature = {"x_ptr": "*bf16", "scale_ptr": "*bf16", "out_ptr": "*bf16", "r_ptr": "*fp32", "eps": "fp32"}
    constexprs = {"K": c.hidden_size, "PADDED_K": triton.next_power_of_2(c.hidden_size)}
    return Case("norm tokens", dense._norm_tokens_kernel, signature, constexprs, 4, mma=False)


def _lora(c: ModelConfig) -> Iterator[Case]:
    signature = {
        "table_ptr": "*i64",
        "x_ptr": "*bf16",
        "r_ptr": "*fp32",
        "u_ptr": "*fp32",
        "weights_ptr": "*fp32",
        "slots_ptr": "*i64",
        "chosen_ptr": "*i32",
        **{f"tile_{name}_ptr": "*i32" for name in ("slot", "first", "count")},
        "rows_ptr": "*i32",
        **dict.fromkeys(("module", "width", "first", "stride"), "i32"),
    }
    shape = {"NUM_MODULES": NUM_MODULES, "ELEMENT": tl.bfloat16, "BLOCK_R": lora.BLOCK_R}
    heads, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    hidden, inter = c.hidden_size, c.intermediate_size
    tile = {"BLOCK_M": lora.BLOCK_M, "COMPUTE": tl.bfloat16}
    for inputs, absent in ((hidden, ()), (heads, ("r_ptr",))):
        shrink = {**shape, **tile, "K": inputs, "BLOCK_K": lora.BLOCK_K, "STAGES": lora.STAGES, **_absent(*absent)}
        yield Case(f"lora shrink {inputs}", lora._shrink_kernel, signature, shrink, lora.WARPS)
    for outputs, kind in ((heads, "*fp32"), (groups, "*fp32"), (c.num_experts, "*fp32"), (hidden, "*bf16")):
        expand = {**shape, **tile, "N": outputs, "BLOCK_N": lora.BLOCK_N}
        name = f"lora expand {outputs}"
        yield Case(name, lora._expand_kernel, signature | {"out_ptr": kind}, expand, lora.WARPS)
    each = {**shape, "PER_TOKEN": c.experts_per_token}
    for inputs, by_token in ((hidden, True), (inter, False)):
        shrink = {**each, "K": inputs, "BY_TOKEN": by_token, "BLOCK_K": lora.BLOCK_K}
        shrink |= {} if by_token else _absent("r_ptr")
        name = f"lora shrink experts {inputs}{' by token' if by_token else ''}"
        yield Case(name, lora._expert_shrink_kernel, signature, shrink, lora.WARPS, mma=False)
    for outputs, parts in ((2 * inter, 1), (hidden, c.experts_per_token)):
        expand = {**each, "N": outputs, "PARTS": parts, "BLOCK_N": lora.BLOCK_N}
        expand |= _absent("weights_ptr") if parts == 1 else {}
        out = {"out_ptr": "*fp32" if parts == 1 else "*bf16"}
        name = f"lora expand experts {outputs}"
        yield Case(name, lora._expert_expand_kernel, signature | out, expand, lora.WARPS, mma=False)
    added = {f"{name}_ptr": "*bf16" for name in ("q", "key", "value")} | {
        "delta_ptr": "*fp32",
        "positions_ptr": "*i64",
        "rope_ptr": "*fp32",
        "slots_ptr": "*i64",
        "lora_slots_ptr": "*i64",
    }
    sizes = {"HEADS": c.num_attention_heads, "GROUPS": c.num_key_value_heads, "D": c.head_dim}
    yield Case("lora add qkv", lora._add_qkv_kernel, added, sizes, 1, mma=False)


_MAKERS: dict[str, Maker] = {
    "moe_w1": _moe,
    "moe_w2": _moe,
    "out": _out,
    "lm_head": _lm_head,
    "router": _router,
    "qkv": _qkv,
    "attention": _attention,
}
