"""What LoRA adapters add, in Triton: y += (x A^T) B, each token with the adapter of its slot.

Of dense matrices, tokens of one adapter form tiles of up to BLOCK_M, which both products take by matrix instructions:
the first sums over K into u, the second over the rank. Of experts, each assignment has an adapter and an expert of its
own, and its matrices are read by one program. Terms are added in the order of K and of the rank, whatever else is in
the batch.

Shapes: T tokens, S slots, r rank, R the largest rank to a multiple of 16, K inputs, N outputs, k experts per token, A =
T k assignments (assignment a = token * k + slot), P tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gptoss.kernels.lora import MODULES, NUM_MODULES, LayerLora, Module
from gptoss.kernels.triton import support
from gptoss.kernels.triton.metadata import LORA_TILE, TritonLora

BLOCK_R = 16  # the narrowest tile of matrix instructions
BLOCK_M = LORA_TILE
BLOCK_K = 128
BLOCK_N = 128
STAGES, WARPS = 2, 4


@triton.jit
def matrices_of(table_ptr, slot, module, NUM_MODULES: tl.constexpr, ELEMENT: tl.constexpr):
    """The pointers of A and B, and the rank: 0 where the slot's adapter leaves the module as it is."""
    row = table_ptr + (slot * NUM_MODULES + module) * 3
    a_ptr = tl.load(row).to(tl.pointer_type(ELEMENT))
    b_ptr = tl.load(row + 1).to(tl.pointer_type(ELEMENT))
    return a_ptr, b_ptr, tl.load(row + 2).to(tl.int32)


@triton.jit
def tile_rows(tile_slot_ptr, tile_first_ptr, tile_count_ptr, rows_ptr, BLOCK_M: tl.constexpr):
    """The tile of program_id(0): its slot, its rows of the batch [BLOCK_M], and which are real."""
    p = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)
    valid = m < tl.load(tile_count_ptr + p)
    row = tl.load(rows_ptr + tl.load(tile_first_ptr + p) + m, mask=valid, other=0)
    return tl.load(tile_slot_ptr + p).to(tl.int64), row.to(tl.int64), valid


