"""Which LoRA adapters an engine holds, and when its requests may use them."""

from __future__ import annotations

from collections.abc import Callable

from gptoss.engine.core.executor import Executor
from gptoss.engine.messages import Adapter, AdapterChanged, LoadAdapter, UnloadAdapter


class EngineAdapters:
    """Loads adapters while steps run, and unloads each when its last request has ended."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._adapters: dict[int, Adapter] = {}
        self._loading: set[int] = set()
        self._unloading: set[int] = set()
        self._errors: dict[int, str] = {}

    @property
    def is_changing(self) -> bool:
        return bool(self._loading or self._unloading)

    def load(self, adapter: Adapter) -> None:
        self._adapters[adapter.id] = adapter
        self._errors.pop(adapter.id, None)
        self._loading.add(adapter.id)
        self._executor.change_adapter(LoadAdapter(adapter))

    def unload(self, adapter_id: int) -> None:
        """Unloads it as soon as no request uses it."""
        self._unloading.add(adapter_id)

    def changes(self, is_used: Callable[[int], bool]) -> list[AdapterChanged]:
        """The adapters that have been loaded or unloaded since the last call."""
        changed = []
        for adapter_id, error in self._executor.loaded_adapters():
            self._loading.discard(adapter_id)
            if error is not None:
                self._errors[adapter_id] = error
                self._executor.change_adapter(UnloadAdapter(adapter_id))  # from the ranks that have read it
            changed.append(AdapterChanged(adapter_id, error is None, error))
        for adapter_id in list(self._unloading - self._loading):
            if not is_used(adapter_id):
                self._unloading.remove(adapter_id)
                self._adapters.pop(adapter_id, None)
                if self._errors.pop(adapter_id, None) is None:
                    self._executor.change_adapter(UnloadAdapter(adapter_id))
                changed.append(AdapterChanged(adapter_id, False))
        return changed

    def is_loading(self, adapter_id: int) -> bool:
        return adapter_id in self._loading

    def problem(self, adapter_id: int) -> str | None:
        """Why a request cannot use the adapter; None if it can, at the latest when it is loaded."""
        if adapter_id == 0:
            return None
        if adapter_id not in self._adapters:
            return "its LoRA adapter is not loaded"
        error = self._errors.get(adapter_id)
        return None if error is None else f"its LoRA adapter cannot be loaded: {error}"
