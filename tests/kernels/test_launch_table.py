"""What the table of launch configurations must hold for every architecture in it."""

from __future__ import annotations

import pytest

from gptoss.kernels.triton import routing
from gptoss.kernels.triton.configs import config_for, load_table

SIZES = (1, 4, 5, 16, 17, 64, 65, 512, 513, 8192)


@pytest.mark.parametrize("architecture", load_table())
@pytest.mark.parametrize("invariant", [False, True])
def test_both_matrices_of_an_expert_walk_the_same_tiles(architecture: str, invariant: bool) -> None:
    for tokens in SIZES:
        first, second = (config_for(architecture, k, tokens, invariant=invariant) for k in ("moe_w1", "moe_w2"))
        assert first.block_m == second.block_m, tokens


@pytest.mark.parametrize("architecture", load_table())
def test_no_sum_is_shared_out_by_the_size_of_the_batch_where_bits_must_not_depend_on_it(architecture: str) -> None:
    kernels = {key.partition(".")[0] for key in load_table()[architecture]}
    splits = {(k, n): config_for(architecture, k, n, invariant=True).split for k in kernels for n in SIZES}
    assert {key for key, split in splits.items() if split > 1} == set()


@pytest.mark.parametrize("architecture", [name for name in load_table() if name.startswith("sm_")])
def test_the_invariant_router_adds_a_row_s_squares_alike_at_every_size(architecture: str) -> None:
    """A thread holds 8 of a row's numbers, the next 8 lanes the others of a round: with fewer the lanes add otherwise.

    From sm_90 on four or eight warps multiply by another kind of matrix instruction than other numbers do.
    """
    configs = [config for _, config in load_table()[architecture]["router.invariant"]]
    assert len(configs) > 1
    assert all(routing.BLOCK_K * c.block_m // (32 * c.warps) >= 8 for c in configs)
    assert len({c.warps in (4, 8) for c in configs}) == 1 or architecture in ("sm_80", "sm_120")
