"""Three ranks' partial sums have the same bits wherever they lie in the tensor, and whatever else is summed with
them."""

from __future__ import annotations

import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import Shard

RANKS = 3
VALUES = (1e8, -1e8, 1.25, 3e7, 0.3, -7e-3)  # of rank r: the r-th of three neighbours


def _shard(rank: int) -> Shard:
    nothing = range(0)
    return Shard(rank, rank, RANKS, 0, 1, range(1), nothing, nothing, nothing, nothing, nothing)


def _sums(rank: int, rendezvous: Path, dtype: str) -> list[list[float]]:
    """One number a rank, at every place of tensors of several sizes -> their sums."""
    warnings.simplefilter("error", FutureWarning)  # torch renames its functions
    comm = Communicator(_shard(rank), torch.device("cpu"), rendezvous)
    found = []
    for start in range(len(VALUES) - RANKS + 1):
        value = VALUES[start + rank]
        for shape in ((1, 1), (1, 7), (5, 24), (3, 1000)):
            partial = torch.full(shape, value, dtype=getattr(torch, dtype))
            found.append(comm.all_reduce(partial).flatten().tolist())
    comm.close()
    return found


def sums(folder: Path, dtype: str = "float32") -> list[list[list[float]]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(RANKS, mp_context=context) as pool:
        jobs = [pool.submit(_sums, r, folder / "meet", dtype) for r in range(RANKS)]
        return [job.result(60) for job in jobs]


def test_partial_sums_are_added_in_the_order_of_ranks(tmp_path: Path) -> None:
    ranks = sums(tmp_path)
    assert ranks[0] == ranks[1] == ranks[2]
    for index, found in enumerate(ranks[0]):
        a, b, c = (torch.tensor(v) for v in VALUES[index // 4 : index // 4 + RANKS])
        assert set(found) == {float(a + b + c)}
