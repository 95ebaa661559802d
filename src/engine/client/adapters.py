"""The LoRA adapters of a server: names, files and limits. The engines are sent this list."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from gptoss.config.errors import ConfigError
from gptoss.engine.client.errors import AdapterGoneError, EngineDeadError, EngineError
from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import Adapter, AdapterChanged, AddRequest, LoadAdapter, UnloadAdapter
from gptoss.engine.model.lora_file import CONFIG_FILE, WEIGHTS_FILE, AdapterError, AdapterFile, read_adapter

logger = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


class AdapterNotFoundError(AdapterError):
    """No adapter of that name is served."""


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    message: Adapter  # what the engines are sent
    file: AdapterFile
    num_bytes: int

    @property
    def id(self) -> int:
        return self.message.id

    @property
    def name(self) -> str:
        return self.message.name


class Adapters:
    """The list of a server. Used by its event loop only, but for `read`."""

    def __init__(self, config: EngineConfig, reserved: Callable[[], Collection[str]] = tuple) -> None:
        """`reserved`: names that no adapter may have."""
        self.config = config
        self.reserved = reserved
        self.max_bytes = config.max_lora_bytes  # None: any
        self._by_name: dict[str, ServedAdapter] = {}
        self._ending: dict[int, ServedAdapter] = {}  # unloaded when their requests have ended
        self._last_id = 0

    @classmethod
    def of_config(cls, config: EngineConfig, reserved: Callable[[], Collection[str]]) -> Adapters:
        """The adapters that the configuration names. Raises ConfigError if one cannot be served."""
        adapters = cls(config, reserved)
        for name, folder in config.lora.items():
            try:
                adapters.check_name(name)
                adapters.add(name, adapters.read(folder))
            except AdapterError as error:
                raise ConfigError(f"lora (--lora {name}={folder}): {error}") from None
        if adapters.max_bytes is None:
            others = config.max_loras - len(config.lora) if config.lora_dir is not None else 0
            adapters.max_bytes = adapters.num_bytes + others * config.attention_adapter_bytes
        return adapters

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    @property
    def held(self) -> list[ServedAdapter]:
        """Those that the engines hold, with those that are ending."""
        return [*self._by_name.values(), *self._ending.values()]

    @property
    def num_bytes(self) -> int:
        return sum(adapter.num_bytes for adapter in self.held)

    def get(self, name: str) -> ServedAdapter | None:
        return self._by_name.get(name)

    def name_of(self, adapter_id: int) -> str:
        return next((adapter.name for adapter in self.held if adapter.id == adapter_id), "")

    def serves(self, adapter_id: int) -> bool:
        """Whether new requests may use the adapter."""
        return any(adapter.id == adapter_id for adapter in self._by_name.values())

    def check(self, requests: Iterable[AddRequest]) -> None:
        """Raises AdapterGoneError if a request's adapter has been unloaded since it was planned."""
        for request in requests:
            if request.adapter and not self.serves(request.adapter):
                raise AdapterGoneError("the LoRA adapter of this request has been unloaded")

    def read(self, folder: Path) -> AdapterFile:
        """Reads and checks an adapter's files. May be called in a thread. Raises AdapterError."""
        file = read_adapter(folder, self.config.model)
        if file.rank > self.config.max_lora_rank:
            raise AdapterError(
                f"the adapter's rank {file.rank} is above {self.config.max_lora_rank} (max_lora_rank, --max-lora-rank)"
            )
        return file

    def check_name(self, name: str) -> None:
        """Raises AdapterError if an adapter cannot have the name."""
        if not _NAME.fullmatch(name):
            raise AdapterError(
                f"{name!r} cannot be an adapter's name: up to 128 letters, digits and '.', '_', '-', '/' can, which "
                "begin with a letter or digit"
            )
        if name in self._by_name:
            raise AdapterError(f"an adapter named {name!r} is loaded already")
        if name in self.reserved():
            raise AdapterError(f"{name!r} is the name of a model or profile of this server")

    def add(self, name: str, file: AdapterFile) -> ServedAdapter:
        """Adds an adapter that was read. Raises AdapterError if the name is taken or a limit is reached."""
        self.check_name(name)
        config = self.config
        if len(self.held) >= config.max_loras:
            raise AdapterError(f"{config.max_loras} adapters are loaded already (max_loras, --max-loras)")
        num_bytes = file.num_elements * config.lora_element_bytes
        if self.max_bytes is not None and self.num_bytes + num_bytes > self.max_bytes:
            raise AdapterError(
                f"the adapter takes {num_bytes:,} bytes, and {self.num_bytes:,} of {self.max_bytes:,} are in use "
                "(max_lora_bytes, --max-lora-bytes)"
            )
        self._last_id += 1
        served = ServedAdapter(Adapter(self._last_id, name, str(file.folder), file.digest), file, num_bytes)
        self._by_name[name] = served
        return served

    def end(self, name: str) -> ServedAdapter:
        """Takes an adapter's name; it is held until `forget`. Raises AdapterNotFoundError."""
        served = self._by_name.pop(name, None)
        if served is None:
            raise AdapterNotFoundError(f"no adapter named {name!r} is loaded")
        self._ending[served.id] = served
        return served

    def forget(self, adapter_id: int) -> None:
        """Removes an adapter that no engine holds any more, or that could not be loaded."""
        self._ending.pop(adapter_id, None)
        for name, adapter in list(self._by_name.items()):
            if adapter.id == adapter_id:
                del self._by_name[name]


