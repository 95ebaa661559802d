"""The operations of a layer as the Triton kernels compute them, and in which configuration.

Up to FUSED_TOKENS tokens a layer takes six launches: norm + QKV + rotation + cache, attention, output projection +
residual, norm + router, W1 + SwiGLU, W2 + weighted sum + residual. Up to DIRECT_TOKENS tokens the expert kernels find
their experts themselves; above, the router lists tiles of tokens that share an expert. For more tokens the first norm
is a separate launch, and so is the listing; sequences that decode among prompts take another launch of attention.

`invariant`: a token's bits must not depend on what else is in the batch, so every size takes the same kernels and
configurations of one kind of matrix instruction.
"""

from __future__ import annotations

import torch

from gptoss.kernels.fp8 import Fp8Matrix
from gptoss.kernels.layers import LayerCache, PackedExperts
from gptoss.kernels.triton import attention, dense, experts, routing, support
from gptoss.kernels.triton.configs import config_for
from gptoss.kernels.triton.lora import LayerAdapters
from gptoss.kernels.triton.metadata import TritonAttentionMetadata

DIRECT_TOKENS = 4
FUSED_TOKENS = 64  # up to here every program norms for itself


def norm_qkv(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    positions: torch.Tensor,
    rope: torch.Tensor,
    slots: torch.Tensor,
    cache: LayerCache,
    num_heads: int,
    *,
    invariant: bool,
) -> torch.Tensor:
    """x [T, H] -> queries [T, N, D], rotated; keys and values go into the cache at `slots`."""
    config = config_for(support.architecture(x.device), "qkv", len(x), invariant=invariant)
    where = (weight, bias, positions, rope, slots, cache, num_heads, config)
    if _norms_apart(x, invariant=invariant):
        scaled, r = dense.norm_tokens(x, norm, eps)
        return dense.qkv(scaled, *where, r=r, eps=eps)
    return dense.qkv(x, *where, norm=norm, eps=eps)


def paged_attention(
    query: torch.Tensor,
    cache: LayerCache,
    sinks: torch.Tensor,
    metadata: TritonAttentionMetadata,
    window: int | None,
    scale: float,
    *,
    invariant: bool,
) -> torch.Tensor:
    """query [T, N, D] -> [T, N D]."""
    name = support.architecture(query.device)
    decode, prefill = (config_for(name, "attention", n, invariant=invariant) for n in (1, PREFILL))
    return attention.paged_attention(
        query, cache, sinks, metadata, window, scale, decode, prefill, fixed=invariant
    )  # fmt: skip


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    *,
    invariant: bool,
) -> torch.Tensor:
    config = config_for(support.architecture(x.device), "out", len(x), invariant=invariant)
    return dense.linear(x, weight, config, bias=bias, residual=residual, out_dtype=out_dtype)


def norm_moe(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    router: torch.Tensor,
    router_bias: torch.Tensor,
    packed: PackedExperts,
    per_token: int,
    limit: float,
    num_tokens: torch.Tensor,
    *,
    local: range | None,
    invariant: bool,
    adapters: LayerAdapters | None = None,
) -> torch.Tensor:
    """x, residual [T, H] -> residual + what the experts add to x.

    `num_tokens` int32 [1]: later rows are padding.
    """
    name, tokens = support.architecture(x.device), len(x)
    config, first, second = (
        config_for(name, kernel, tokens, invariant=invariant) for kernel in ("router", "moe_w1", "moe_w2")
    )
    direct = tokens <= DIRECT_TOKENS and local is None and adapters is None
    delta = None if adapters is None else router_delta(adapters, x, norm, eps, len(router))
    many = invariant or tokens > routing.FEW_TOKENS
    routed = (routing.route_many if many else routing.route_few)(
        x, norm, router, router_bias, eps, config, num_tokens, per_token, None if direct else first.block_m, local,
        delta,
    )  # fmt: skip
    tiles = experts.Tiles.of(routed, num_tokens, per_token, first.block_m)
    if adapters is None:
        act = experts.moe_w1(routed.scaled, routed.r, packed.w1, packed.b1, limit, tiles, first)
        return experts.moe_w2(act, packed.w2, packed.b2, residual, tiles, second)
    assert routed.chosen is not None and routed.weights is not None
    added = adapters.experts_delta("w1", routed.scaled, routed.r, routed.chosen, packed.w1.num_rows)
    act = experts.moe_w1(routed.scaled, routed.r, packed.w1, packed.b1, limit, tiles, first, added)
    out = experts.moe_w2(act, packed.w2, packed.b2, residual, tiles, second)
    adapters.add_experts("w2", act, routed.chosen, routed.weights, out)
    return out


def router_delta(
    adapters: LayerAdapters, x: torch.Tensor, norm: torch.Tensor, eps: float, num_experts: int
) -> torch.Tensor | None:
    """What adapters add to the router's logits, float32 [T, E]; None: nothing."""
    if not adapters.rank("router"):
        return None
    scaled, r = dense.norm_tokens(x, norm, eps)
    delta = torch.zeros(len(x), num_experts, dtype=torch.float32, device=x.device)
    adapters.add("router", scaled, delta, r=r)
    return delta


def norm_head(
    x: torch.Tensor,
    rows: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    head: torch.Tensor | Fp8Matrix,
    out: torch.Tensor | None = None,
    *,
    invariant: bool,
) -> torch.Tensor:
    """x [T, H], rows int64 [R] -> logits float32 [R, V], in `out` where given."""
    config = config_for(support.architecture(x.device), "lm_head", len(rows), invariant=invariant)
    if _norms_apart(rows, invariant=invariant):
        scaled, r = dense.norm_tokens(x[rows], norm, eps)
        return dense.linear(scaled, head, config, r=r, out_dtype=torch.float32, out=out)
    return dense.linear(x, head, config, rows=rows, norm=norm, eps=eps, out_dtype=torch.float32, out=out)


PREFILL = 1 << 16  # tokens enough for the table's last row


def _norms_apart(rows: torch.Tensor, *, invariant: bool) -> bool:
    return invariant or len(rows) > FUSED_TOKENS
