"""A device whose work runs later, in its order, and not before the host waits for it: what the host reads or overwrites
too early shows.

Ranks are threads, of which one runs at a time; they meet in stand-ins for torch.distributed's operations.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss.engine.parallel import communicator
from gptoss.kernels import device_copy

Work = Callable[[], object]
WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero")  # for the device
TIMEOUT_S = 20


class LateDevice(TorchDispatchMode):
    """Meanwhile torch's operations are queued, and give what they compute when the queue is run."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: deque[Work] = deque()
        self._num_done = 0
        self.is_running = False

    def later(self, work: Work) -> None:
        """Queues work; at once where it is part of work that runs."""
        if self.is_running:
            work()
        else:
            self._queue.append(work)

    def run(self, until: int | None = None) -> None:
        """Does the first `until` pieces of work since the start, or all."""
        self.is_running = True
        try:
            with torch.inference_mode():
                while self._queue and (until is None or self._num_done < until):
                    self._num_done += 1
                    self._queue.popleft()()
        finally:
            self.is_running = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Meanwhile work is not queued."""
        self.run()
        self.is_running = True
        yield
        self.is_running = False

    def mark(self) -> LateMark:
        return LateMark(self)

    @property
    def num_queued(self) -> int:
        """Pieces of work since the start, those done included."""
        return self._num_done + len(self._queue)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        if self.is_running or not given:
            return func(*args, **kwargs)
        assert name not in WAITS, f"{name} waits for the device"
        if func._schema.is_mutable:
            self._queue.append(lambda: func(*args, **kwargs))
            return args[0]
        found = func(*args, **kwargs)  # of the right shapes, but what it is computed from may not be there yet
        outputs = [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]
        if any(a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a in outputs for b in given):
            return found  # a view
        for output in outputs:
            output.fill_(float("nan") if output.is_floating_point() else 0)

        def compute() -> None:
            real = torch.utils._pytree.tree_leaves(func(*args, **kwargs))
            for output, value in zip(outputs, (t for t in real if isinstance(t, torch.Tensor)), strict=True):
                output.copy_(value)

        self._queue.append(compute)
        return found


class LateMark:
    def __init__(self, device: LateDevice) -> None:
        self._device, self._until = device, 0

    def record(self) -> None:
        self._until = self._device.num_queued

    def synchronize(self) -> None:
        self._device.run(self._until)


class FakeRanks:
    """Ranks in threads, each with a late device of its own."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, size: int) -> None:
        self.size = size
        self._turn = threading.Condition()
        self._met: dict[int, dict[int, tuple[Any, Any]]] = {}
        self._posted: dict[int, Any] = {}
        self._local = threading.local()
        self._failures: list[BaseException] = []

    def run(self, main: Callable[[int], Any]) -> list[Any]:
        """What main(rank) returns on each rank."""
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            with self._turn:
                self._local.rank, self._local.count = rank, 0
                self._local.device = LateDevice()
                try:
                    with self._local.device:
                        results[rank] = main(rank)
                        self._local.device.run()
                except BaseException as error:
                    self._failures.append(error)
                self._turn.notify_all()

        with self._patched():
            threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self._failures:
            raise self._failures[0]
        return results

    @contextmanager
    def _patched(self) -> Iterator[None]:
        with (
            mock.patch.object(communicator, "dist", self),
            mock.patch.object(communicator, "_join", lambda *_: None),
            mock.patch.object(device_copy, "new_mark", lambda _: self.device.mark()),
        ):
            yield

    @property
    def device(self) -> LateDevice:
        """This rank's."""
        device: LateDevice = self._local.device
        return device

    def post(self, number: int, message: Any) -> None:
        """Sends a message from host to host."""
        self._posted[number] = message
        self._turn.notify_all()

    def receive(self, number: int) -> Any:
        """Waits for a message. Meanwhile this rank's device works."""
        self.device.run()
        self._wait(lambda: number in self._posted, f"message {number}")
        return self._posted[number]

    def _wait(self, ready: Callable[[], bool], what: object) -> None:
        self._turn.wait_for(lambda: ready() or bool(self._failures), TIMEOUT_S)
        assert ready(), f"rank {self._local.rank} waits alone for {what}"

    def _meet(self, what: Any, value: torch.Tensor) -> list[torch.Tensor]:
        """The ranks' values, in an operation that all of them call next."""
        self._local.count += 1
        entries = self._met.setdefault(self._local.count, {})
        entries[self._local.rank] = what, value.clone()
        self._turn.notify_all()
        self._wait(lambda: len(entries) == self.size, what)
        assert all(entry[0] == what for entry in entries.values()), f"ranks differ: {entries}"
        return [entries[rank][1] for rank in range(self.size)]

    # --- what communicator.py takes from torch.distributed ---

    def new_group(self, ranks: list[int], timeout: object) -> None: ...

    def destroy_process_group(self) -> None: ...

    def all_reduce(self, tensor: torch.Tensor, op: Any = ReduceOp.SUM, group: object = None) -> None:
        def work() -> None:
            parts = torch.stack(self._meet(("all_reduce", tensor.shape, str(op)), tensor))
            tensor.copy_(parts.amin(0) if op == self.ReduceOp.MIN else parts.sum(0))

        self.device.later(work)

    def gather(self, tensor: torch.Tensor, parts: list[torch.Tensor] | None, dst: int, group: object) -> None:
        def work() -> None:
            found = self._meet(("gather", tensor.shape, dst), tensor)
            for part, value in zip(parts or [], found, strict=False):
                part.copy_(value)

        assert (parts is not None) == (self._local.rank == dst)
        self.device.later(work)

    def broadcast(self, tensor: torch.Tensor, src: int, group: object) -> None:
        self.device.later(lambda: tensor.copy_(self._meet(("broadcast", tensor.shape), tensor)[src]))
