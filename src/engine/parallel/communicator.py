"""Communication of ranks during a step, by torch.distributed.

CUDA graphs hold what a forward pass calls, all_reduce: it must neither wait on the host nor depend on numbers of the
device.

The backend is NCCL between GPUs and gloo between CPU processes. Each rank has one Communicator. With one rank every
method is the identity, so the model code is the same.
"""

from __future__ import annotations

import datetime
import os
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist

from gptoss.engine.parallel import host_group
from gptoss.engine.parallel.hosts import StoreAddress
from gptoss.engine.parallel.shards import Shard

LOOPBACK = Path("/sys/class/net/lo")
START_TIMEOUT_S = 600  # ranks load at different speeds
STEP_TIMEOUT_S = 1800  # a dead rank is detected by its process, not by this
MAX_SENDS = 4  # hidden states in flight to the next stage


Rendezvous = Path | StoreAddress  # on one machine a file that does not exist yet


class Communicator:
    """Shapes: R rows, T tokens, H hidden, V vocabulary."""

    def __init__(
        self, shard: Shard, device: torch.device, rendezvous: Rendezvous | None = None, *, ordered: bool = False
    ) -> None:
        """
        Args:
            rendezvous: the same for all ranks; None with one rank.
            ordered: makes GPUs add partial sums in the order of ranks, as CPU ranks always do.
        """
        self.shard = shard
        self._device = device
        self._ordered = ordered or device.type == "cpu"
        self._sends: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._stage: dist.ProcessGroup | None = None
        self.world_size = shard.tensor_size * shard.num_stages
        if self.world_size == 1:
            return
        assert rendezvous is not None
        _join("nccl" if device.type == "cuda" else "gloo", rendezvous, shard.rank, self.world_size)
        for stage in range(shard.num_stages):
            first = stage * shard.tensor_size
            group = dist.new_group(
                list(range(first, first + shard.tensor_size)), timeout=datetime.timedelta(seconds=STEP_TIMEOUT_S)
            )
            if stage == shard.stage:
                self._stage = group

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over the stage's ranks, added in float32 on the CPU; `partial` may be changed.

        A ring or a tree adds three or more numbers in an order that depends on their position in the tensor, so a
        token's sum would depend on the rest of the batch. With two ranks any order gives the same bits.
        """
        if self.shard.tensor_size == 1:
            return partial
        if self._ordered and self.shard.tensor_size > 2:
            return self._add_in_order(partial)
        summed = partial.float() if partial.device.type == "cpu" else partial
        dist.all_reduce(summed, group=self._stage)
        return summed.to(partial.dtype)

    def _add_in_order(self, partial: torch.Tensor) -> torch.Tensor:
        """All ranks' partial sums, added in float32 in the order of ranks."""
        parts = partial.new_empty(self.shard.tensor_size, *partial.shape)
        # torch 2.13 has renamed it, and warns at the earlier name
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(parts.flatten(0, 1), partial.contiguous(), group=self._stage)
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        return total.to(partial.dtype)

    def gather_logits(self, local: torch.Tensor, sizes: list[int]) -> torch.Tensor | None:
        """Gathers each rank's logits [R, V_r], V_r = sizes[rank]; returns [R, V] on the stage's first rank."""
        if self.shard.tensor_size == 1:
            return local
        width = max(sizes)
        padded = torch.nn.functional.pad(local, (0, width - local.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes] if self.shard.is_tensor_leader else None
        dist.gather(padded, parts, dst=self._first_of_stage, group=self._stage)
        if parts is None:
            return None
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def gather_best(self, local: torch.Tensor, first_id: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The best token of each row over the whole vocabulary.

        `local`: each rank's logits [R, V_r], of tokens from `first_id` on.

        Returns (token ids int64 [R], their logits [R]) on the stage's first rank. Two numbers per row are sent. The
        lowest id wins a tie.
        """
        value, index = local.max(dim=-1)
        best = torch.stack((value.double(), (index + first_id).double()))
        parts = [torch.empty_like(best) for _ in range(self.shard.tensor_size)] if self.shard.is_tensor_leader else None
        dist.gather(best, parts, dst=self._first_of_stage, group=self._stage)
        if parts is None:
            return None
        values, ids = torch.stack(parts, dim=-1)
        values = torch.where(values.isnan().any(dim=-1, keepdim=True), torch.nan, values)
        winner = torch.where(values.isnan(), 0, values).argmax(dim=-1, keepdim=True)  # the first of equal ones
        return ids.gather(-1, winner).squeeze(-1).long(), values.gather(-1, winner).squeeze(-1).to(local.dtype)

    def broadcast_in_stage(self, tensor: torch.Tensor) -> None:
        """Overwrites the tensor of each of the stage's ranks by that of the first, in the order of the stream."""
        if self.shard.tensor_size > 1:
            dist.broadcast(tensor, self._first_of_stage, group=self._stage)

    def send_hidden(self, hidden: torch.Tensor) -> None:
        """Sends [T, H] to the same position of the next stage, without waiting."""
        work = dist.isend(hidden, self.shard.rank + self.shard.tensor_size)
        assert work is not None
        self._sends.append((work, hidden))
        while len(self._sends) > MAX_SENDS or (self._sends and self._sends[0][0].is_completed()):
            self._sends.popleft()[0].wait()

    def receive_hidden(self, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """Receives [T, H] from the previous stage."""
        hidden = torch.empty(num_tokens, hidden_size, dtype=dtype, device=self._device)
        dist.recv(hidden, self.shard.rank - self.shard.tensor_size)
        return hidden

    def minimum(self, value: int) -> int:
        """The minimum over all ranks."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value], device=self._device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor.item())

    def close(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()

    @property
    def _first_of_stage(self) -> int:
        return self.shard.stage * self.shard.tensor_size


def _join(backend: str, rendezvous: Rendezvous, rank: int, world_size: int) -> None:
    """Makes the default process group."""
    timeout = datetime.timedelta(seconds=START_TIMEOUT_S)
    if isinstance(rendezvous, StoreAddress):
        host_group.join(backend, rendezvous, rank, world_size, timeout)
        return
    if LOOPBACK.exists():  # ranks share a machine, so neither its name nor its network is needed
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK.name)
    dist.init_process_group(
        backend, init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timeout
    )
