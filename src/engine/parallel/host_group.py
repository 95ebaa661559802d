"""torch.distributed between hosts: every socket binds the address that was given for its host."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from gptoss.engine.parallel.hosts import StoreAddress, interface_of

GLOO = "gloo_on_address"


def join(backend: str, at: StoreAddress, rank: int, world_size: int, timeout: datetime.timedelta) -> None:
    """Makes the default process group. `backend`: gloo or nccl."""
    distributed: Any = dist  # whose stubs leave TCPStore out
    if backend == "nccl":  # binds by interface
        interface = interface_of(at.own)
        if interface is not None:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    else:
        backend = _gloo_on(at.own)
    store = distributed.TCPStore(
        at.host,
        at.port,
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=at.listen_fd,
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _gloo_on(address: str) -> str:
    """Registers gloo bound to an address, where it takes an interface's first; returns its name."""

    def make(store: Store, rank: int, size: int, timeout: datetime.timedelta) -> dist.ProcessGroupGloo:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=address)]
        options._timeout = timeout
        made: dist.ProcessGroupGloo = gloo(store, rank, size, options)
        return made

    if not hasattr(dist.Backend, GLOO.upper()):
        dist.Backend.register_backend(GLOO, make, devices=["cpu"])
    return GLOO
