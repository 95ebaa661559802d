"""The mixture of experts: the native kernels where they run, else plain torch.

Shapes: T tokens, H hidden, E experts, k experts per token, I intermediate.
"""

from __future__ import annotations

import torch

from gptoss.kernels.cpu import native
from gptoss.kernels.reference.moe import ExpertWeights, moe_forward_ref, route_ref


def moe_forward(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    experts_per_token: int,
    params: ExpertWeights,
    swiglu_limit: float,
    residual: torch.Tensor,
    local_experts: range | None = None,
) -> torch.Tensor:
    """x [T, H] normed, router_logits [T, E], residual [T, H] -> residual + what the experts add.

    `local_experts`: `params` hold only these of the E; the others' part is left out.
    """
    if native.supports(x):
        experts, weights = native.route(router_logits.float(), experts_per_token)
        if local_experts is not None:
            experts, weights = _only(experts, weights, local_experts)
        return native.moe(x, experts, weights, params.w1, params.b1, params.w2, params.b2, residual, swiglu_limit)
    experts, weights = route_ref(router_logits, experts_per_token)
    if local_experts is not None:
        experts, weights = _only(experts, weights, local_experts)
    return residual + moe_forward_ref(x, experts, weights, params, swiglu_limit)


def _only(experts: torch.Tensor, weights: torch.Tensor, local: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers experts from the first local one. Those elsewhere become a local one with weight zero, that of the
    token's first local choice if it has one, so that no further expert is read."""
    mine = (experts >= local.start) & (experts < local.stop)
    first = torch.gather(experts, 1, mine.int().argmax(dim=1, keepdim=True))
    stand_in = torch.where(mine.any(dim=1, keepdim=True), first, local.start)
    return torch.where(mine, experts, stand_in) - local.start, weights * mine
