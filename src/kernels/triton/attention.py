"""Attention over the block-structured cache, with sinks, sliding window and split keys.

One kernel serves prefill and decode. In prefill one program walks all keys of its queries by an online softmax. In
decode the keys of a sequence are shared out between programs, and the last to finish adds their pieces in their order,
the sink last.

With `fixed`, what a token sees depends on neither the batch nor the way it was computed: keys are cut into splits at
fixed positions of the sequence, in prefill too, a split is reduced by a softmax of its own, and the splits are added in
their order. Since the running maximum is rounded up to a whole power of two, every rescaling is exact, and both ways
give the same bits. Without it decode cuts as finely as there are programs, down to a tile of keys.

The sink is one more softmax column without a value (gpt-oss model card, section 2.2).

Shapes: T query tokens of S sequences, N query heads, G key-value heads, Q = N / G, D head_dim, NB blocks, BS tokens a
block, L columns of the block table. A row is one query head of one token; a tile holds BLOCK_M rows, of BLOCK_M / Q
tokens.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from gptoss.kernels.layers import LayerCache
from gptoss.kernels.triton import support
from gptoss.kernels.triton.configs import TileConfig
from gptoss.kernels.triton.metadata import TILE_TOKENS, TritonAttentionMetadata

SHORT_SPLIT = 256
NUM_SHORT = 32
LONG_SPLIT = 2048
LONG_FROM = SHORT_SPLIT * NUM_SHORT
MIN_PIECE = 64
MAX_PIECES = 64
TOGETHER = 8  # pieces that are loaded at once
FP8_WARPS = 8  # with 2 or 4 registers spill on some cards
MAX_PROGRAMS = 1024  # about what a GPU holds at once; splits beyond are walked by the same programs


@triton.jit
def power_of_two(exponent):
    """float32 whole numbers <= 0 (or -inf) -> 2 ** exponent, exactly; 0 below the normal numbers."""
    whole = tl.maximum(exponent, -127.0).to(tl.int32)
    return ((whole + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split_start(split, SHORT: tl.constexpr, NUM_SHORT: tl.constexpr, LONG: tl.constexpr):
    return tl.where(split < NUM_SHORT, split * SHORT, SHORT * NUM_SHORT + (split - NUM_SHORT) * LONG)


@triton.jit
def split_of(position, SHORT: tl.constexpr, NUM_SHORT: tl.constexpr, LONG: tl.constexpr):
    return tl.where(position < SHORT * NUM_SHORT, position // SHORT, NUM_SHORT + (position - SHORT * NUM_SHORT) // LONG)


@triton.jit
def attend_split(
    q, position, key_ptr, value_ptr, table_ptr, group, low, high, scale_log2,
    WINDOW: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, BLOCK_M: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Attends to keys low ... high - 1, `low` a multiple of TILE.

    -> (maximum [BLOCK_M], sum [BLOCK_M], values [BLOCK_M, D])
    """
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    offset = tl.arange(0, TILE)
    d = tl.arange(0, D)
    for start in tl.range(low, high, TILE, num_stages=STAGES):
        block = tl.load(table_ptr + start // BS).to(tl.int64)
        row = (block * BS + start % BS + offset) * GROUPS + group
        key_at = start + offset
        inside = key_at < high
        k = tl.load(key_ptr + row[None, :] * D + d[:, None], mask=inside[None, :], other=0.0)
        scores = tl.dot(q, k.to(COMPUTE)) * scale_log2
        seen = inside[None, :] & (key_at[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (key_at[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.ceil(tl.max(scores, axis=1)))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(scores - base[:, None])
        old = power_of_two(peak - base)
        total = total * old + tl.sum(p, axis=1)
        v = tl.load(value_ptr + row[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(p.to(COMPUTE), v.to(COMPUTE), acc * old[:, None])
        peak = new_peak
    return peak, total, acc


@triton.jit
def add_split(peak, total, acc, split_peak, split_total, split_acc):
    new_peak = tl.maximum(peak, split_peak)
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    mine = power_of_two(peak - base)
    other = power_of_two(split_peak - base)
    return (new_peak, total * mine + split_total * other, acc * mine[:, None] + split_acc * other[:, None])


@triton.jit
def add_pieces(
    peak, total, acc, peaks_ptr, totals_ptr, parts_ptr, at, valid, left, D: tl.constexpr, TOGETHER: tl.constexpr
):  # fmt: skip
    """Adds the next TOGETHER pieces of each row, or the `left` ones, in their order.

    They are loaded all at once: one wait for the memory. What is not there has no weight, and leaves all bits as they
    are.
    """
    d = tl.arange(0, D)
    peak_0, total_0, part_0 = load_piece(peaks_ptr, totals_ptr, parts_ptr, at + 0, valid & (left > 0), d, D)
    peak_1, total_1, part_1 = load_piece(peaks_ptr, totals_ptr, parts_ptr, at + 1, valid & (left > 1), d, D)
    peak_2, total_2, part_2 = load_piece(peaks_ptr, totals_ptr, parts_ptr, at + 2, valid & (left > 2), d, D)
    peak_3, total_3, part_3 = load_piece(peaks_ptr, totals_ptr, parts_ptr, at + 3, valid & (left > 3), d, D)
    peak_4, total_4, part_4 = load_piece(peaks_ptr, totals_ptr, parts_ptr, at + 4, valid & (left > 4), d, D)
    peak_5, total_5, part_5 = load_piece(peaks_ptr, totals_ptr, parts_ptr, at + 5, valid & (left > 5), d, D)
    peak_6, total_6, part_6 = load_piece(peaks_ptr, totals_ptr, parts_ptr, at + 6, valid & (left > 6), d, D)
    peak_7, total_7, part_7 = load_piece(peaks_ptr, totals_ptr, parts_ptr, at + 7, valid & (left > 7), d, D)
    tl.static_assert(TOGETHER == 8)
    peak, total, acc = add_split(peak, total, acc, peak_0, total_0, part_0)
    peak, total, acc = add_split(peak, total, acc, peak_1, total_1, part_1)
    peak, total, acc = add_split(peak, total, acc, peak_2, total_2, part_2)
    peak, total, acc = add_split(peak, total, acc, peak_3, total_3, part_3)
    peak, total, acc = add_split(peak, total, acc, peak_4, total_4, part_4)
    peak, total, acc = add_split(peak, total, acc, peak_5, total_5, part_5)
    peak, total, acc = add_split(peak, total, acc, peak_6, total_6, part_6)
    peak, total, acc = add_split(peak, total, acc, peak_7, total_7, part_7)
    return peak, total, acc


@triton.jit
def load_piece(peaks_ptr, totals_ptr, parts_ptr, at, there, d, D: tl.constexpr):
    return (
        tl.load(peaks_ptr + at, mask=there, other=float("-inf"), cache_modifier=".cg"),
        tl.load(totals_ptr + at, mask=there, other=0.0, cache_modifier=".cg"),
        tl.load(
            parts_ptr + at[:, None] * D + d[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg"
        ),
    )  # fmt: skip


@triton.jit
def finish(peak, total, acc, sink_log2):
    """Adds the sink and divides."""
    new_peak = tl.maximum(peak, tl.ceil(sink_log2))
    mine = power_of_two(peak - new_peak)
    total = total * mine + tl.exp2(sink_log2 - new_peak)
    return acc * (mine / total)[:, None]


@triton.jit(do_not_specialize=["table_width", "max_pieces"])
def _attention_kernel(
    q_ptr, key_ptr, value_ptr, sinks_ptr, out_ptr, tile_seq_ptr, tile_first_ptr, query_start_ptr, length_ptr, table_ptr,
    peaks_ptr, totals_ptr, parts_ptr, counters_ptr, scale_log2, value_scale, table_width, max_pieces,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, WINDOW: tl.constexpr,
    SPLIT: tl.constexpr, FIXED: tl.constexpr, SHORT: tl.constexpr, NUM_SHORT: tl.constexpr, LONG: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, TOGETHER: tl.constexpr, COMPUTE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (G, tiles, programs a tile). Without tile_seq, tile s is sequence s with its one new token.

    SPLIT: programs share a tile's keys and leave their pieces in peaks, totals [T N, max_pieces] and parts
    [T N, max_pieces, D]; the last one, by counters int32 [tiles, G], adds them. Else one program does all. FIXED: keys
    are cut at fixed positions; else in as many pieces as there are programs, of whole tiles. `value_scale`: of values
    in FP8, else None; that of the keys is part of `scale_log2`.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    Q: tl.constexpr = HEADS // GROUPS
    group = tl.program_id(0)
    tile = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    # lengths, tables and sinks do not depend on the kernel before: the host wrote them, or the checkpoint
    if tile_seq_ptr is None:
        seq = tile
        first = seq
        start = seq
        end = seq + 1
    else:
        seq = tl.load(tile_seq_ptr + tile)
        first = tl.load(tile_first_ptr + tile)
        start = tl.load(query_start_ptr + seq)
        end = tl.load(query_start_ptr + seq + 1)
    length = tl.load(length_ptr + seq)
    head = group * Q + m % Q
    sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
    if PDL:
        tl.extra.cuda.gdc_wait()
    if length == 0:
        return
    token = first + m // Q
    valid = (token < end) & (m < (BLOCK_M // Q) * Q)
    before = length - (end - start)  # tokens of the sequence that were there already
    position = tl.where(valid, before + token - start, before + first - start)
    last_token = tl.minimum(first + BLOCK_M // Q, end) - 1
    high = before + last_token - start + 1
    low = tl.zeros_like(high)
    if WINDOW > 0:
        low = tl.maximum(before + first - start - WINDOW + 1, 0) // TILE * TILE
    d = tl.arange(0, D)
    row = token.to(tl.int64) * HEADS + head
    table = table_ptr + seq * table_width
    q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=valid[:, None], other=0.0).to(COMPUTE)

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    if SPLIT:
        if FIXED:
            each = 0
            pieces = split_of(high - 1, SHORT, NUM_SHORT, LONG) + 1
        else:
            tiles = (high + TILE - 1) // TILE
            each = (tiles + tl.num_programs(2) - 1) // tl.num_programs(2) * TILE
            pieces = (high + each - 1) // each
        for piece in range(tl.program_id(2), pieces, tl.num_programs(2)):
            if FIXED:
                from_key = split_start(piece, SHORT, NUM_SHORT, LONG)
                to_key = tl.minimum(split_start(piece + 1, SHORT, NUM_SHORT, LONG), high)
            else:
                from_key = piece * each
                to_key = tl.minimum(from_key + each, high)
            one_peak, one_total, one = attend_split(
                q, position, key_ptr, value_ptr, table, group, from_key, to_key, scale_log2, WINDOW, GROUPS, D, BS,
                BLOCK_M, TILE, STAGES, COMPUTE,
            )  # fmt: skip
            at = row * max_pieces + piece
            tl.store(peaks_ptr + at, one_peak, mask=valid, cache_modifier=".cg")
            tl.store(totals_ptr + at, one_total, mask=valid, cache_modifier=".cg")
            tl.store(parts_ptr + at[:, None] * D + d[None, :], one, mask=valid[:, None], cache_modifier=".cg")
        programs = tl.minimum(tl.num_programs(2), pieces)
        if tl.program_id(2) >= programs:
            return
        tl.debug_barrier()  # every thread's part is stored before one of them counts it
        counter = counters_ptr + tile * GROUPS + group
        if tl.atomic_add(counter, 1, sem="acq_rel") != programs - 1:
            return
        tl.store(counter, 0)
        for from_piece in range(0, pieces, TOGETHER):
            at = row * max_pieces + from_piece
            peak, total, acc = add_pieces(
                peak, total, acc, peaks_ptr, totals_ptr, parts_ptr, at, valid, pieces - from_piece, D, TOGETHER
            )  # fmt: skip
    elif FIXED:
        first_split = split_of(low, SHORT, NUM_SHORT, LONG)
        for split in range(first_split, split_of(high - 1, SHORT, NUM_SHORT, LONG) + 1):
            from_key = tl.maximum(split_start(split, SHORT, NUM_SHORT, LONG), low)
            to_key = tl.minimum(split_start(split + 1, SHORT, NUM_SHORT, LONG), high)
            one_peak, one_total, one = attend_split(
                q, position, key_ptr, value_ptr, table, group, from_key, to_key, scale_log2, WINDOW, GROUPS, D, BS,
                BLOCK_M, TILE, STAGES, COMPUTE,
            )  # fmt: skip
            peak, total, acc = add_split(peak, total, acc, one_peak, one_total, one)
    else:
        peak, total, acc = attend_split(
            q, position, key_ptr, value_ptr, table, group, low, high, scale_log2, WINDOW, GROUPS, D, BS,
            BLOCK_M, TILE, STAGES, COMPUTE,
        )  # fmt: skip
    out = finish(peak, total, acc, sink)
    if value_scale is not None:
        out = out * value_scale
    tl.store(out_ptr + row[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=valid[:, None])


def fp8_options(cache: LayerCache) -> dict[str, tl.dtype]:
    """COMPUTE for keys and values in FP8: float16, which holds every code.

    Two of them take one instruction. Queries and weights of the softmax are more exact in it than in bfloat16, and far
    from its limit of 65504.
    """
    return {"COMPUTE": tl.float16} if cache.is_fp8 and not support.interpreted() else {}


def num_warps(config: TileConfig, *, is_fp8: bool, split: bool, fixed: bool) -> int:
    """Warps of a program. Keys and values in FP8 take registers of their own while they are widened."""
    return FP8_WARPS if is_fp8 and split and not fixed else config.warps


def num_splits(length: int) -> int:
    """Splits of a sequence of that many tokens."""
    if length <= LONG_FROM:
        return max(1, math.ceil(length / SHORT_SPLIT))
    return NUM_SHORT + math.ceil((length - LONG_FROM) / LONG_SPLIT)


def paged_attention(
    query: torch.Tensor,
    cache: LayerCache,
    sinks: torch.Tensor,
    metadata: TritonAttentionMetadata,
    window: int | None,
    scale: float,
    decode: TileConfig,
    prefill: TileConfig,
    *,
    fixed: bool,
) -> torch.Tensor:
    """Returns the attention [T, N D] of query [T, N, D], rotated.

    Its keys and values are in the cache already. `window` counts the token itself; `block_m` of
    `prefill` is not used: TILE_TOKENS tokens with all heads of a group make a tile.
    """
    out = torch.empty_like(query)
    launch = functools.partial(_launch, query, cache, sinks, metadata, window, scale, out, fixed=fixed)
    if metadata.num_decodes:
        longest = metadata.block_table.shape[1] * cache.key.shape[1]
        splits = 1
        if window is None:
            splits = num_splits(longest) if fixed else min(MAX_PIECES, -(-longest // MIN_PIECE))
        launch(decode, metadata.num_decodes, tiles=None, splits=splits)
    if len(metadata.tile_seq):
        rows = triton.next_power_of_2(TILE_TOKENS * query.shape[1] // cache.key.shape[2])
        tiles = (metadata.tile_seq, metadata.tile_first)
        launch(replace(prefill, block_m=max(16, rows)), len(metadata.tile_seq), tiles=tiles, splits=1)
    return out.flatten(1)


def _launch(
    query: torch.Tensor,
    cache: LayerCache,
    sinks: torch.Tensor,
    metadata: TritonAttentionMetadata,
    window: int | None,
    scale: float,
    out: torch.Tensor,
    config: TileConfig,
    count: int,
    *,
    tiles: tuple[torch.Tensor, torch.Tensor] | None,
    splits: int,
    fixed: bool,
) -> None:
    """`count` tiles, or without `tiles` that many sequences of one new token."""
    heads, head_dim = query.shape[1:]
    block_size, groups = cache.key.shape[1:3]
    programs = min(splits, max(1, MAX_PROGRAMS // (count * groups)))
    peaks = totals = parts = None
    split = tiles is None and window is None  # also where one program does all: one compilation
    if split:
        splits = splits if fixed else programs
        rows = count * heads * splits
        peaks, totals, parts = torch.empty(rows * (head_dim + 2), dtype=torch.float32, device=query.device).split(
            (rows, rows, rows * head_dim)
        )
    options = support.launch_options(query.device, "COMPUTE") | fp8_options(cache)
    warps = num_warps(config, is_fp8=cache.is_fp8, split=split, fixed=fixed)
    value_scale = cache.value_scale if cache.is_fp8 else None
    _attention_kernel[(groups, count, programs)](
        query, cache.key, cache.value, sinks, out, *(tiles or (None, None)), metadata.query_start, metadata.length,
        metadata.block_table, peaks, totals, parts, support.counters(query.device, count * groups),
        scale * cache.key_scale * math.log2(math.e), value_scale, metadata.block_table.shape[1], splits, heads, groups,
        head_dim, block_size, window or 0, split, fixed, SHORT_SPLIT, NUM_SHORT, LONG_SPLIT, config.block_m,
        min(config.block_n, block_size), config.stages, TOGETHER, num_warps=warps, **options,
    )  # fmt: skip
