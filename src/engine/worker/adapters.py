"""The LoRA adapters of one rank: read in threads, used from the next step on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import Adapter
from gptoss.engine.model.lora import load_adapter
from gptoss.engine.model.lora_file import AdapterError, read_adapter
from gptoss.engine.parallel.shards import Shard
from gptoss.kernels.lora import LayerAdapter, LoraTable

logger = logging.getLogger(__name__)
OnLoaded = Callable[[int, str | None], None]  # (adapter id, why it cannot be loaded), called in a thread


@dataclass(slots=True)
class _Loading:
    slot: int
    parts: Future[list[LayerAdapter]]
    is_used: bool = False  # whether the table holds its parts


class RankAdapters:
    """Slots for adapters. Its methods belong to the thread that runs the steps."""

    def __init__(self, config: EngineConfig, shard: Shard, dtype: torch.dtype, device: torch.device) -> None:
        self.table = LoraTable(len(shard.layers), config.max_loras, device)
        self._config = config
        self._shard = shard
        self._dtype = dtype
        self._device = device
        self._adapters: dict[int, _Loading] = {}

    def load(self, adapter: Adapter, loaded: OnLoaded) -> None:
        """Begins to read an adapter. Steps run meanwhile; one that uses it waits."""
        taken = {entry.slot for entry in self._adapters.values()}
        slot = next((slot for slot in range(self.table.num_slots) if slot not in taken), None)
        if slot is None:
            loaded(adapter.id, f"{self.table.num_slots} adapters are loaded already (max_loras)")
            return
        entry = self._adapters[adapter.id] = _Loading(slot, Future())
        threading.Thread(target=self._read, args=(adapter, entry.parts, loaded), daemon=True, name="lora").start()

    def unload(self, adapter_id: int) -> None:
        entry = self._adapters.pop(adapter_id, None)
        if entry is not None and entry.is_used:
            self.table.clear(entry.slot)

    def slots_of(self, ids: list[int]) -> list[int]:
        """The slots of adapters; -1 for id 0, none."""
        return [-1 if adapter_id == 0 else self._slot(adapter_id) for adapter_id in ids]

    def _slot(self, adapter_id: int) -> int:
        entry = self._adapters[adapter_id]
        if not entry.is_used:
            self.table.put(entry.slot, entry.parts.result())
            entry.is_used = True
        return entry.slot

    def _read(self, adapter: Adapter, parts: Future[list[LayerAdapter]], loaded: OnLoaded) -> None:
        try:
            file = read_adapter(Path(adapter.folder), self._config.model)
            if file.digest != adapter.digest:
                raise AdapterError(f"the files of {adapter.folder} have changed since they were checked")
            parts.set_result(load_adapter(file, self._config.model, self._shard, self._dtype, self._device))
        except Exception as error:  # also out of memory: it ends this adapter, not the engine
            message = str(error) if isinstance(error, AdapterError) else f"{type(error).__name__}: {error}"
            logger.error("adapter %s cannot be loaded: %s", adapter.name, message)
            parts.set_exception(error)
            loaded(adapter.id, message)
            return
        loaded(adapter.id, None)
