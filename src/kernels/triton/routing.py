"""The router: RMSNorm, logits, each token's experts, and the tiles that the expert kernels walk.

Top-k of the router's logits, softmax over the chosen k alone (gpt-oss model card, section 2.3). Equal logits: the lower
expert first. RMSNorm as in dense.py: the products take x * scale and are multiplied by r.

Up to FEW_TOKENS tokens one kernel does all of it: plain dot products, K split over the lanes of a program, so that the
longest chain is short; the last program to finish chooses experts and lists tiles. For more tokens a program takes a
block of them by matrix instructions and counts how many go to each expert; a second kernel places them by those counts.

Shapes: T tokens, K hidden, E experts, k experts per token, A = T k assignments (assignment a = token * k + slot), B
blocks of tokens, P tiles (tiles.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gptoss.kernels.triton import support
from gptoss.kernels.triton.configs import TileConfig
from gptoss.kernels.triton.tiles import TileList, max_tiles, sort_by_expert, write_tiles

FEW_TOKENS = 64
BLOCK_K = 64
PLACE_WARPS = 4


@dataclass(frozen=True, slots=True)
class Routed:
    """What the expert kernels read."""

    scaled: torch.Tensor  # [T, K], x * scale
    r: torch.Tensor  # float32 [T]
    logits: torch.Tensor  # float32 [T, E]
    weights: torch.Tensor | None = None  # float32 [T, k]
    tile_list: TileList | None = None
    chosen: torch.Tensor | None = None  # int32 [T, k], with a tile list


@triton.jit
def choose_experts(logits, expert, PER_TOKEN: tl.constexpr):
    """The PER_TOKEN experts with the largest logits, int32 [PER_TOKEN], and their weights.

    logits [E'], expert = arange(E'); what is past the last expert holds -inf. The experts are in falling order of their
    logits; the weights float32 [PER_TOKEN] sum to 1. Their sum is taken in that order, whatever lanes hold them.
    """
    slot = tl.arange(0, PER_TOKEN)
    chosen = tl.zeros((PER_TOKEN,), tl.int32)
    weights = tl.zeros((PER_TOKEN,), tl.float32)
    largest = tl.max(logits, axis=0)
    total = tl.zeros_like(largest)
    for j in tl.static_range(PER_TOKEN):
        best = tl.argmax(logits, axis=0)
        weight = tl.exp(tl.max(logits, axis=0) - largest)
        total += weight
        chosen = tl.where(slot == j, best, chosen)
        weights = tl.where(slot == j, weight, weights)
        logits = tl.where(expert == best, float("-inf"), logits)
    return chosen, weights / total


@triton.jit
def choose_for_all(logits, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, PER_TOKEN: tl.constexpr):
    """choose_experts for rows, with the same bits: logits [TOKENS, EXPERTS] -> two of [TOKENS, PER_TOKEN]."""
    expert = tl.arange(0, EXPERTS)
    slot = tl.arange(0, PER_TOKEN)
    chosen = tl.zeros((TOKENS, PER_TOKEN), tl.int32)
    weights = tl.zeros((TOKENS, PER_TOKEN), tl.float32)
    largest = tl.max(logits, axis=1)
    total = tl.zeros_like(largest)
    for j in tl.static_range(PER_TOKEN):
        value, best = tl.max(logits, axis=1, return_indices=True)
        weight = tl.exp(value - largest)
        total += weight
        chosen = tl.where((slot == j)[None, :], best[:, None], chosen)
        weights = tl.where((slot == j)[None, :], weight[:, None], weights)
        logits = tl.where(expert[None, :] == best[:, None], float("-inf"), logits)
    return chosen, weights / total[:, None]


@triton.jit
def only_local(chosen, weights, PER_TOKEN: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Experts of all ranks -> numbered from this rank's first.

    Those elsewhere become the token's first local one, or expert 0, with weight 0, so that every token keeps k parts
    and no further expert is read.
    """
    mine = (chosen >= FIRST) & (chosen < FIRST + COUNT)
    local = chosen - FIRST
    slot = tl.arange(0, PER_TOKEN)
    earliest = tl.min(tl.where(mine, slot[None, :], PER_TOKEN), axis=1)
    stand_in = tl.sum(tl.where(slot[None, :] == earliest[:, None], local, 0), axis=1)
    return tl.where(mine, local, stand_in[:, None]), tl.where(mine, weights, 0.0)