class AdapterLink:
    """Sends the list to one engine, and waits for what it answers."""

    def __init__(self, adapters: Adapters, send: Callable[[LoadAdapter | UnloadAdapter], None]) -> None:
        self._adapters = adapters
        self._send = send
        self._loading: dict[int, asyncio.Future[EngineError | None]] = {}
        self._unloading: dict[int, asyncio.Future[EngineError | None]] = {}

    def send_all(self) -> None:
        """Sends a new engine what it has to hold. The requests that use it follow."""
        for adapter in self._adapters.held:
            self._send(LoadAdapter(adapter.message))

    def end_all(self) -> None:
        """Sends again what is to be unloaded, after `send_all` and the requests."""
        for adapter_id in self._unloading:
            self._send(UnloadAdapter(adapter_id))

    async def load(self, adapter: Adapter) -> None:
        """Raises EngineError if the engine cannot load it, EngineDeadError if it dies."""
        future = self._loading[adapter.id] = asyncio.get_running_loop().create_future()
        self._send(LoadAdapter(adapter))
        error = await future
        if error is not None:
            raise error

    async def unload(self, adapter_id: int, *, is_ready: bool) -> None:
        """Returns when no request uses the adapter and the engine, or the one after it, has unloaded it."""
        future = self._unloading[adapter_id] = asyncio.get_running_loop().create_future()
        if is_ready:
            self._send(UnloadAdapter(adapter_id))
        await future

    def changed(self, message: AdapterChanged) -> None:
        """Handles an engine's answer."""
        is_answer = message.is_loaded or message.error is not None
        future = (self._loading if is_answer else self._unloading).pop(message.adapter_id, None)
        name = self._adapters.name_of(message.adapter_id)
        if future is not None and not future.done():
            future.set_result(None if message.error is None else EngineError(message.error))
        elif message.error is not None:
            logger.error("adapter %s cannot be loaded: requests for it fail: %s", name, message.error)

    def engine_died(self, reason: str) -> None:
        """Ends the loads that wait for an answer."""
        _settle(self._loading, EngineDeadError(f"the engine died: {reason}"))

    def engine_is_dead(self, reason: str) -> None:
        """Ends all that waits: no further engine follows."""
        _settle(self._loading, EngineDeadError(reason))
        _settle(self._unloading, None)


def _settle(futures: dict[int, asyncio.Future[EngineError | None]], result: EngineError | None) -> None:
    for future in futures.values():
        if not future.done():
            future.set_result(result)
    futures.clear()


def folder_below(root: Path, path: str) -> Path:
    """The adapter's folder that `path` names, relative to `root` or below it.

    Raises AdapterError if it, or one of its files, is elsewhere: with `..` or through a link.
    """
    if ".." in Path(path).parts or "\0" in path:
        raise AdapterError(f"the path {path!r} must not contain '..' or a zero byte")
    try:
        return _checked_folder(root.resolve(), path)
    except (OSError, RuntimeError) as error:  # a name that is too long, a circle of links
        reason = error.strerror if isinstance(error, OSError) else None
        raise AdapterError(f"the path {path[:100]!r} cannot be read: {reason or error}") from None


def _checked_folder(root: Path, path: str) -> Path:
    folder = (root / path).resolve()
    if folder == root or not folder.is_relative_to(root):
        raise AdapterError(f"{path!r} is not a folder below the one for adapters (lora_dir, --lora-dir)")
    if not folder.is_dir():
        raise AdapterError(f"there is no folder {path!r} below the one for adapters (lora_dir, --lora-dir)")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).resolve().is_relative_to(root):
            raise AdapterError(f"{name} of {path!r} is a link that leaves the folder for adapters")
    return folder
