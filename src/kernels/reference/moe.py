"""The mixture of experts in plain torch: route, W1 with clamped SwiGLU, W2, weighted sum.

Formulas: gpt-oss model card, section 2.3, and its reference implementation: top-k of the router logits, softmax over
the chosen k alone; gate = min(gate, limit), up = clamp(up, -limit, limit), out = gate * sigmoid(1.702 gate) * (up + 1).

Shapes: T tokens, H hidden, E experts, k experts per token, I intermediate.
    w1  [E, 2 I, H], b1 [E, 2 I]: the I gate rows first, then the I up rows (checkpoints interleave them)
    w2  [E, H, I],   b2 [E, H]
"""

from __future__ import annotations

import torch

from gptoss.kernels.layers import ExpertWeights
from gptoss.kernels.mxfp4 import Mxfp4Tensor, dequantize_mxfp4
from gptoss.kernels.reference.lora import LoraRows

SWIGLU_ALPHA = 1.702


def route_ref(logits: torch.Tensor, experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] -> (expert ids int64 [T, k], weights float32 [T, k] that sum to 1)."""
    values, experts = torch.topk(logits, experts_per_token, dim=-1)
    return experts, torch.softmax(values.float(), dim=-1)


def only_local_ref(experts: torch.Tensor, weights: torch.Tensor, local: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Renumbers experts from the first local one; the others get weight zero.

    In their place stands the token's first local choice, or expert 0 if it has none, so that no further expert is read.
    """
    mine = (experts >= local.start) & (experts < local.stop)
    first = torch.gather(experts, 1, mine.int().argmax(dim=1, keepdim=True))
    stand_in = torch.where(mine.any(dim=1, keepdim=True), first, local.start)
    return torch.where(mine, experts, stand_in) - local.start, weights * mine


def clamped_swiglu_ref(gate_up: torch.Tensor, limit: float) -> torch.Tensor:
    """[T, 2 I], gate half first -> [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up.clamp(-limit, limit) + 1)


def moe_forward_ref(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    params: ExpertWeights,
    swiglu_limit: float,
    lora: LoraRows | None = None,
) -> torch.Tensor:
    """x [T, H], experts int64 [T, k], weights float32 [T, k] -> [T, H] in the dtype of `x`.

    Tokens are sorted by expert, so each expert's weights are read once. A token's k parts are added in the order of
    its router logits, whatever else is in the batch.
    """
    num_tokens, per_token = experts.shape
    flat = experts.flatten()
    order = torch.argsort(flat, stable=True)
    expert_of_row = flat[order]
    ids, counts = torch.unique_consecutive(expert_of_row, return_counts=True)
    groups = list(zip(ids.tolist(), counts.tolist(), strict=True))

    rows = x[order // per_token] if num_tokens > 1 else x.expand(per_token, -1)
    hidden = _grouped_linear(rows, params.w1, groups) + params.b1[expert_of_row]
    if lora is not None:
        lora.add_experts("w1", rows, order // per_token, expert_of_row, hidden)
    hidden = clamped_swiglu_ref(hidden, swiglu_limit)
    parts = _grouped_linear(hidden, params.w2, groups) + params.b2[expert_of_row]
    if lora is not None:
        lora.add_experts("w2", hidden, order // per_token, expert_of_row, parts)

    unsorted = torch.empty_like(parts)
    unsorted[order] = parts
    by_token = unsorted.view(num_tokens, per_token, -1)
    return torch.einsum("tkh,tk->th", by_token.float(), weights).to(x.dtype)


def _grouped_linear(rows: torch.Tensor, w: torch.Tensor | Mxfp4Tensor, groups: list[tuple[int, int]]) -> torch.Tensor:
    """rows [R, K] sorted by expert; groups of (expert, number of rows) -> [R, N]."""
    parts = []
    counts = [count for _, count in groups]
    for (expert, _), part in zip(groups, rows.split(counts), strict=True):
        matrix = w[expert]
        if isinstance(matrix, Mxfp4Tensor):
            matrix = dequantize_mxfp4(matrix, part.dtype)
        parts.append(torch.mm(part, matrix.t()))
    return torch.cat(parts)