@triton.jit(do_not_specialize=["num_rows", "max_tiles"])
def _route_few_kernel(
    x_ptr, norm_ptr, w_ptr, bias_ptr, delta_ptr, scaled_ptr, r_ptr, logits_ptr, eps, num_rows,
    num_tokens_ptr, counter_ptr, weights_ptr, chosen_ptr, tile_expert_ptr, tile_first_ptr, tile_count_ptr, rows_ptr,
    max_tiles,
    N: tl.constexpr, K: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    ALL_TOKENS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, PER_TOKEN: tl.constexpr, LOCAL_FIRST: tl.constexpr,
    LOCAL: tl.constexpr, PADDED_LOCAL: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (E / ROWS, T / TOKENS): logits, and by the first column of programs x * scale and r.

    K is cut into LEFT and RIGHT, powers of two. Weights and scale do not depend on the kernel before: they are asked
    for before the wait.

    ALL_TOKENS > 0: the last program, by the counter int32 [1], chooses experts and lists tiles for all.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = n < N
    left = tl.arange(0, LEFT)
    w = w_ptr + tl.where(known, n, 0)[:, None] * K
    w_left = tl.load(w + left[None, :])
    scale_left = tl.load(norm_ptr + left).to(tl.float32)
    if RIGHT > 0:
        right = LEFT + tl.arange(0, RIGHT)
        w_right = tl.load(w + right[None, :], mask=(right < K)[None, :], other=0.0)
        scale_right = tl.load(norm_ptr + right, mask=right < K, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + n, mask=known, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for i in tl.static_range(TOKENS):
        token = tl.program_id(1) * TOKENS + i
        there = token < num_rows
        at = token.to(tl.int64) * K
        x = tl.load(x_ptr + at + left, mask=there, other=0.0).to(tl.float32)
        scaled = (x * scale_left).to(scaled_ptr.dtype.element_ty)
        squares = tl.sum(x * x, axis=0)
        acc = tl.sum(w_left.to(tl.float32) * scaled.to(tl.float32)[None, :], axis=1)
        if RIGHT > 0:
            x_right = tl.load(x_ptr + at + right, mask=there & (right < K), other=0.0).to(tl.float32)
            scaled_right = (x_right * scale_right).to(scaled_ptr.dtype.element_ty)
            squares += tl.sum(x_right * x_right, axis=0)
            acc += tl.sum(w_right.to(tl.float32) * scaled_right.to(tl.float32)[None, :], axis=1)
        r = tl.rsqrt(squares / K + eps)
        acc = acc * r + bias
        if delta_ptr is not None:
            acc += tl.load(delta_ptr + token * N + n, mask=known & there, other=0.0)
        tl.store(logits_ptr + token * N + n, acc, mask=known & there, cache_modifier=".cg")
        if tl.program_id(0) == 0:
            tl.store(scaled_ptr + at + left, scaled, mask=there)
            if RIGHT > 0:
                tl.store(scaled_ptr + at + right, scaled_right, mask=there & (right < K))
            tl.store(r_ptr + token, r, mask=there)
    if ALL_TOKENS > 0:
        tl.debug_barrier()  # every thread's logits are stored before one of them counts the program
        programs = tl.num_programs(0) * tl.num_programs(1)
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") != programs - 1:
            return
        tl.store(counter_ptr, 0)
        t = tl.arange(0, ALL_TOKENS)
        e = tl.arange(0, PADDED_EXPERTS)
        row = tl.minimum(t, num_rows - 1)  # those past the end hold what is finite
        logits = tl.load(
            logits_ptr + row[:, None] * N + e[None, :], mask=(e < N)[None, :], other=float("-inf"),
            cache_modifier=".cg",
        )  # fmt: skip
        chosen, weights = choose_for_all(logits, ALL_TOKENS, PADDED_EXPERTS, PER_TOKEN)
        if LOCAL < N:
            chosen, weights = only_local(chosen, weights, PER_TOKEN, LOCAL_FIRST, LOCAL)
        at = t[:, None] * PER_TOKEN + tl.arange(0, PER_TOKEN)[None, :]
        tl.store(weights_ptr + at, weights, mask=(t < num_rows)[:, None])
        COUNT: tl.constexpr = ALL_TOKENS * PER_TOKEN
        tl.store(chosen_ptr + at, chosen, mask=(t < num_rows)[:, None])
        tl.debug_barrier()  # read again by other threads, in an order of which each holds a part once
        num_real = tl.load(num_tokens_ptr) * PER_TOKEN
        keys, counts = sort_by_expert(chosen_ptr, num_real, PADDED_LOCAL, COUNT)
        tl.store(rows_ptr + tl.arange(0, COUNT), keys % COUNT, mask=keys < PADDED_LOCAL * COUNT)
        offsets = tl.cumsum(counts, axis=0) - counts
        write_tiles(
            counts, offsets, 0, 1, tile_expert_ptr, tile_first_ptr, tile_count_ptr, max_tiles, PADDED_LOCAL, BLOCK_M
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _route_many_kernel(
    x_ptr, norm_ptr, w_ptr, bias_ptr, delta_ptr, scaled_ptr, r_ptr, logits_ptr, eps, num_rows, num_tokens_ptr,
    chosen_ptr, weights_ptr, counts_ptr,
    N: tl.constexpr, K: tl.constexpr, PER_TOKEN: tl.constexpr, LOCAL_FIRST: tl.constexpr, LOCAL: tl.constexpr,
    PADDED_LOCAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B,): all that follows from the hidden states of a block of BLOCK_M tokens.

    That includes counts int32 [B, E'].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = m < num_rows
    k = tl.arange(0, BLOCK_K)
    w_row = tl.where(n < N, n, 0)
    at_x = m.to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = start + k < K
        a = tl.load(w_ptr + w_row[:, None] * K + (start + k)[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(x_ptr + at_x + start, mask=valid[None, :] & inside[:, None], other=0.0).to(tl.float32)
        squares += tl.sum(b * b, axis=0)
        scale = tl.load(norm_ptr + start + k, mask=inside, other=0.0).to(tl.float32)
        scaled = (b * scale[:, None]).to(scaled_ptr.dtype.element_ty)
        tl.store(scaled_ptr + at_x + start, scaled, mask=valid[None, :] & inside[:, None])
        acc = tl.dot(a.to(COMPUTE), scaled.to(COMPUTE), acc)
    r = tl.rsqrt(squares / K + eps)
    tl.store(r_ptr + m, r, mask=valid)
    acc = acc * r[None, :] + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if delta_ptr is not None:
        acc += tl.load(delta_ptr + at, mask=(n < N)[:, None] & valid[None, :], other=0.0)
    tl.store(logits_ptr + at, acc, mask=(n < N)[:, None] & valid[None, :])
    acc = tl.where((n < N)[:, None], acc, float("-inf"))
    chosen, weights = choose_for_all(tl.trans(acc), BLOCK_M, BLOCK_N, PER_TOKEN)
    if LOCAL < N:
        chosen, weights = only_local(chosen, weights, PER_TOKEN, LOCAL_FIRST, LOCAL)
    at = m[:, None] * PER_TOKEN + tl.arange(0, PER_TOKEN)[None, :]
    tl.store(chosen_ptr + at, chosen, mask=valid[:, None])
    tl.store(weights_ptr + at, weights, mask=valid[:, None])
    tl.debug_barrier()  # read again by other threads, in an order of which each holds a part once
    a = tl.arange(0, BLOCK_M * PER_TOKEN)
    first = tl.program_id(0) * BLOCK_M * PER_TOKEN
    real = first + a < tl.load(num_tokens_ptr) * PER_TOKEN
    expert = tl.load(chosen_ptr + first + a, mask=real, other=0)
    counts = tl.histogram(expert, PADDED_LOCAL, mask=real)
    e = tl.arange(0, PADDED_LOCAL)
    tl.store(counts_ptr + tl.program_id(0) * PADDED_LOCAL + e, counts)


@triton.jit(do_not_specialize=["max_tiles"])
def _place_kernel(
    chosen_ptr, counts_ptr, num_tokens_ptr, tile_expert_ptr, tile_first_ptr, tile_count_ptr, rows_ptr, max_tiles,
    PER_TOKEN: tl.constexpr, PADDED_LOCAL: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B,): places the assignments of a block of TOKENS tokens, and writes its share of the tiles."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    e = tl.arange(0, PADDED_LOCAL)
    counts = tl.zeros((PADDED_LOCAL,), tl.int32)
    earlier = tl.zeros((PADDED_LOCAL,), tl.int32)
    for start in tl.range(0, blocks, CHUNK):
        b = start + tl.arange(0, CHUNK)
        some = tl.load(counts_ptr + b[:, None] * PADDED_LOCAL + e[None, :], mask=(b < blocks)[:, None], other=0)
        counts += tl.sum(some, axis=0)
        earlier += tl.sum(tl.where((b < block)[:, None], some, 0), axis=0)
    offsets = tl.cumsum(counts, axis=0) - counts
    COUNT: tl.constexpr = TOKENS * PER_TOKEN
    num_real = tl.load(num_tokens_ptr) * PER_TOKEN - block * COUNT
    keys, mine = sort_by_expert(chosen_ptr + block * COUNT, num_real, PADDED_LOCAL, COUNT)
    known = keys < PADDED_LOCAL * COUNT
    # the i-th of this block's sorted assignments goes this far from i
    moved = offsets + earlier - (tl.cumsum(mine, axis=0) - mine)
    i = tl.arange(0, COUNT)
    place = i + tl.gather(moved, tl.where(known, keys // COUNT, 0), axis=0)
    tl.store(rows_ptr + place, block * COUNT + keys % COUNT, mask=known)
    write_tiles(
        counts, offsets, block, blocks, tile_expert_ptr, tile_first_ptr, tile_count_ptr, max_tiles, PADDED_LOCAL,
        BLOCK_M,
    )  # fmt: skip


def route_few(
    x: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    config: TileConfig,
    num_tokens: torch.Tensor,
    per_token: int,
    block_m: int | None,
    local: range | None = None,
    delta: torch.Tensor | None = None,
) -> Routed:
    """Routes up to FEW_TOKENS tokens x [T, K] by weight [E, K].

    num_tokens int32 [1]: rows of the batch that are tokens, the rest is padding. `block_m`: of the tiles that are
    listed; None: none are, and the expert kernels choose for themselves. `local`: this rank's experts; None: all.
    `delta` float32 [T, E]: added to the logits.
    """
    made = _Made(x, len(weight), per_token, block_m, local)
    left = 1 << (x.shape[1].bit_length() - 1)
    right = x.shape[1] - left
    grid = (triton.cdiv(len(weight), config.block_n), triton.cdiv(len(x), config.block_m))
    tile_list = (made.weights, made.chosen, *made.arrays(), made.tiles) if block_m else (None,) * 6 + (0,)
    _route_few_kernel[grid](
        x, norm, weight, bias, delta, made.scaled, made.r, made.logits, eps, len(x),
        num_tokens, support.counters(x.device, 1) if block_m else None, *tile_list, len(weight), x.shape[1],
        left, triton.next_power_of_2(right) if right else 0, config.block_n, config.block_m,
        _padded_tokens(len(x)) if block_m else 0, triton.next_power_of_2(len(weight)), per_token, *made.local,
        block_m or 0, num_warps=config.warps, **support.launch_options(x.device),
    )  # fmt: skip
    return made.routed()


def route_many(
    x: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    config: TileConfig,
    num_tokens: torch.Tensor,
    per_token: int,
    block_m: int | None,
    local: range | None = None,
    delta: torch.Tensor | None = None,
) -> Routed:
    """Routes any number of tokens as route_few does, a row of the same bits in each."""
    made = _Made(x, len(weight), per_token, block_m, local)
    padded, padded_local = max(config.block_n, triton.next_power_of_2(len(weight))), made.local[2]
    blocks = triton.cdiv(len(x), config.block_m)
    counts = torch.empty(blocks, padded_local, dtype=torch.int32, device=x.device)
    _route_many_kernel[(blocks,)](
        x, norm, weight, bias, delta, made.scaled, made.r, made.logits, eps, len(x), num_tokens, made.chosen,
        made.weights, counts,
        len(weight), x.shape[1], per_token, *made.local, padded, config.block_m, BLOCK_K, config.stages,
        num_warps=config.warps, **support.launch_options(x.device, "COMPUTE"),
    )  # fmt: skip
    if block_m:
        _place_kernel[(blocks,)](
            made.chosen, counts, num_tokens, *made.arrays(), made.tiles, per_token, padded_local, config.block_m,
            max(1, min(32, 4096 // padded_local)), block_m, num_warps=PLACE_WARPS, **support.launch_options(x.device),
        )  # fmt: skip
    return made.routed()


def _padded_tokens(tokens: int) -> int:
    return 32 if tokens <= 32 else FEW_TOKENS


class _Made:
    """Buffers for what the router writes."""

    def __init__(
        self, x: torch.Tensor, experts: int, per_token: int, block_m: int | None, local: range | None
    ) -> None:  # fmt: skip
        tokens, device = len(x), x.device
        self.scaled = torch.empty_like(x)
        self.r = torch.empty(tokens, dtype=torch.float32, device=device)
        self.logits = torch.empty(tokens, experts, dtype=torch.float32, device=device)
        self.weights = torch.empty(tokens, per_token, dtype=torch.float32, device=device)
        self.chosen = torch.empty(tokens, per_token, dtype=torch.int32, device=device)
        mine = range(experts) if local is None else local
        # first, how many, and the power of two that holds them
        self.local = (mine.start, len(mine), triton.next_power_of_2(len(mine)))
        self.tile_list: TileList | None = None
        if block_m:
            assignments = tokens * per_token
            self.tiles = max_tiles(assignments, len(mine), block_m)
            buffer = torch.empty(3 * self.tiles + assignments, dtype=torch.int32, device=device)
            expert, first, count, rows = buffer.split((self.tiles, self.tiles, self.tiles, assignments))
            self.tile_list = TileList(expert, first, count, rows, block_m)

    def arrays(self) -> tuple[torch.Tensor, ...]:
        assert self.tile_list is not None
        t = self.tile_list
        return t.tile_expert, t.tile_first, t.tile_count, t.rows

    def routed(self) -> Routed:
        weights = None if self.tile_list is None else self.weights
        chosen = None if self.tile_list is None else self.chosen
        return Routed(self.scaled, self.r, self.logits, weights, self.tile_list, chosen)
