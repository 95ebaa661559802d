"""What the tests of Triton kernels share."""

from __future__ import annotations

import torch

from gptoss.kernels.triton import support
from gptoss.kernels.triton.tiles import TileList, max_tiles

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


def tile_list_ref(experts: torch.Tensor, num_tokens: torch.Tensor, num_experts: int, block_m: int) -> TileList:
    """The tiles of experts int32 [T, k], by plain torch."""
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
