"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for many small matrices at once.

torch.optim.Muon takes one matrix after the other and always multiplies in bfloat16, which most CPUs do in software: for
this model's 120 matrices that costs three times what forward and backward passes do. Here matrices of one shape are
one batch, in the precision that the machine multiplies fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
RMS_OF_ADAMW = 0.2  # Liu et al. 2025, arXiv 2502.16982: an update's root mean square as AdamW's


def orthogonalized(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x float32 [N, R, C] -> float32 [N, R, C]: each matrix with its singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = (x / x.flatten(1).norm(dim=1).clamp(min=1e-7).view(-1, 1, 1)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).float()


class Muon(torch.optim.Optimizer):
    """The parameters are matrices [R, C]; the learning rate is AdamW's."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group["lr"], group["weight_decay"])

    def _update(self, parameters: list[torch.Tensor], lr: float, weight_decay: float) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = [self._momentum(p) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        update = torch.stack(gradients).lerp_(torch.stack(momenta), MOMENTUM)
        rate = lr * RMS_OF_ADAMW * max(parameters[0].shape) ** 0.5
        updates = orthogonalized(update, self._dtype).unbind()
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, updates, alpha=-rate)

    def _momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        found: torch.Tensor = state["momentum"]
        return found
