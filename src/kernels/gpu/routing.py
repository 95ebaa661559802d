"""Which experts a token goes to, and the list of tiles that the expert kernels walk.

Top-k of the router's logits, softmax over the chosen k alone (gpt-oss model card, section 2.3). Equal logits: the lower
expert first.

Shapes: T tokens, E experts, k experts per token, A = T k assignments (assignment a = token * k + slot).
A tile is up to `block_m` assignments of one expert; what the kernels need of it:
    tile_expert  int32 [P]  -1: no tile
    tile_first   int32 [P]  where its assignments begin in `rows`
    tile_count   int32 [P]
    rows         int32 [A]  assignments sorted by expert, in their own order within an expert
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from src.kernels.gpu import support

ONE_PROGRAM_ASSIGNMENTS = (
    1024  # up to here one program makes the list; above it, sorting by torch costs little beside
)
CHUNK = 32


@dataclass(frozen=True, slots=True)
class TileList:
    tile_expert: torch.Tensor
    tile_first: torch.Tensor
    tile_count: torch.Tensor
    rows: torch.Tensor
    block_m: int


def max_tiles(assignments: int, num_experts: int, block_m: int) -> int:
    """No routing needs more: each expert that is used adds at most one tile that is not full. A multiple of 4, so that
    arrays of that length that share a buffer are all aligned alike, and take one compilation."""
    needed = min(assignments, num_experts) + assignments // block_m
    return -(-needed // 4) * 4


@triton.jit
def choose_experts(logits, expert, PER_TOKEN: tl.constexpr):
    """logits [E'], expert = arange(E'); what is past the last expert holds -inf.
    -> (int32 [PER_TOKEN] in falling order of their logits, float32 [PER_TOKEN] weights that sum to 1)."""
    slot = tl.arange(0, PER_TOKEN)
    chosen = tl.zeros((PER_TOKEN,), tl.int32)
    values = tl.full((PER_TOKEN,), float("-inf"), tl.float32)
    for j in tl.static_range(PER_TOKEN):
        best = tl.argmax(logits, axis=0)
        value = tl.max(logits, axis=0)
        chosen = tl.where(slot == j, best, chosen)
        values = tl.where(slot == j, value, values)
        logits = tl.where(expert == best, float("-inf"), logits)
    p = tl.exp(values - tl.max(values, axis=0))
    return chosen, p / tl.sum(p, axis=0)


@triton.jit
def _route_kernel(
    logits_ptr, experts_ptr, weights_ptr, NUM_EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr,
    PER_TOKEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    expert = tl.arange(0, PADDED_EXPERTS)
    logits = tl.load(
        logits_ptr + token * NUM_EXPERTS + expert, mask=expert < NUM_EXPERTS, other=float("-inf")
    )
    chosen, weights = choose_experts(logits, expert, PER_TOKEN)
    slot = tl.arange(0, PER_TOKEN)
    tl.store(experts_ptr + token * PER_TOKEN + slot, chosen)
    tl.store(weights_ptr + token * PER_TOKEN + slot, weights)


@triton.jit(do_not_specialize=["assignments", "max_tiles"])
def _tile_list_kernel(
    experts_ptr, num_tokens_ptr, tile_expert_ptr, tile_first_ptr, tile_count_ptr, rows_ptr, assignments, max_tiles,
    PADDED_EXPERTS: tl.constexpr, PER_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: counting sort by expert, stable."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    valid = tl.load(num_tokens_ptr) * PER_TOKEN
    expert = tl.arange(0, PADDED_EXPERTS)
    counts = tl.zeros((PADDED_EXPERTS,), tl.int32)
    for start in tl.range(0, assignments, CHUNK):
        a = start + tl.arange(0, CHUNK)
        mine = tl.load(experts_ptr + a, mask=(a < assignments) & (a < valid), other=-1)
        counts += tl.sum((mine[:, None] == expert[None, :]).to(tl.int32), axis=0)
    offsets = tl.cumsum(counts, axis=0) - counts
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    tile_end = tl.cumsum(tiles, axis=0)
    running = offsets
    for start in tl.range(0, assignments, CHUNK):
        a = start + tl.arange(0, CHUNK)
        inside = (a < assignments) & (a < valid)
        mine = tl.load(experts_ptr + a, mask=inside, other=-1)
        hot = (mine[:, None] == expert[None, :]).to(tl.int32)
        rank = tl.cumsum(hot, axis=0) - hot
        place = tl.sum(hot * (running[None, :] + rank), axis=1)
        tl.store(rows_ptr + place, a, mask=inside)
        running += tl.sum(hot, axis=0)
    for start in tl.range(0, max_tiles, CHUNK):
        p = start + tl.arange(0, CHUNK)
        owner = tl.sum((tile_end[None, :] <= p[:, None]).to(tl.int32), axis=1)
        hot = (owner[:, None] == expert[None, :]).to(tl.int32)
        done = (p - tl.sum(hot * (tile_end - tiles)[None, :], axis=1)) * BLOCK_M
        left = tl.sum(hot * counts[None, :], axis=1) - done
        in_list = p < max_tiles
        tl.store(tile_expert_ptr + p, tl.where(owner < PADDED_EXPERTS, owner, -1), mask=in_list)
        tl.store(tile_first_ptr + p, tl.sum(hot * offsets[None, :], axis=1) + done, mask=in_list)
        tl.store(tile_count_ptr + p, tl.minimum(tl.maximum(left, 0), BLOCK_M), mask=in_list)


def route(logits: torch.Tensor, per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """logits float32 [T, E] -> (experts int32 [T, k], weights float32 [T, k])."""
    tokens, num_experts = logits.shape
    experts = torch.empty(tokens, per_token, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, per_token, dtype=torch.float32, device=logits.device)
    options = support.switches(logits.device)
    _route_kernel[(tokens,)](
        logits,
        experts,
        weights,
        num_experts,
        triton.next_power_of_2(num_experts),
        per_token,
        num_warps=1,
        **options,
    )
    return experts, weights


def tile_list(
    experts: torch.Tensor, num_tokens: torch.Tensor, num_experts: int, block_m: int
) -> TileList:
    """experts int32 [T, k], num_tokens int32 [1]: rows of the batch that are tokens, the rest is padding."""
    assignments = experts.numel()
    if assignments > ONE_PROGRAM_ASSIGNMENTS:
        return tile_list_ref(experts, num_tokens, num_experts, block_m)
    count = max_tiles(assignments, num_experts, block_m)
    made = torch.empty(3 * count + assignments, dtype=torch.int32, device=experts.device)
    tile_expert, tile_first, tile_count, rows = made.split((count, count, count, assignments))
    options = support.switches(experts.device)
    _tile_list_kernel[(1,)](
        experts, num_tokens, tile_expert, tile_first, tile_count, rows, assignments, count,
        triton.next_power_of_2(num_experts), experts.shape[1], block_m, CHUNK, num_warps=8, **options,
    )  # fmt: skip
    return TileList(tile_expert, tile_first, tile_count, rows, block_m)


def tile_list_ref(
    experts: torch.Tensor, num_tokens: torch.Tensor, num_experts: int, block_m: int
) -> TileList:
    """The same by torch, without waiting for the device."""
    assignments, per_token = experts.numel(), experts.shape[1]
    index = torch.arange(assignments, device=experts.device)
    owner = torch.where(index < num_tokens * per_token, experts.flatten().long(), num_experts)
    rows = torch.argsort(owner, stable=True)
    counts = owner.new_zeros(num_experts + 1).scatter_add_(0, owner, torch.ones_like(owner))[:-1]
    tiles = (counts + block_m - 1) // block_m
    tile_end, offsets = tiles.cumsum(0), counts.cumsum(0) - counts
    p = torch.arange(max_tiles(assignments, num_experts, block_m), device=experts.device)
    expert = torch.searchsorted(tile_end, p, right=True)
    known = expert.clamp(max=num_experts - 1)
    done = (p - (tile_end - tiles)[known]) * block_m
    used = expert < num_experts
    return TileList(
        torch.where(used, expert, -1).int(),
        torch.where(used, offsets[known] + done, 0).int(),
        torch.where(used, (counts[known] - done).clamp(max=block_m), 0).int(),
        rows.int(),
        block_m,
    )


def only_local(
    experts: torch.Tensor, weights: torch.Tensor, local: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """experts int32 [T, k] of all ranks -> numbered from this rank's first. Those elsewhere become the token's first
    local one, or expert 0, with weight 0, so that every token keeps k parts and no further expert is read."""
    mine = (experts >= local.start) & (experts < local.stop)
    first = torch.gather(experts, 1, mine.int().argmax(dim=1, keepdim=True))
    stand_in = torch.where(mine.any(dim=1, keepdim=True), first, local.start)
    return (torch.where(mine, experts, stand_in) - local.start).int(), weights * mine
