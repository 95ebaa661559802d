"""What the tests of Triton kernels share."""

from __future__ import annotations

import torch

from gptoss.kernels.triton import support

DEVICE = torch.device("cpu" if support.interpreted() else "cuda")
# the interpreter computes in float32, a GPU in bfloat16 with float32 sums
TYPE = torch.float32 if support.interpreted() else torch.bfloat16
TOLERANCE = 2e-6 if support.interpreted() else 6e-3
ARCHITECTURE = support.architecture(DEVICE)


def normal(generator: torch.Generator, *shape: int, std: float = 1.0) -> torch.Tensor:
    """On the CPU, rounded to the type of the kernels' operands."""
    return (torch.randn(shape, generator=generator) * std).to(TYPE).float()


def on_device(x: torch.Tensor) -> torch.Tensor:
    return x.to(DEVICE, TYPE) if x.is_floating_point() else x.to(DEVICE)


def assert_close(name: str, expected: torch.Tensor, found: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """By the root mean square of the difference, relative to that of what is expected."""
    expected, found = expected.double().cpu(), found.double().cpu()
    assert torch.isfinite(found).all(), f"{name}: not finite"
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error <= tolerance, f"{name}: relative error {error:.2e}"
