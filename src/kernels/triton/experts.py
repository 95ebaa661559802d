"""The experts: MXFP4 matrices times gathered tokens, with what follows each product in its epilogue.

Weights are the first operand of the matrix instructions and tokens the second, so 1 to 16 tokens cost the same. A word
of four codes becomes four bfloat16 operands by three masks and shifts and one multiplication (mxfp4_layout.py); nothing
passes through shared memory on the way.

A product's terms are added in the order of K whatever else is in the batch, and a token's k parts in the order of its
slots, by the program that finishes the last of them.

Shapes: T tokens, k experts per token, A = T k assignments, H hidden, I intermediate, E experts, P tiles (tiles.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gptoss.kernels.layers import PackedMxfp4
from gptoss.kernels.triton import support
from gptoss.kernels.triton.configs import TileConfig
from gptoss.kernels.triton.routing import Routed, choose_experts
from gptoss.kernels.triton.tiles import TileList


@dataclass(frozen=True, slots=True)
class Tiles:
    """What the expert kernels walk: a list of tiles, or (`direct`) each assignment by itself.

    With `direct` the kernel finds the assignment's expert.
    """

    logits: torch.Tensor  # float32 [T, E]; read if direct
    num_tokens: torch.Tensor  # int32 [1]: rows of the batch that are tokens
    per_token: int
    count: int
    block_m: int
    weights: torch.Tensor | None = None  # float32 [T, k]
    tile_list: TileList | None = None

    @classmethod
    def of(cls, routed: Routed, num_tokens: torch.Tensor, per_token: int, block_m: int) -> Tiles:
        count = len(routed.logits) * per_token if routed.tile_list is None else len(routed.tile_list.tile_expert)
        return cls(routed.logits, num_tokens, per_token, count, block_m, routed.weights, routed.tile_list)

    @property
    def direct(self) -> bool:
        return self.tile_list is None

    @property
    def padded_experts(self) -> int:
        return triton.next_power_of_2(self.logits.shape[1])

    def arrays(self) -> tuple[torch.Tensor | None, ...]:
        t = self.tile_list
        return (None,) * 4 if t is None else (t.tile_expert, t.tile_first, t.tile_count, t.rows)


@triton.jit
def unpack_words(q, ASM: tl.constexpr):
    """int16 words -> four operands, 2 ** 126 times too small."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, u, v;
            and.b32 $0, $4, 0x81C081C0;
            shl.b32 t, $4, 3;
            and.b32 $1, t, 0x81C081C0;
            shl.b32 t, $4, 6;
            and.b32 $2, t, 0x81C081C0;
            shl.b32 t, $4, 1;
            shr.u32 u, $4, 5;
            shr.u32 v, $4, 4;
            and.b32 t, t, 0x80008000;
            lop3.b32 t, u, 0x01000100, t, 0xEA;
            lop3.b32 $3, v, 0x00C000C0, t, 0xEA;
            }
            """,
            "=r,=r,=r,=r,r", [q], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        a = q.to(tl.int32) & 0xFFFF
        b0 = a & 0x81C0
        b1 = (a << 3) & 0x81C0
        b2 = (a << 6) & 0x81C0
        b3 = ((a << 1) & 0x8000) | ((a >> 5) & 0x100) | ((a >> 4) & 0xC0)
        return (
            (b0 << 16).to(tl.float32, bitcast=True),
            (b1 << 16).to(tl.float32, bitcast=True),
            (b2 << 16).to(tl.float32, bitcast=True),
            (b3 << 16).to(tl.float32, bitcast=True),
        )


@triton.jit
def scale_of(scales, J: tl.constexpr, ASM: tl.constexpr):
    """int32 [N], four E8M0 scales each -> 2 ** (scale J - 1), [N, 1]."""
    exponent = ((scales >> (8 * J)) & 0xFF) + 126
    if ASM:
        power = (exponent << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        power = (exponent << 23).to(tl.float32, bitcast=True)
    return power[:, None]


@triton.jit
def expert_product(
    words_ptr, scales_ptr, x_ptr, x_row, valid, first_row, first_block, end_block, N: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows first_row ... of one expert's matrix times x's rows `x_row`, float32 [BLOCK_N, BLOCK_M].

    The product is over the blocks of 128 columns from first_block to end_block - 1; `x_row` [BLOCK_M].
    """
    SLICE: tl.constexpr = 32
    UNIT: tl.constexpr = 16
    BLOCK_K: tl.constexpr = 4 * SLICE
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    n = first_row + tl.arange(0, BLOCK_N)
    if N % BLOCK_N != 0:
        n = tl.where(n < N, n, n % UNIT)  # rows past the end are read from the first unit and never stored
    i = tl.arange(0, SLICE)
    unit = (n // UNIT) * (BLOCKS * UNIT) + n % UNIT
    word = words_ptr + unit[:, None] * SLICE + i[None, :]
    scale = scales_ptr + unit
    x = x_ptr + x_row.to(tl.int64)[None, :] * K + i[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for kb in tl.range(first_block, end_block, num_stages=STAGES):
        a0, a1, a2, a3 = unpack_words(tl.load(word + kb * (UNIT * SLICE)), ASM)
        s = tl.load(scale + kb * UNIT)
        column = kb * BLOCK_K + i[:, None]
        if K % BLOCK_K == 0:
            in0 = valid[None, :]
            in1 = in0
            in2 = in0
            in3 = in0
        else:
            in0 = valid[None, :] & (column < K)
            in1 = valid[None, :] & (column + SLICE < K)
            in2 = valid[None, :] & (column + 2 * SLICE < K)
            in3 = valid[None, :] & (column + 3 * SLICE < K)
        at = x + kb * BLOCK_K
        x0 = tl.load(at, mask=in0, other=0.0).to(COMPUTE)
        x1 = tl.load(at + SLICE, mask=in1, other=0.0).to(COMPUTE)
        x2 = tl.load(at + 2 * SLICE, mask=in2, other=0.0).to(COMPUTE)
        x3 = tl.load(at + 3 * SLICE, mask=in3, other=0.0).to(COMPUTE)
        acc = tl.dot(a0 * scale_of(s, 0, ASM), x0, acc)
        acc = tl.dot(a1 * scale_of(s, 1, ASM), x1, acc)
        acc = tl.dot(a2 * scale_of(s, 2, ASM), x2, acc)
        acc = tl.dot(a3 * scale_of(s, 3, ASM), x3, acc)
    return acc


@triton.jit
def direct_tile(
    logits_ptr, num_tokens, NUM_EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, PER_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The tile of program_id(1): one assignment, its expert found from the router's logits.
    -> (expert, assignments [BLOCK_M], which of them are real [BLOCK_M], routing weights of the token [PER_TOKEN])"""
    a = tl.program_id(1)
    token = a // PER_TOKEN
    e = tl.arange(0, PADDED_EXPERTS)
    logits = tl.load(logits_ptr + token * NUM_EXPERTS + e, mask=e < NUM_EXPERTS, other=float("-inf"))
    chosen, weights = choose_experts(logits, e, PER_TOKEN)
    expert = tl.sum(tl.where(tl.arange(0, PER_TOKEN) == a % PER_TOKEN, chosen, 0), axis=0)
    m = tl.arange(0, BLOCK_M)
    return expert, a + tl.zeros((BLOCK_M,), tl.int32), (m == 0) & (token < num_tokens), weights


@triton.jit
def listed_tile(tile_expert_ptr, tile_first_ptr, tile_count_ptr, rows_ptr, BLOCK_M: tl.constexpr):
    """The tile of program_id(1) from the list.

    -> (expert or -1, assignments [BLOCK_M], which are real [BLOCK_M])
    """
    p = tl.program_id(1)
    expert = tl.load(tile_expert_ptr + p)
    m = tl.arange(0, BLOCK_M)
    valid = (m < tl.load(tile_count_ptr + p)) & (expert >= 0)
    return expert, tl.load(rows_ptr + tl.load(tile_first_ptr + p) + m, mask=valid, other=0), valid


@triton.jit
def _moe_w1_kernel(
    x_ptr, r_ptr, words_ptr, scales_ptr, bias_ptr, delta_ptr, act_ptr, logits_ptr, num_tokens_ptr, tile_expert_ptr,
    tile_first_ptr, tile_count_ptr, rows_ptr, limit,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, NUM_EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr,
    PER_TOKEN: tl.constexpr, DIRECT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    COMPUTE: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (2 I / BLOCK_N, tiles). x [T, H], r float32 [T]: the product is multiplied by r. act [A, I]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if DIRECT:
        num_tokens = tl.load(num_tokens_ptr)
        expert, a, valid, _ = direct_tile(logits_ptr, num_tokens, NUM_EXPERTS, PADDED_EXPERTS, PER_TOKEN, BLOCK_M)
        if tl.program_id(1) >= num_tokens * PER_TOKEN:
            return
    else:
        expert, a, valid = listed_tile(tile_expert_ptr, tile_first_ptr, tile_count_ptr, rows_ptr, BLOCK_M)
        if expert < 0:
            return
    first_row = tl.program_id(0) * BLOCK_N
    BLOCKS: tl.constexpr = (HIDDEN + 127) // 128
    base = expert.to(tl.int64) * (2 * INTER * BLOCKS)
    acc = expert_product(
        words_ptr + base * 32, scales_ptr + base, x_ptr, a // PER_TOKEN, valid, first_row, 0, BLOCKS, 2 * INTER, HIDDEN,
        BLOCK_N, BLOCK_M, STAGES, COMPUTE, ASM,
    )  # fmt: skip
    n = first_row + tl.arange(0, BLOCK_N)
    place = 8 * (n // 16) + n % 8 + tl.where(n % 16 < 8, 0, INTER)
    bias = tl.load(bias_ptr + expert * (2 * INTER) + place, mask=n < 2 * INTER, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + a // PER_TOKEN, mask=valid, other=0.0)
    acc = acc * r[None, :] + bias[:, None]
    if delta_ptr is not None:
        at = delta_ptr + a.to(tl.int64)[None, :] * (2 * INTER) + place[:, None]
        acc += tl.load(at, mask=valid[None, :] & (n < 2 * INTER)[:, None], other=0.0)
    halves = tl.permute(tl.reshape(acc, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1))
    gate, up = tl.split(halves)
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    act = tl.reshape(gate * tl.sigmoid(1.702 * gate) * (up + 1.0), (BLOCK_N // 2, BLOCK_M))
    j = first_row // 2 + tl.arange(0, BLOCK_N // 2)
    out = act_ptr + a.to(tl.int64)[None, :] * INTER + j[:, None]
    tl.store(out, act.to(act_ptr.dtype.element_ty), mask=valid[None, :] & (j < INTER)[:, None])


@triton.jit
def add_split_parts(
    acc, expert, routing, n, bias_ptr, residual_ptr, out_ptr, parts_ptr, counters_ptr, batch_size, HIDDEN: tl.constexpr,
    PER_TOKEN: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Adds and stores the product of one assignment, of which SPLIT programs have a part each.

    The assignment is the first column of `acc` [BLOCK_N, BLOCK_M]. parts float32 [T, k SPLIT to a power of two, H],
    weighted. The last program loads all at once.
    """
    PARTS: tl.constexpr = triton.next_power_of_2(PER_TOKEN * SPLIT)
    slot = tl.program_id(1) % PER_TOKEN
    token = tl.program_id(1) // PER_TOKEN
    inside = n < HIDDEN
    weight = tl.sum(tl.where(tl.arange(0, PER_TOKEN) == slot, routing, 0.0), axis=0)
    one = tl.sum(tl.where((tl.arange(0, BLOCK_M) == 0)[None, :], acc, 0.0), axis=1)
    if tl.program_id(2) == 0:
        one += tl.load(bias_ptr + expert * HIDDEN + n, mask=inside, other=0.0).to(tl.float32)
    parts = parts_ptr + token.to(tl.int64) * (PARTS * HIDDEN)
    mine = slot * SPLIT + tl.program_id(2)
    tl.store(parts + mine * HIDDEN + n, one * weight, mask=inside, cache_modifier=".cg")
    tl.debug_barrier()  # every thread's part is stored before one of them counts it
    counter = counters_ptr + tl.program_id(0) * batch_size + token
    if tl.atomic_add(counter, 1, sem="acq_rel") == PER_TOKEN * SPLIT - 1:
        tl.store(counter, 0)
        p = tl.arange(0, PARTS)
        every = tl.load(
            parts + p[:, None] * HIDDEN + n[None, :], mask=(p < PER_TOKEN * SPLIT)[:, None] & inside[None, :],
            other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        at = token.to(tl.int64) * HIDDEN + n
        total = tl.sum(every, axis=0)
        total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch_size"])
def _moe_w2_kernel(
    act_ptr, words_ptr, scales_ptr, bias_ptr, residual_ptr, out_ptr, parts_ptr, counters_ptr, logits_ptr, weights_ptr,
    num_tokens_ptr, tile_expert_ptr, tile_first_ptr, tile_count_ptr, rows_ptr, batch_size,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, NUM_EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr,
    PER_TOKEN: tl.constexpr, DIRECT: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr, COMPUTE: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (H / BLOCK_N, tiles, SPLIT). SPLIT programs share the columns.

    SPLIT is more than one only if DIRECT. parts float32 [A, H]; counters int32 [H / BLOCK_N, T], zero before and after.
    The last of a token's parts to be done adds them all to the residual, in the order of the slots.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    num_tokens = tl.load(num_tokens_ptr)
    if DIRECT:
        expert, a, valid, routing = direct_tile(logits_ptr, num_tokens, NUM_EXPERTS, PADDED_EXPERTS, PER_TOKEN, BLOCK_M)
        if tl.program_id(1) >= num_tokens * PER_TOKEN:
            return
    else:
        expert, a, valid = listed_tile(tile_expert_ptr, tile_first_ptr, tile_count_ptr, rows_ptr, BLOCK_M)
        if expert < 0:
            return
    first_row = tl.program_id(0) * BLOCK_N
    BLOCKS: tl.constexpr = (INTER + 127) // 128
    base = expert.to(tl.int64) * (HIDDEN * BLOCKS)
    n = first_row + tl.arange(0, BLOCK_N)
    if SPLIT > 1:
        EACH: tl.constexpr = (BLOCKS + SPLIT - 1) // SPLIT
        first_block = tl.program_id(2) * EACH
        acc = expert_product(
            words_ptr + base * 32, scales_ptr + base, act_ptr, a, valid, first_row, first_block,
            tl.minimum(first_block + EACH, BLOCKS), HIDDEN, INTER, BLOCK_N, BLOCK_M, STAGES, COMPUTE, ASM,
        )  # fmt: skip
        add_split_parts(
            acc, expert, routing, n, bias_ptr, residual_ptr, out_ptr, parts_ptr, counters_ptr, batch_size, HIDDEN,
            PER_TOKEN, SPLIT, BLOCK_M,
        )  # fmt: skip
        return
    acc = expert_product(
        words_ptr + base * 32, scales_ptr + base, act_ptr, a, valid, first_row, 0, BLOCKS, HIDDEN, INTER, BLOCK_N,
        BLOCK_M, STAGES, COMPUTE, ASM,
    )  # fmt: skip
    acc += tl.load(bias_ptr + expert * HIDDEN + n, mask=n < HIDDEN, other=0.0).to(tl.float32)[:, None]
    inside = (n < HIDDEN)[:, None] & valid[None, :]
    part = parts_ptr + a.to(tl.int64)[None, :] * HIDDEN + n[:, None]
    tl.store(part, acc, mask=inside, cache_modifier=".cg")
    tl.debug_barrier()  # every thread's part is stored before one of them counts it
    token = a // PER_TOKEN
    counter = counters_ptr + tl.program_id(0) * batch_size + token
    before = tl.atomic_add(counter, 1, mask=valid, sem="acq_rel")
    last = valid & (before == PER_TOKEN - 1)
    if tl.max(last.to(tl.int32), axis=0) == 0:
        return
    tl.store(counter, 0, mask=last)
    inside = (n < HIDDEN)[:, None] & last[None, :]
    row = token.to(tl.int64)[None, :] * HIDDEN + n[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for slot in tl.range(PER_TOKEN):  # no unrolling: all parts at once would not fit the registers
        one = parts_ptr + (token * PER_TOKEN + slot).to(tl.int64)[None, :] * HIDDEN + n[:, None]
        added = tl.load(one, mask=inside, other=0.0, cache_modifier=".cg")
        if DIRECT:
            weight = tl.sum(tl.where(tl.arange(0, PER_TOKEN) == slot, routing, 0.0), axis=0)
            total += added * weight
        else:
            weight = tl.load(weights_ptr + token * PER_TOKEN + slot, mask=last, other=0.0)
            total += added * weight[None, :]
    total += tl.load(residual_ptr + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, total.to(out_ptr.dtype.element_ty), mask=inside)


def moe_w1(
    x: torch.Tensor,
    r: torch.Tensor,
    w: PackedMxfp4,
    bias: torch.Tensor,
    limit: float,
    tiles: Tiles,
    config: TileConfig,
    delta: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the clamped SwiGLU of r x W1 + b1, [A, I] in the type of x.

    x [T, H], r float32 [T], b1 [E, 2 I], gate half first. `delta` float32 [A, 2 I]: added to the product, likewise.
    """
    hidden, rows = w.num_columns, w.num_rows
    act = torch.empty(x.shape[0] * tiles.per_token, rows // 2, dtype=x.dtype, device=x.device)
    _moe_w1_kernel[(triton.cdiv(rows, config.block_n), tiles.count)](
        x, r, w.words, _four_scales(w), bias, delta, act, tiles.logits, tiles.num_tokens, *tiles.arrays(), limit,
        hidden, rows // 2, bias.shape[0], tiles.padded_experts, tiles.per_token, tiles.direct,
        config.block_n, tiles.block_m, config.stages, num_warps=config.warps,
        **support.launch_options(x.device, "COMPUTE", "ASM"),
    )  # fmt: skip
    return act


def moe_w2(
    act: torch.Tensor, w: PackedMxfp4, bias: torch.Tensor, residual: torch.Tensor, tiles: Tiles, config: TileConfig
) -> torch.Tensor:
    """act [A, I], residual [T, H] -> residual + sum over k of weight (act W2 + b2), [T, H]. b2 [E, H]."""
    tokens, hidden = residual.shape
    programs = triton.cdiv(hidden, config.block_n)
    split = config.split if tiles.direct else 1
    rows = act.shape[0] if split == 1 else tokens * triton.next_power_of_2(tiles.per_token * split)
    parts = torch.empty(rows, hidden, dtype=torch.float32, device=act.device)
    out = torch.empty_like(residual)
    _moe_w2_kernel[(programs, tiles.count, split)](
        act, w.words, _four_scales(w), bias, residual, out, parts, support.counters(act.device, programs * tokens),
        tiles.logits, tiles.weights, tiles.num_tokens, *tiles.arrays(), tokens,
        hidden, act.shape[1], bias.shape[0], tiles.padded_experts, tiles.per_token, tiles.direct, split,
        config.block_n, tiles.block_m, config.stages, num_warps=config.warps,
        **support.launch_options(act.device, "COMPUTE", "ASM"),
    )  # fmt: skip
    return out


def _four_scales(w: PackedMxfp4) -> torch.Tensor:
    return w.scales.view(torch.int32)
