"""Expert kernels, routing and the layout of MXFP4 experts."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.engine.parallel.memory_plan import padding_bytes
from gptoss.engine.parallel.shards import whole
from gptoss.kernels.mxfp4 import Mxfp4Tensor, dequantize_mxfp4, quantize_mxfp4
from gptoss.kernels.reference.moe import clamped_swiglu_ref, route_ref
from gptoss.kernels.triton import experts, routing
from gptoss.kernels.triton.configs import TileConfig
from gptoss.kernels.triton.mxfp4_layout import gate_up_order, pack_experts, unpack_experts
from tests.kernels.gpu_helpers import DEVICE, assert_close, normal, on_device, tile_list_ref

NUM_EXPERTS, HIDDEN, INTER, PER_TOKEN = 6, 160, 96, 4
LIMIT = 7.0
SMALL = TileConfig(32, 8, 1, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(w: Mxfp4Tensor) -> Mxfp4Tensor:
    return Mxfp4Tensor(w.blocks.to(DEVICE), w.scales.to(DEVICE))


@triton.jit
def _route_kernel(logits_ptr, chosen_ptr, weights_ptr, EXPERTS: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr):
    token, e = tl.program_id(0), tl.arange(0, PADDED)
    logits = tl.load(logits_ptr + token * EXPERTS + e, mask=e < EXPERTS, other=float("-inf"))
    chosen, weights = routing.choose_experts(logits, e, K)
    tl.store(chosen_ptr + token * K + tl.arange(0, K), chosen)
    tl.store(weights_ptr + token * K + tl.arange(0, K), weights)


def route(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights with the bits that the kernels give them."""
    chosen = torch.empty(len(logits), PER_TOKEN, dtype=torch.int32, device=DEVICE)
    weights = torch.empty(len(logits), PER_TOKEN, device=DEVICE)
    padded = triton.next_power_of_2(logits.shape[1])
    _route_kernel[(len(logits),)](logits, chosen, weights, logits.shape[1], padded, PER_TOKEN)
    return chosen, weights


class Experts:
    def __init__(self) -> None:
        g = seeded(3)
        self.w1 = quantize_mxfp4(normal(g, NUM_EXPERTS, 2 * INTER, HIDDEN, std=0.3))
        self.w2 = quantize_mxfp4(normal(g, NUM_EXPERTS, HIDDEN, INTER, std=0.3))
        self.b1, self.b2 = normal(g, NUM_EXPERTS, 2 * INTER), normal(g, NUM_EXPERTS, HIDDEN)

    def run(
        self,
        x: torch.Tensor,
        r: torch.Tensor,
        logits: torch.Tensor,
        residual: torch.Tensor,
        num_tokens: int,
        *,
        block_m: int,
        direct: bool,
        config: TileConfig = SMALL,
    ) -> torch.Tensor:
        logits = logits.to(DEVICE)
        count = torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
        if direct:
            tiles = experts.Tiles(logits, count, PER_TOKEN, len(x) * PER_TOKEN, block_m)
        else:
            chosen, weights = route(logits)
            listed = tile_list_ref(chosen, count, NUM_EXPERTS, block_m)
            tiles = experts.Tiles(logits, count, PER_TOKEN, len(listed.tile_expert), block_m, weights, listed)
        w1 = pack_experts(moved(self.w1), gate_up_order(INTER, DEVICE))
        act = experts.moe_w1(on_device(x), r.to(DEVICE), w1, on_device(self.b1), LIMIT, tiles, config)
        return experts.moe_w2(act, pack_experts(moved(self.w2)), on_device(self.b2), on_device(residual), tiles, config)

    def expected(self, x: torch.Tensor, logits: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        w1, w2 = (dequantize_mxfp4(w, torch.float32).double() for w in (self.w1, self.w2))
        chosen, weights = route_ref(logits, PER_TOKEN)
        out = residual.double()
        for t in range(len(x)):
            for e, weight in zip(chosen[t].tolist(), weights[t].tolist(), strict=True):
                h = clamped_swiglu_ref((w1[e] @ x[t].double() + self.b1[e]).unsqueeze(0), LIMIT)[0]
                out[t] += weight * (w2[e] @ h + self.b2[e])
        return out


@pytest.fixture(scope="module")
def weights() -> Experts:
    return Experts()


@pytest.mark.parametrize(
    ("tokens", "num_tokens", "direct", "block_m", "config"),
    [
        (1, 1, True, 8, SMALL),
        (3, 2, True, 16, TileConfig(64, 16, 2, 1)),
        (3, 3, False, 16, SMALL),
        (23, 20, False, 8, TileConfig(64, 8, 1, 1)),
        (40, 40, False, 32, TileConfig(128, 32, 4, 1)),
    ],
)
def test_experts(
    weights: Experts, tokens: int, num_tokens: int, direct: bool, block_m: int, config: TileConfig
) -> None:
    g = seeded(tokens)
    x, residual, logits = (
        normal(g, tokens, HIDDEN),
        normal(g, tokens, HIDDEN),
        torch.randn(tokens, NUM_EXPERTS, generator=g),
    )
    x[num_tokens:] = float("nan")
    r = torch.rand(tokens, generator=g) + 0.5
    found = weights.run(x, r, logits, residual, num_tokens, block_m=block_m, direct=direct, config=config)[:num_tokens]
    assert_close("experts", weights.expected(x * r[:, None], logits, residual)[:num_tokens], found)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # sigmoid of a gate far below zero, by numpy
def test_all_tokens_to_the_same_experts(weights: Experts) -> None:
    g = seeded(1)
    x, residual = normal(g, 19, HIDDEN, std=30.0), normal(g, 19, HIDDEN)
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0, -1.0, -2.0]).repeat(19, 1)
    found = weights.run(x, torch.ones(19), logits, residual, 19, block_m=8, direct=False)
    assert_close("clamped", weights.expected(x, logits, residual), found)


