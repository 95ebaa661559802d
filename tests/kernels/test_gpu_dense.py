"""The dense Triton kernels against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from gptoss.kernels.layers import LayerCache
from gptoss.kernels.reference.rope import apply_rope_ref, rope_tables
from gptoss.kernels.triton import dense
from gptoss.kernels.triton.configs import TileConfig
from tests.kernels.gpu_helpers import DEVICE, assert_close, normal, on_device

EPS = 1e-5
SMALL = TileConfig(16, 16, 1, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normed(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * scale.double()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 16), (3, 160, 40), (17, 96, 32), (33, 80, 24)])
@pytest.mark.parametrize("config", [SMALL, TileConfig(32, 16, 2, 1)])
def test_linear(rows: int, inputs: int, outputs: int, config: TileConfig) -> None:
    g = seeded()
    x, w, bias, residual = (
        normal(g, rows, inputs),
        normal(g, outputs, inputs),
        normal(g, outputs),
        normal(g, rows, outputs),
    )
    expected = x.double() @ w.double().t() + bias + residual
    found = dense.linear(on_device(x), on_device(w), config, bias=on_device(bias), residual=on_device(residual))
    assert_close("linear", expected, found)


def test_linear_takes_the_rows_it_is_told() -> None:
    g = seeded()
    x, w = normal(g, 9, 64), normal(g, 16, 64)
    rows = torch.tensor([7, 0, 7])
    found = dense.linear(on_device(x), on_device(w), SMALL, rows=on_device(rows), out_dtype=torch.float32)
    assert_close("rows", x[rows].double() @ w.double().t(), found)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("inputs", [64, 160])
def test_the_norm_is_part_of_the_product(inputs: int) -> None:
    g = seeded()
    x, w, scale = normal(g, 5, inputs, std=40.0), normal(g, 16, inputs), normal(g, inputs)
    expected = normed(x, scale) @ w.double().t()
    fused = dense.linear(on_device(x), on_device(w), SMALL, norm=on_device(scale), eps=EPS)
    assert_close("fused", expected, fused)
    scaled, r = dense.norm_tokens(on_device(x), on_device(scale), EPS)
    assert_close("scaled", x.double() * scale.double(), scaled)
    assert_close("apart", expected, dense.linear(scaled, on_device(w), SMALL, r=r))


def test_padding_rows_cannot_reach_others() -> None:
    g = seeded()
    x, w = normal(g, 20, 64), normal(g, 16, 64)
    poisoned = torch.full((40, 64), float("nan"))
    poisoned[:20] = x
    alone = dense.linear(on_device(x[:20]), on_device(w), SMALL)
    beside = dense.linear(on_device(poisoned), on_device(w), SMALL)[:20]
    assert torch.equal(alone, beside)


@pytest.mark.parametrize("tokens", [1, 2, 19])
def test_a_row_does_not_depend_on_the_others(tokens: int) -> None:
    g = seeded()
    x, w, scale = normal(g, 19, 96), normal(g, 32, 96), normal(g, 96)
    whole = dense.linear(on_device(x), on_device(w), SMALL, norm=on_device(scale), eps=EPS)
    part = dense.linear(on_device(x[:tokens]), on_device(w), SMALL, norm=on_device(scale), eps=EPS)
    assert torch.equal(whole[:tokens], part)


@pytest.mark.parametrize(
    ("heads", "groups", "config"),
    [(4, 2, TileConfig(32, 16, 1, 1)), (8, 1, TileConfig(64, 16, 1, 1)), (3, 1, TileConfig(128, 16, 1, 1))],
)
@pytest.mark.parametrize("way", ["fused", "done"])
def test_qkv_rotates_and_stores(heads: int, groups: int, config: TileConfig, way: str) -> None:
    g = seeded()
    tokens, size, dim, block_size, blocks = 5, 96, 32, 4, 6
    x, scale = normal(g, tokens, size, std=3.0), normal(g, size)
    w, bias = normal(g, (heads + 2 * groups) * dim, size), normal(g, (heads + 2 * groups) * dim)
    positions = torch.tensor([0, 7, 3, 100, 41])
    slots = torch.tensor([5, 23, 8, 4, 17])
    inverse = 1.0 / 150_000 ** (torch.arange(0, dim, 2) / dim)
    cos, sin = rope_tables(torch.arange(128), inverse, 1.3)
    table = torch.stack((cos.squeeze(1), sin.squeeze(1)), dim=1)
    caches = [torch.full((blocks, block_size, groups, dim), 7.0) for _ in range(2)]
    cache = LayerCache(*(on_device(c) for c in caches))
    given = {"norm": on_device(scale)} if way == "fused" else {}
    taken = on_device(x)
    if way == "done":
        taken, given["r"] = dense.norm_tokens(taken, on_device(scale), EPS)
    query = dense.qkv(
        taken,
        on_device(w),
        on_device(bias),
        positions.to(DEVICE),
        table.to(DEVICE),
        slots.to(DEVICE),
        cache,
        heads,
        config,
        eps=EPS,
        **given,
    )
    expected = (normed(x, scale) @ w.double().t() + bias).view(tokens, -1, dim)
    rotated = apply_rope_ref(expected[:, : heads + groups].float(), cos[positions], sin[positions])
    assert_close("query", rotated[:, :heads], query)
    for stored, filled, new in (
        (cache.key, caches[0], rotated[:, heads:]),
        (cache.value, caches[1], expected[:, heads + groups :].float()),
    ):
        filled.flatten(0, 1)[slots] = new
        assert_close("cache", filled, stored)
