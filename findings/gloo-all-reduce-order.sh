#!/usr/bin/env bash
# torch 2.13.0, gloo: all_reduce of a tensor that is constant on every rank is not constant if there are three ranks.
#
# One would guess: three numbers are added in one order, so that a tensor that holds the same number at each index
# (1e8 on rank 0, -1e8 on rank 1, 1.25 on rank 2) sums to the same number at each index.
# Behaviour: the ring algorithm cuts the tensor into segments and starts each at another rank, so the order of the additions
# depends on the index: (1e8 + -1e8) + 1.25 = 1.25 in one part, 1e8 + (-1e8 + 1.25) = 0 in float32 in the other. Every
# rank gets the same tensor. So a row's sum depends on its index in the batch and on the batch's size: a tensor of
# one element gives 0 here. With two ranks the order cannot matter.
# Source: pytorch/gloo, gloo/allreduce.cc (ring).
#
# Output seen:
#   2 ranks: sums and how often: {0.0: 1000}; one element: 0.0; same on all ranks: True
#   3 ranks: sums and how often: {0.0: 668, 1.25: 332}; one element: 0.0; same on all ranks: True
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat >"$dir/show.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

VALUES = [1e8, -1e8, 1.25]


def add(rank, ranks, store):
    dist.init_process_group("gloo", init_method=f"file://{store}{ranks}", rank=rank, world_size=ranks)
    long, single = (torch.full((size,), VALUES[rank]) for size in (1000, 1))
    dist.all_reduce(long)
    dist.all_reduce(single)
    everywhere = [torch.empty_like(long) for _ in range(ranks)]
    dist.all_gather(everywhere, long)
    if rank == 0:
        same = all(torch.equal(long, other) for other in everywhere)
        sums, counts = long.unique(return_counts=True)
        found = dict(zip(sums.tolist(), counts.tolist()))
        print(f"{ranks} ranks: sums and how often: {found}; one element: {single.item()}; same on all ranks: {same}", flush=True)
        if not same or len(found) != ranks - 1:
            raise SystemExit("the behaviour changed")
    dist.destroy_process_group()


if __name__ == "__main__":
    for ranks in (2, 3):
        mp.spawn(add, (ranks, sys.argv[1]), ranks)
PY
GLOO_SOCKET_IFNAME=lo "$dir/venv/bin/python" "$dir/show.py" "$dir/store"