def test_a_listed_token_is_as_it_is_alone(weights: Experts) -> None:
    g = seeded(2)
    x, residual, logits = (normal(g, 9, HIDDEN), normal(g, 9, HIDDEN), torch.randn(9, NUM_EXPERTS, generator=g))
    ones = torch.ones(9)
    together = weights.run(x, ones, logits, residual, 9, block_m=8, direct=False)
    alone = weights.run(x[:1], ones[:1], logits[:1], residual[:1], 1, block_m=8, direct=True)
    assert torch.equal(together[0], alone[0])  # the first of each tile: numpy's products differ from row to row


def test_every_code_under_every_scale_keeps_its_value() -> None:
    """One expert whose rows hold all codes; a product with unit vectors gives the weights back."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(8)  # 128 columns
    for scale in (0, 1, 2, 100, 126, 127, 128):
        blocks = (codes[0::2] | (codes[1::2] << 4)).view(1, 1, 4, 16).repeat(1, 32, 1, 1)
        w = Mxfp4Tensor(blocks, torch.full((1, 32, 4), scale, dtype=torch.uint8))
        expected = dequantize_mxfp4(w[0], torch.float32)
        packed = pack_experts(moved(w))
        count = torch.ones(1, dtype=torch.int32, device=DEVICE)
        logits = torch.zeros(1, 1, device=DEVICE)
        found = torch.empty(128, 32)
        for start in range(0, 128, 16):
            unit = torch.zeros(16, 128)
            unit[torch.arange(16), torch.arange(start, start + 16)] = 1.0
            listed = tile_list_ref(torch.zeros(16, 1, dtype=torch.int32, device=DEVICE), count * 16, 1, 16)
            tiles = experts.Tiles(logits, count * 16, 1, 1, 16, torch.ones(16, 1, device=DEVICE), listed)
            out = experts.moe_w2(
                on_device(unit),
                packed,
                torch.zeros(1, 32, device=DEVICE),
                torch.zeros(16, 32, device=DEVICE),
                tiles,
                SMALL,
            )
            found[start : start + 16] = out.cpu()
        assert torch.equal(found.t(), expected), scale


def test_packing_is_lossless() -> None:
    g = seeded()
    w = Mxfp4Tensor(
        torch.randint(0, 256, (3, 64, 5, 16), dtype=torch.uint8, generator=g),
        torch.randint(0, 129, (3, 64, 5), dtype=torch.uint8, generator=g),
    )
    for order in (None, gate_up_order(32)):
        again = unpack_experts(pack_experts(w, order), order)
        assert torch.equal(again.blocks, w.blocks)
        assert torch.equal(again.scales, w.scales)


def test_gate_and_up_rows_lie_eight_apart() -> None:
    order = gate_up_order(24).view(-1, 2, 8)
    assert torch.equal(order[:, 1] - order[:, 0], torch.full((3, 8), 24))


def test_what_cannot_be_packed_is_named() -> None:
    blocks, scales = (torch.zeros(1, 16, 1, 16, dtype=torch.uint8), torch.full((1, 16, 1), 129, dtype=torch.uint8))
    with pytest.raises(ValueError, match="scale is 129"):
        pack_experts(Mxfp4Tensor(blocks, scales))
    with pytest.raises(ValueError, match="24 rows"):
        pack_experts(Mxfp4Tensor(blocks.repeat(1, 2, 1, 1)[:, :24], scales.repeat(1, 2, 1)[:, :24]))


def test_the_memory_plan_knows_the_padding() -> None:
    c = ModelConfig.from_json(hf_config(SIZES["20b"]))
    shard = whole(c)
    one = Mxfp4Tensor(torch.zeros(1, 32, 90, 16, dtype=torch.uint8), torch.zeros(1, 32, 90, dtype=torch.uint8))
    padded = pack_experts(one).nbytes / one.nbytes
    experts_bytes = c.num_layers * c.num_experts * 3 * c.hidden_size * c.intermediate_size * 17 // 32
    assert padding_bytes(c, shard) == pytest.approx(experts_bytes * (padded - 1))


@pytest.mark.parametrize("split", [1, 2, 3])
def test_programs_share_the_columns_of_the_second_matrix(split: int) -> None:
    """Three blocks of 128 columns, the last of them half full; the row beyond the tokens stays as it was."""
    g = seeded(split)
    tokens, inter, hidden = 3, 320, 64
    w = quantize_mxfp4(normal(g, NUM_EXPERTS, hidden, inter, std=0.3))
    act, bias = normal(g, tokens * PER_TOKEN, inter), normal(g, NUM_EXPERTS, hidden)
    residual, logits = normal(g, tokens, hidden), torch.randn(tokens, NUM_EXPERTS, generator=g)
    count = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    tiles = experts.Tiles(logits.to(DEVICE), count, PER_TOKEN, tokens * PER_TOKEN, 8)
    config = TileConfig(32, 8, 1, 1, split)
    given = on_device(act), pack_experts(moved(w)), on_device(bias), on_device(residual)
    first, second = (experts.moe_w2(*given, tiles, config)[:2].cpu() for _ in range(2))
    chosen, weights = route_ref(logits, PER_TOKEN)
    matrices, expected = dequantize_mxfp4(w, torch.float32).double(), residual.double()
    for t in range(2):
        for slot, (e, weight) in enumerate(zip(chosen[t], weights[t], strict=True)):
            row = act[t * PER_TOKEN + slot].double()
            expected[t] += weight * (matrices[e] @ row + bias[e])
    assert_close("w2", expected[:2], first)
    assert torch.equal(first, second), "counters are zero again"
