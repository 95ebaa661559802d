"""Dense layers in bfloat16, with the RMSNorm before them and what follows them in one kernel.

RMSNorm is x * scale * r with r = 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, eq. 4). r is one number a
token, so a product of normed tokens is r times the product of x * scale: the kernel multiplies by r at the end and
sums the squares on its way over K, in one pass. x * scale is rounded to bfloat16 where the reference rounds r * x *
scale; the relative error is the same.

Weights are the first operand of the matrix instructions, tokens the second. Terms are added in the order of K.

Shapes: M tokens, K inputs, N outputs, N heads, G key-value heads, D head_dim, NB blocks, BS tokens a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gptoss.kernels.fp8 import Fp8Matrix
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.triton import support
from gptoss.kernels.triton.configs import TileConfig

BLOCK_K = 64


@triton.jit
def project(
    w_ptr, w_row, x_ptr, x_row, valid, norm_ptr, r_ptr, eps, K: tl.constexpr, NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Rows `w_row` of w [N, K] times rows `x_row` of x [M, K] -> float32 [BLOCK_N, BLOCK_M].

    `w_row` [BLOCK_N], `x_row` [BLOCK_M]. NORM "none": as it is; "fused": x is normed with the scale at `norm_ptr` [K];
    "done": x is scaled already, and `r_ptr` [M] holds the numbers to multiply by (norm_tokens).
    """
    k = tl.arange(0, BLOCK_K)
    w = w_ptr + w_row.to(tl.int64)[:, None] * K + k[None, :]
    x = x_ptr + x_row.to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            a = tl.load(w + start)
            b = tl.load(x + start, mask=valid[None, :], other=0.0)
        else:
            a = tl.load(w + start, mask=(start + k < K)[None, :], other=0.0)
            b = tl.load(x + start, mask=valid[None, :] & (start + k < K)[:, None], other=0.0)
        if NORM == "fused":
            scale = tl.load(norm_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            wide = b.to(tl.float32)
            squares += tl.sum(wide * wide, axis=0)
            b = (wide * scale[:, None]).to(x_ptr.dtype.element_ty)
        acc = tl.dot(a.to(COMPUTE), b.to(COMPUTE), acc)
    if NORM == "fused":
        acc = acc * tl.rsqrt(squares / K + eps)[None, :]
    if NORM == "done":
        acc = acc * tl.load(r_ptr + x_row, mask=valid, other=0.0)[None, :]
    return acc


@triton.jit
def prefetch(w_ptr, w_row, K: tl.constexpr):
    """Asks for rows `w_row` [BLOCK_N] of w [N, K], 16-bit numbers, to be brought into the L2 cache.

    Weights do not depend on the kernel before, so this comes before the wait for it, while the memory has little to do.
    """
    LINE: tl.constexpr = 64  # numbers of 128 bytes
    LINES: tl.constexpr = triton.next_power_of_2((K + LINE - 1) // LINE)
    at = tl.minimum(tl.arange(0, LINES) * LINE, K - LINE)
    address = (w_ptr + w_row.to(tl.int64)[:, None] * K + at[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def to_fp8(x, ASM: tl.constexpr):
    """float32 -> e4m3, rounded to nearest even, cut to +-448.

    The interpreter's own conversion drops a carry into the exponent (triton 3.6, 3.7), so there it is done in bits.
    """
    if ASM:
        return x.to(tl.float8e4nv)
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    even = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20  # three bits of the mantissa are left
    steps = (size + 16384.0).to(tl.int32, bitcast=True) & 0xF  # of 2^-9, below the normal numbers
    code = tl.where(size < 0.015625, steps, even - (120 << 3))
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr, w_ptr, w_scale_ptr, bias_ptr, residual_ptr, out_ptr, rows_ptr, norm_ptr, r_ptr, eps, num_rows,
    N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (N / BLOCK_N, M / BLOCK_M).

    bias [N], residual [M, N] and rows int [M] (which rows of x) may be None. w_scale float32 [N]: of weights in FP8,
    else None.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_row = n
    if N % BLOCK_N != 0:
        w_row = tl.where(n < N, n, 0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH:
            prefetch(w_ptr, w_row, K)
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = m < num_rows
    row = m
    if rows_ptr is not None:
        row = tl.load(rows_ptr + m, mask=valid, other=0)
    acc = project(
        w_ptr, w_row, x_ptr, row, valid, norm_ptr, r_ptr, eps, K, NORM, BLOCK_N, BLOCK_M, BLOCK_K, STAGES, COMPUTE
    )
    if w_scale_ptr is not None:
        acc = acc * tl.load(w_scale_ptr + w_row)[:, None]
    inside = (n < N)[:, None] & valid[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_tokens_kernel(
    x_ptr, scale_ptr, out_ptr, r_ptr, eps, K: tl.constexpr, PADDED_K: tl.constexpr, PDL: tl.constexpr
):
    """One program a token: x * scale, and r."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PADDED_K)
    x = tl.load(x_ptr + token * K + k, mask=k < K, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * K + k, (x * scale).to(out_ptr.dtype.element_ty), mask=k < K)
    tl.store(r_ptr + token, tl.rsqrt(tl.sum(x * x, axis=0) / K + eps))


@triton.jit(do_not_specialize=["num_rows"])
def _qkv_kernel(
    x_ptr, w_ptr, bias_ptr, norm_ptr, r_ptr, eps, positions_ptr, rope_ptr, slots_ptr, q_ptr, key_ptr, value_ptr,
    key_factor, value_factor, num_rows, HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PREFETCH: tl.constexpr, COMPUTE: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rotated queries to q [M, N, D]; rotated keys, and values, to the cache [NB, BS, G, D].

    They go to `slots` int64 [M]; in FP8 as codes, after multiplication by the factors, which else are None. rope
    float32 [positions, 2, D / 2], cosines first. Rows are taken in units of 16: 8 dimensions d of a head and the 8 at
    d + D / 2 that they are rotated with, which one lane of an m16n8 accumulator then holds both.
    """
    N: tl.constexpr = (HEADS + 2 * GROUPS) * D
    HALF: tl.constexpr = D // 2
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = n // 16
    head = unit // (D // 16)
    w_row = head * D + (unit % (D // 16)) * 8 + n % 8 + tl.where(n % 16 < 8, 0, HALF)
    if N % BLOCK_N != 0:
        w_row = tl.where(n < N, w_row, 0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH:
            prefetch(w_ptr, w_row, K)
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = m < num_rows
    acc = project(
        w_ptr, w_row, x_ptr, m, valid, norm_ptr, r_ptr, eps, K, NORM, BLOCK_N, BLOCK_M, BLOCK_K, STAGES, COMPUTE
    )
    acc += tl.load(bias_ptr + w_row).to(tl.float32)[:, None]
    halves = tl.permute(tl.reshape(acc, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1))
    first, second = tl.split(halves)
    first = tl.reshape(first, (BLOCK_N // 2, BLOCK_M))
    second = tl.reshape(second, (BLOCK_N // 2, BLOCK_M))

    j = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    head = j // HALF
    d = j % HALF
    position = tl.load(positions_ptr + m, mask=valid, other=0).to(tl.int64)
    rotated = (head < HEADS + GROUPS)[:, None] & valid[None, :]
    angle = rope_ptr + position[None, :] * D + d[:, None]
    cos = tl.load(angle, mask=rotated, other=1.0)
    sin = tl.load(angle + HALF, mask=rotated, other=0.0)
    one = first * cos - second * sin
    two = second * cos + first * sin

    slot = tl.load(slots_ptr + m, mask=valid, other=0).to(tl.int64)
    inside = valid[None, :]
    at_q = q_ptr + (m.to(tl.int64)[None, :] * HEADS + head[:, None]) * D + d[:, None]
    is_q = inside & (head < HEADS)[:, None]
    tl.store(at_q, one.to(q_ptr.dtype.element_ty), mask=is_q)
    tl.store(at_q + HALF, two.to(q_ptr.dtype.element_ty), mask=is_q)
    group = tl.where(head < HEADS + GROUPS, head - HEADS, head - HEADS - GROUPS)
    at = (slot[None, :] * GROUPS + group[:, None]) * D + d[:, None]
    is_k = inside & ((head >= HEADS) & (head < HEADS + GROUPS))[:, None]
    if key_factor is not None:
        tl.store(key_ptr + at, to_fp8(one * key_factor, ASM), mask=is_k)
        tl.store(key_ptr + at + HALF, to_fp8(two * key_factor, ASM), mask=is_k)
    else:
        tl.store(key_ptr + at, one.to(key_ptr.dtype.element_ty), mask=is_k)
        tl.store(key_ptr + at + HALF, two.to(key_ptr.dtype.element_ty), mask=is_k)
    is_v = inside & ((head >= HEADS + GROUPS) & (head < HEADS + 2 * GROUPS))[:, None]
    if value_factor is not None:
        tl.store(value_ptr + at, to_fp8(one * value_factor, ASM), mask=is_v)
        tl.store(value_ptr + at + HALF, to_fp8(two * value_factor, ASM), mask=is_v)
    else:
        tl.store(value_ptr + at, one.to(value_ptr.dtype.element_ty), mask=is_v)
        tl.store(value_ptr + at + HALF, two.to(value_ptr.dtype.element_ty), mask=is_v)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | Fp8Matrix,
    config: TileConfig,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    r: torch.Tensor | None = None,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns x W^T, [M', N], in `out` where given, with the bias and the residual added.

    x [M, K], weight [N, K], bias [N], residual [M', N]; M' = len(rows), if given, else M. `norm` [K]: x is normed
    first. `r` float32 [M]: x is what norm_tokens returned.
    """
    count = x.shape[0] if rows is None else rows.shape[0]
    outputs, inputs = weight.shape
    w, scales = (weight.codes, weight.scales) if isinstance(weight, Fp8Matrix) else (weight, None)
    if out is None:
        out = torch.empty(count, outputs, dtype=out_dtype or x.dtype, device=x.device)
    grid = (triton.cdiv(outputs, config.block_n), triton.cdiv(count, config.block_m))
    _linear_kernel[grid](
        x, w, scales, bias, residual, out, rows, norm, r, eps, count, outputs, inputs, _kind(norm, r),
        config.block_n, config.block_m, BLOCK_K, config.stages, _prefetches(config) and norm is None and r is None,
        num_warps=config.warps, **support.launch_options(x.device, "COMPUTE"),
    )  # fmt: skip
    return out


def norm_tokens(x: torch.Tensor, scale: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> (x * scale bfloat16 [M, K], r float32 [M])."""
    tokens, size = x.shape
    out = torch.empty_like(x)
    r = torch.empty(tokens, dtype=torch.float32, device=x.device)
    options = support.launch_options(x.device)
    _norm_tokens_kernel[(tokens,)](x, scale, out, r, eps, size, triton.next_power_of_2(size), num_warps=4, **options)
    return out, r


def qkv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    positions: torch.Tensor,
    rope: torch.Tensor,
    slots: torch.Tensor,
    cache: LayerCache,
    num_heads: int,
    config: TileConfig,
    *,
    norm: torch.Tensor | None = None,
    r: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """x [M, K], weight [(N + 2 G) D, K] -> queries [M, N, D]; keys and values go into the cache."""
    tokens, size = x.shape
    groups, head_dim = cache.key.shape[2:]
    factors = (1 / cache.key_scale, 1 / cache.value_scale) if cache.is_fp8 else (None, None)
    query = torch.empty(tokens, num_heads, head_dim, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(weight.shape[0], config.block_n), triton.cdiv(tokens, config.block_m))
    _qkv_kernel[grid](
        x, weight, bias, norm, r, eps, positions, rope, slots, query, cache.key, cache.value, *factors, tokens,
        num_heads, groups, head_dim, size, _kind(norm, r), config.block_n, config.block_m, BLOCK_K, config.stages,
        _prefetches(config), num_warps=config.warps, **support.launch_options(x.device, "COMPUTE", "ASM"),
    )  # fmt: skip
    return query


def _prefetches(config: TileConfig) -> bool:
    """Whether weights are asked for early: where there are few tokens.

    With more, many programs read the same part. The head, which is always normed, is larger than the cache.
    """
    return config.block_m <= 32


def _kind(norm: torch.Tensor | None, r: torch.Tensor | None) -> str:
    if r is not None:
        return "done"
    return "none" if norm is None else "fused"
