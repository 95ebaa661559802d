"""The router's kernels, for few tokens and for many, against plain torch: logits, experts, weights and tiles."""

from __future__ import annotations

import pytest
import torch

from gptoss.kernels.reference.moe import only_local_ref, route_ref
from gptoss.kernels.triton import routing
from gptoss.kernels.triton.configs import TileConfig
from gptoss.kernels.triton.routing import Routed
from gptoss.kernels.triton.tiles import TileList
from tests.kernels.gpu_helpers import DEVICE, assert_close, normal, on_device, tile_list_ref

EPS = 1e-5
PER_TOKEN = 4
FEW = TileConfig(16, 4, 1, 1)
MANY = TileConfig(16, 16, 1, 1)
WAYS = {"few": (routing.route_few, FEW), "many": (routing.route_many, MANY)}


class Router:
    """Random hidden states; expert 1 has expert 0's weights, so that their logits are alike."""

    def __init__(self, tokens: int, experts: int, inputs: int = 96) -> None:
        g = torch.Generator().manual_seed(tokens + experts)
        self.x = normal(g, tokens, inputs, std=9.0)
        self.scale, self.w, self.bias = (normal(g, *n) for n in ((inputs,), (experts, inputs), (experts,)))
        self.w[1], self.bias[1] = self.w[0], self.bias[0]

    def run(self, way: str, num_tokens: int, block_m: int | None = 8, local: range | None = None) -> Routed:
        route, config = WAYS[way]
        given = map(on_device, (self.x, self.scale, self.w, self.bias))
        count = torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
        return route(*given, EPS, config, count, PER_TOKEN, block_m, local)

    def logits(self) -> torch.Tensor:
        x = self.x.double()
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.scale.double()
        return normed @ self.w.double().t() + self.bias


def assert_same_tiles(found: TileList, expected: TileList, assignments: int) -> None:
    used = expected.tile_expert >= 0
    assert torch.equal(found.tile_expert, expected.tile_expert)
    assert torch.equal(found.tile_first[used], expected.tile_first[used])
    assert torch.equal(found.tile_count[used], expected.tile_count[used])
    assert torch.equal(found.rows[:assignments], expected.rows[:assignments])
    assert int(expected.tile_count.sum()) == assignments


CASES = [
    ("few", 1, 1, 8),
    ("few", 18, 18, 32),
    ("few", 3, 2, 20),
    ("few", 40, 33, 128),
    ("few", 9, 0, 8),
    ("many", 1, 1, 8),
    ("many", 37, 30, 20),
    ("many", 70, 70, 8),
    ("many", 19, 0, 8),
]


@pytest.mark.parametrize(("way", "tokens", "num_tokens", "experts"), CASES)
def test_router(way: str, tokens: int, num_tokens: int, experts: int) -> None:
    router = Router(tokens, experts)
    found = router.run(way, num_tokens)
    assert_close("logits", router.logits(), found.logits)
    assert_close("scaled", router.x.double() * router.scale.double(), found.scaled)
    assert_close("r", torch.rsqrt(router.x.double().square().mean(-1) + EPS), found.r)
    chosen, weights = route_ref(found.logits, PER_TOKEN)
    assert found.weights is not None and found.tile_list is not None
    assert_close("weights", weights, found.weights)
    count = torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
    lowest_first = torch.where(chosen == 1, 0, chosen)  # torch may take either of equals
    both = (found.logits.topk(PER_TOKEN + 1).indices < 2).sum(dim=1) == 2
    chosen = torch.where(both[:, None], _lower_of_equals(found.logits), lowest_first)
    expected = tile_list_ref(chosen, count, experts, 8)
    assert_same_tiles(found.tile_list, expected, num_tokens * PER_TOKEN)


def _lower_of_equals(logits: torch.Tensor) -> torch.Tensor:
    return logits.argsort(dim=1, descending=True, stable=True)[:, :PER_TOKEN]


@pytest.mark.parametrize("way", WAYS)
def test_equal_logits_choose_the_lower_experts(way: str) -> None:
    router = Router(5, 20)
    router.w[:], router.bias[:] = 0.0, 1.0
    tile_list = router.run(way, 5).tile_list
    assert tile_list is not None
    assert tile_list.tile_expert[:5].tolist() == [0, 1, 2, 3, -1]
    assert tile_list.rows.tolist() == [PER_TOKEN * t + j for j in range(PER_TOKEN) for t in range(5)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("local", [range(0, 8), range(12, 20)])
def test_experts_of_other_ranks_are_stood_in_for(way: str, local: range) -> None:
    router = Router(21, 20)
    everything, mine = router.run(way, 21), router.run(way, 21, local=local)
    chosen = _lower_of_equals(everything.logits).int()
    assert everything.weights is not None and mine.weights is not None and mine.tile_list is not None
    experts, weights = only_local_ref(chosen, everything.weights, local)
    assert torch.equal(mine.weights, weights)
    count = torch.tensor([21], dtype=torch.int32, device=DEVICE)
    expected = tile_list_ref(experts, count, len(local), 8)
    assert_same_tiles(mine.tile_list, expected, 21 * PER_TOKEN)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_listed_unless_asked_for(way: str) -> None:
    found = Router(3, 8).run(way, 3, block_m=None)
    assert found.tile_list is None and found.weights is None
    assert_close("logits", Router(3, 8).logits(), found.logits)


@pytest.mark.parametrize("way", WAYS)
def test_a_router_twice_gives_the_same(way: str) -> None:
    """The counter that finds the last program is zero again."""
    router = Router(20, 32)
    first, second = router.run(way, 20), router.run(way, 20)
    assert torch.equal(first.logits, second.logits)
    assert first.tile_list is not None and second.tile_list is not None
    assert torch.equal(first.tile_list.rows, second.tile_list.rows)


def test_a_row_does_not_depend_on_the_others() -> None:
    router = Router(33, 32)
    whole = router.run("many", 33)
    router.x = router.x[:17]
    part = router.run("many", 17)
    assert torch.equal(whole.logits[0], part.logits[0])  # numpy's products differ from row to row
    assert torch.equal(whole.r[:17], part.r)