@triton.jit(do_not_specialize=["module", "width"])
def _shrink_kernel(
    table_ptr, x_ptr, r_ptr, u_ptr, tile_slot_ptr, tile_first_ptr, tile_count_ptr, rows_ptr, module, width,
    NUM_MODULES: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, ELEMENT: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (P, R / BLOCK_R): u float32 [T, R] = A x, times r [T] if given. x [T, K]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot, row, valid = tile_rows(tile_slot_ptr, tile_first_ptr, tile_count_ptr, rows_ptr, BLOCK_M)
    a_ptr, _, rank = matrices_of(table_ptr, slot, module, NUM_MODULES, ELEMENT)
    j = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(1) * BLOCK_R >= rank:
        return
    k = tl.arange(0, BLOCK_K)
    a = a_ptr + tl.where(j < rank, j, 0).to(tl.int64)[:, None] * K + k[None, :]
    x = x_ptr + row[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = start + k < K
        left = tl.load(a + start, mask=inside[None, :], other=0.0)
        right = tl.load(x + start, mask=valid[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(left.to(COMPUTE), right.to(COMPUTE), acc)
    if r_ptr is not None:
        acc = acc * tl.load(r_ptr + row, mask=valid, other=0.0)[None, :]
    tl.store(u_ptr + row[None, :] * width + j[:, None], acc, mask=(j < rank)[:, None] & valid[None, :])


@triton.jit(do_not_specialize=["module", "width", "first", "stride"])
def _expand_kernel(
    table_ptr, u_ptr, out_ptr, tile_slot_ptr, tile_first_ptr, tile_count_ptr, rows_ptr, module, width, first, stride,
    NUM_MODULES: tl.constexpr, N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ELEMENT: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (P, N / BLOCK_N): columns `first` ... of out [T, stride] += u B."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot, row, valid = tile_rows(tile_slot_ptr, tile_first_ptr, tile_count_ptr, rows_ptr, BLOCK_M)
    _, b_ptr, rank = matrices_of(table_ptr, slot, module, NUM_MODULES, ELEMENT)
    if rank == 0:
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, rank, BLOCK_R):
        j = start + tl.arange(0, BLOCK_R)
        known = j < rank
        b = tl.load(b_ptr + j.to(tl.int64)[:, None] * N + n[None, :], mask=known[:, None] & (n < N)[None, :], other=0.0)
        u = tl.load(u_ptr + row[None, :] * width + j[:, None], mask=known[:, None] & valid[None, :], other=0.0)
        acc = tl.dot(tl.trans(b).to(COMPUTE), u.to(COMPUTE), acc)
    at = out_ptr + row[None, :] * stride + first + n[:, None]
    inside = (n < N)[:, None] & valid[None, :]
    acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["module", "width"])
def _expert_shrink_kernel(
    table_ptr, x_ptr, r_ptr, u_ptr, slots_ptr, chosen_ptr, module, width,
    NUM_MODULES: tl.constexpr, K: tl.constexpr, PER_TOKEN: tl.constexpr, BY_TOKEN: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, ELEMENT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (A, R / BLOCK_R): u float32 [A, R].

    x is [T, K] and multiplied by r [T] if BY_TOKEN, else [A, K].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i = tl.program_id(0).to(tl.int64)
    token = i // PER_TOKEN
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    a_ptr, _, rank = matrices_of(table_ptr, slot, module, NUM_MODULES, ELEMENT)
    if tl.program_id(1) * BLOCK_R >= rank:
        return
    j = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert = tl.load(chosen_ptr + i).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    a = a_ptr + (expert * rank + tl.where(j < rank, j, 0))[:, None] * K + k[None, :]
    x = x_ptr + (token if BY_TOKEN else i) * K + k
    acc = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        left = tl.load(a + start, mask=inside[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(left * tl.load(x + start, mask=inside, other=0.0).to(tl.float32)[None, :], axis=1)
    if BY_TOKEN:
        acc = acc * tl.load(r_ptr + token)
    tl.store(u_ptr + i * width + j, acc, mask=j < rank)


@triton.jit(do_not_specialize=["module", "width"])
def _expert_expand_kernel(
    table_ptr, u_ptr, out_ptr, weights_ptr, slots_ptr, chosen_ptr, module, width,
    NUM_MODULES: tl.constexpr, N: tl.constexpr, PER_TOKEN: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, ELEMENT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What the adapters add to the experts' products; PARTS assignments go into each row of out.

    PARTS 1: grid (A, N / BLOCK_N), out float32 [A, N] is written, zeros where there is no adapter. PARTS k: grid (T,
    N / BLOCK_N), the weighted sum is added to out [T, N].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + i * PARTS // PER_TOKEN)
    rank = 0
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = out_ptr + i * N + n
    acc = tl.zeros((BLOCK_N,), tl.float32)
    if slot >= 0:
        _, b_ptr, rank = matrices_of(table_ptr, slot, module, NUM_MODULES, ELEMENT)
        for part in range(PARTS):
            a = i * PARTS + part
            b = b_ptr + tl.load(chosen_ptr + a).to(tl.int64) * rank * N
            one = tl.zeros((BLOCK_N,), tl.float32)
            for start in range(0, rank, BLOCK_R):
                j = start + tl.arange(0, BLOCK_R)
                u = tl.load(u_ptr + a * width + j, mask=j < rank, other=0.0)
                rows = tl.load(
                    b + j.to(tl.int64)[:, None] * N + n[None, :], mask=(j < rank)[:, None] & (n < N)[None, :], other=0.0
                )  # fmt: skip
                one += tl.sum(rows.to(tl.float32) * u[:, None], axis=0)
            if PARTS > 1:
                one = one * tl.load(weights_ptr + a)
            acc += one
    if PARTS == 1:
        tl.store(at, acc, mask=n < N)
    elif rank > 0:
        acc += tl.load(at, mask=n < N, other=0.0).to(tl.float32)
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _add_qkv_kernel(
    delta_ptr, positions_ptr, rope_ptr, slots_ptr, lora_slots_ptr, q_ptr, key_ptr, value_ptr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T, N + 2 G): adds a head of delta [T, (N + 2 G) D], rotated, to what dense.qkv wrote."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    if tl.load(lora_slots_ptr + token) < 0:
        return
    head = tl.program_id(1)
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, HALF)
    delta = delta_ptr + (token * (HEADS + 2 * GROUPS) + head) * D + d
    first = tl.load(delta)
    second = tl.load(delta + HALF)
    angle = rope_ptr + tl.load(positions_ptr + token).to(tl.int64) * D + d
    is_rotated = head < HEADS + GROUPS
    cos = tl.load(angle, mask=d < tl.where(is_rotated, HALF, 0), other=1.0)
    sin = tl.load(angle + HALF, mask=d < tl.where(is_rotated, HALF, 0), other=0.0)
    one = first * cos - second * sin
    two = second * cos + first * sin
    if head < HEADS:
        at = q_ptr + (token * HEADS + head) * D + d
        tl.store(at, (tl.load(at).to(tl.float32) + one).to(q_ptr.dtype.element_ty))
        tl.store(at + HALF, (tl.load(at + HALF).to(tl.float32) + two).to(q_ptr.dtype.element_ty))
    elif is_rotated:
        at = key_ptr + (tl.load(slots_ptr + token).to(tl.int64) * GROUPS + head - HEADS) * D + d
        tl.store(at, (tl.load(at).to(tl.float32) + one).to(key_ptr.dtype.element_ty))
        tl.store(at + HALF, (tl.load(at + HALF).to(tl.float32) + two).to(key_ptr.dtype.element_ty))
    else:
        at = value_ptr + (tl.load(slots_ptr + token).to(tl.int64) * GROUPS + head - HEADS - GROUPS) * D + d
        tl.store(at, (tl.load(at).to(tl.float32) + one).to(value_ptr.dtype.element_ty))
        tl.store(at + HALF, (tl.load(at + HALF).to(tl.float32) + two).to(value_ptr.dtype.element_ty))


class LayerAdapters:
    """A step's adapters in one layer; launches kernels only for what an adapter in use adapts."""

    def __init__(self, lora: LayerLora, step: TritonLora) -> None:
        self._lora = lora
        self._step = step

    def add(
        self, module: Module, x: torch.Tensor, out: torch.Tensor, first: int = 0, outputs: int | None = None,
        r: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Adds to `outputs` columns of out [T, N] from `first` on.

        x [T, K] is multiplied by r float32 [T] if given.
        """
        rank = self.rank(module)
        if not rank:
            return
        tiles, device = self._step.tiles, x.device
        u = torch.empty(len(x), rank, dtype=torch.float32, device=device)
        outputs = out.shape[1] if outputs is None else outputs
        number, count = MODULES.index(module), len(tiles[0])
        _shrink_kernel[(count, rank // BLOCK_R)](
            self._lora.addresses, x, r, u, *tiles, number, rank, NUM_MODULES, x.shape[1], BLOCK_R, BLOCK_M, BLOCK_K,
            STAGES, self._element(x), num_warps=WARPS, **support.launch_options(device, "COMPUTE"),
        )  # fmt: skip
        _expand_kernel[(count, triton.cdiv(outputs, BLOCK_N))](
            self._lora.addresses, u, out, *tiles, number, rank, first, out.shape[1], NUM_MODULES, outputs, BLOCK_R,
            BLOCK_M, BLOCK_N, self._element(x), num_warps=WARPS, **support.launch_options(device, "COMPUTE"),
        )  # fmt: skip

    def add_qkv(
        self, scaled: torch.Tensor, r: torch.Tensor, positions: torch.Tensor, rope: torch.Tensor, slots: torch.Tensor,
        query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor,
    ) -> None:  # fmt: skip
        """Adds to queries [T, N, D], and to the keys and values of `slots`.

        scaled, r: what norm_tokens returned.
        """
        if not any(self.rank(module) for module in MODULES[:3]):
            return
        tokens, heads, head_dim = query.shape
        groups = key_cache.shape[2]
        delta = torch.zeros(tokens, (heads + 2 * groups) * head_dim, dtype=torch.float32, device=query.device)
        first = 0
        for module, count in zip(MODULES[:3], (heads, groups, groups), strict=True):
            self.add(module, scaled, delta, first, count * head_dim, r)
            first += count * head_dim
        _add_qkv_kernel[(tokens, heads + 2 * groups)](
            delta, positions, rope, slots, self._step.slots, query, key_cache, value_cache, heads, groups, head_dim,
            num_warps=1, **support.launch_options(query.device),
        )  # fmt: skip

    def experts_delta(
        self, module: Module, x: torch.Tensor, r: torch.Tensor, chosen: torch.Tensor, outputs: int
    ) -> torch.Tensor | None:
        """Returns what is added to the first product of each assignment, float32 [A, outputs]; None: nothing.

        x [T, K], r float32 [T], chosen int32 [T, k].
        """
        rank = self.rank(module)
        if not rank:
            return None
        u = self._expert_shrink(module, x, r, chosen, rank)
        delta = torch.empty(chosen.numel(), outputs, dtype=torch.float32, device=x.device)
        self._expert_expand(module, u, delta, None, chosen, parts=1)
        return delta

    def add_experts(
        self, module: Module, act: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Adds to out [T, N] the weighted sum for act [A, K]. weights float32 [T, k]."""
        rank = self.rank(module)
        if rank:
            u = self._expert_shrink(module, act, None, chosen, rank)
            self._expert_expand(module, u, out, weights, chosen, parts=chosen.shape[1])

    def rank(self, module: Module) -> int:
        """The largest rank of the step's adapters, to a multiple of BLOCK_R; 0: none adapts the module."""
        adapters = [self._lora.adapters[slot] for slot in self._step.slots_in_use]
        matrices = [getattr(adapter, module) for adapter in adapters if adapter is not None]
        largest = max((m.rank for m in matrices if m is not None), default=0)
        return -(-largest // BLOCK_R) * BLOCK_R

    def _expert_shrink(
        self, module: Module, x: torch.Tensor, r: torch.Tensor | None, chosen: torch.Tensor, rank: int
    ) -> torch.Tensor:
        u = torch.empty(chosen.numel(), rank, dtype=torch.float32, device=x.device)
        _expert_shrink_kernel[(chosen.numel(), rank // BLOCK_R)](
            self._lora.addresses, x, r, u, self._step.slots, chosen, MODULES.index(module), rank, NUM_MODULES,
            x.shape[1], chosen.shape[1], r is not None, BLOCK_R, BLOCK_K, self._element(x), num_warps=WARPS,
            **support.launch_options(x.device),
        )  # fmt: skip
        return u

    def _expert_expand(
        self, module: Module, u: torch.Tensor, out: torch.Tensor, weights: torch.Tensor | None, chosen: torch.Tensor,
        parts: int,
    ) -> None:  # fmt: skip
        element = self._element(self._weights(module))
        _expert_expand_kernel[(len(out), triton.cdiv(out.shape[1], BLOCK_N))](
            self._lora.addresses, u, out, weights, self._step.slots, chosen, MODULES.index(module), u.shape[1],
            NUM_MODULES, out.shape[1], chosen.shape[1], parts, BLOCK_R, BLOCK_N, element, num_warps=WARPS,
            **support.launch_options(out.device),
        )  # fmt: skip

    def _weights(self, module: Module) -> torch.Tensor:
        adapters = [a for a in self._lora.adapters if a is not None and getattr(a, module) is not None]
        weights: torch.Tensor = getattr(adapters[0], module).a
        return weights

    @staticmethod
    def _element(x: torch.Tensor) -> tl.dtype:
        return {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[x.dtype]
