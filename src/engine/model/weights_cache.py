"""Keeps weights that had to be laid out again in a file, which later starts and processes map.

One file for each rank of a model: the tensors, then a table in JSON, then the table's length and a magic number. The
table has the whole ModelWeights as a tree; a tensor in it is a place in this file, or in a file of the checkpoint where
the kernels read that as it is. The file's name has a key over all that its content depends on: paths, sizes and times
of the checkpoint's files, the rank's part, the types, the instruction set, and the code that lays weights out.

Written under another name and renamed; flushed to the disk behind the start. Each portion has a SHA-256. All of them
are compared once after each boot of the machine, and again if the file's size or time is another: so what a power
failure left unwritten is found, and the flush need not be waited for. Every other start compares the table and a few
portions, chosen at random. Files in use are locked and never removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import json
import logging
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from gptoss.engine.model.tensor_source import MappedFile, TensorSource
from gptoss.engine.model.weights import ModelWeights, WeightLoader
from gptoss.kernels import layers as kernel_layers

logger = logging.getLogger(__name__)

MAGIC = b"gptoss-weights-1"
SUFFIX, MAKING, VERIFIED = ".weights", ".making", ".verified"
ALIGNMENT = 4096
PORTION = 16 * 2**20  # bytes under one sum
SAMPLED = 2  # portions that each start compares: some 20 ms
GB = 10**9
SPARE_BYTES = 2 * GB  # that are left free on the disk
LEAST_BYTES = GB  # of a checkpoint; a smaller one is laid out again at each start, in less than a second
LOCK_POLL_S, LOCK_REPORT_S = 0.1, 5.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
OWN = -1  # in the table: this file instead of one of the checkpoint's
Tree = Any  # JSON


class CacheFullError(Exception):
    """The weights would exceed the limit or the disk. The message says which and by how much."""


class DamagedError(Exception):
    """The file is not what was written."""


@dataclasses.dataclass(frozen=True, slots=True)
class WeightsCache:
    """The files of a folder, at most `max_bytes` together."""

    folder: Path
    max_bytes: int

    def load(self, loader: WeightLoader, source: TensorSource, *facts: object) -> ModelWeights:
        """The weights that `loader` makes of `source`: mapped if they were kept, else made and kept.

        `facts`: what they depend on besides the files. Without a usable folder they are made in memory, and the log
        says why.
        """
        name = _name(source, facts)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder):
                path = self.folder / name
                found = self._restored(path, source)
                if found is None:
                    self._make(path, loader, source)
                    found = self._restored(path, source, made_now=True)
            if found is not None:
                loader.check_unchanged()
                return found
        except (OSError, CacheFullError) as error:
            logger.warning(
                "weights are laid out in memory, at each start: %s (weights_cache_dir %s, weights_cache_gib %.3g)",
                getattr(error, "strerror", None) or error,
                self.folder,
                self.max_bytes / 2**30,
            )
        return loader.load()

    def _restored(self, path: Path, source: TensorSource, *, made_now: bool = False) -> ModelWeights | None:
        """The weights in a file; None if there is none, or a damaged one."""
        if not path.is_file():
            return None
        started = time.monotonic()
        try:
            table = _read_table(path)
            if not made_now:
                _verify(path, table)
            weights = _Reader(table, MappedFile(path), source).weights()
        except (DamagedError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("damaged weights cache %s: %s; making it again", path, error)
            path.unlink(missing_ok=True)
            return None
        _hold(path)
        with contextlib.suppress(OSError):  # another user's
            os.utime(path.with_suffix(VERIFIED))
        size = path.stat().st_size
        logger.info(
            "mapped %.2f GB of re-laid-out weights from %s in %.1f s", size / GB, path, time.monotonic() - started
        )
        return weights

    def _make(self, path: Path, loader: WeightLoader, source: TensorSource) -> None:
        started = time.monotonic()
        if _others(path):
            logger.info("the checkpoint or the software changed since its weights were laid out: doing that again")
        for left in self.folder.glob(f"*{MAKING}"):  # by a killed process: the folder is locked
            left.unlink()
        making = path.with_suffix(MAKING)
        try:
            with making.open("wb") as file:
                writer = _Writer(file, source, self._limit())
                for part in loader.parts():
                    writer.add(part)
                loader.check_unchanged()
                writer.finish()
            making.rename(path)
        finally:
            making.unlink(missing_ok=True)
        flush = threading.Thread(target=_flush_and_remember, args=(path,), daemon=True, name="flush-weights")
        flush.start()
        _flushes.append(flush)
        self._remove_old(path)
        logger.info(
            "kept %.2f GB of re-laid-out weights in %s, in %.1f s (--weights-cache-gib 0: keep none)",
            path.stat().st_size / GB,
            path,
            time.monotonic() - started,
        )

    def _limit(self) -> int:
        """The most bytes that a new file may have."""
        in_use = sum(p.stat().st_size for p in self.folder.glob(f"*{SUFFIX}") if _is_held(p))
        return min(self.max_bytes - in_use, shutil.disk_usage(self.folder).free - SPARE_BYTES)

    def _remove_old(self, kept: Path) -> None:
        """Removes what the new file replaces, and the least recently used files beyond the limit."""
        for path in _others(kept):
            _remove(path)
        files = sorted(self.folder.glob(f"*{SUFFIX}"), key=_last_used, reverse=True)
        total = kept.stat().st_size
        for path in files:
            if path == kept:
                continue
            total += path.stat().st_size
            if total > self.max_bytes and _remove(path):
                logger.info("removed %s: the weights cache is limited to %.1f GB", path, self.max_bytes / GB)


def _name(source: TensorSource, facts: tuple[object, ...]) -> str:
    """The name of the file: of the checkpoint and rank, and the key over all that its content depends on."""
    paths = [str(file.path.resolve()) for file in source.files]
    what = hashlib.sha256(repr((paths, facts)).encode()).hexdigest()[:12]
    states = [(f.state.num_bytes, f.state.modified_ns) for f in source.files]
    key = hashlib.sha256(repr((what, states, layout_digest())).encode()).hexdigest()[:16]
    folder = source.files[0].path.resolve()
    stem = folder.stem if len(paths) == 1 and folder.suffix == ".gguf" else folder.parent.name
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', stem)[:40]}-{what}-{key}{SUFFIX}"


def layout_digest() -> str:
    """A sum of the code that decides how weights are laid out."""
    kernels = Path(kernel_layers.__file__).parent
    sources = [*(kernels / "cpu").glob("*"), *kernels.glob("*.py"), *Path(__file__).parent.glob("*.py")]
    found = hashlib.sha256(torch.__version__.encode())
    for path in sorted(path for path in sources if path.suffix in (".py", ".h", ".cpp")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


class _Writer:
    """Writes the parts of ModelWeights: the tensors that are in no file of the checkpoint, and the table."""

    def __init__(self, file: BinaryIO, source: TensorSource, limit: int) -> None:
        self._file, self._source, self._limit = file, source, limit
        self._at = 0
        self._parts: list[Tree] = []
        self._sum, self._sums = hashlib.sha256(), list[str]()  # of the portion at hand, and of those before

    def add(self, part: Any) -> None:
        self._parts.append(self._encoded(part))

    def finish(self) -> None:
        sums = [*self._sums, self._sum.hexdigest()] if self._at % PORTION else self._sums
        table = {"parts": self._parts, "sums": sums, "end": self._at}
        data = json.dumps(table).encode()
        tail = hashlib.sha256(data).digest() + len(data).to_bytes(8, "little") + MAGIC
        self._file.write(data + tail)
        self._file.flush()

    def _encoded(self, value: Any) -> Tree:
        if isinstance(value, torch.Tensor):
            return {"tensor": [*self._place(value), str(value.dtype).removeprefix("torch."), list(value.shape)]}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            kind = type(value)
            fields = {f.name: self._encoded(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return {"class": [kind.__module__, kind.__name__], "fields": fields}
        if value is None or isinstance(value, int | float | str):
            return value
        raise TypeError(f"a {type(value).__name__} in the weights cannot be kept")

    def _place(self, tensor: torch.Tensor) -> tuple[int, int]:
        """The file and the offset of a tensor, which is written unless the checkpoint has it like this."""
        if tensor.is_contiguous():
            for number, file in enumerate(self._source.files):
                offset = file.offset_of(tensor)
                if offset is not None:
                    return number, offset
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        begin = -(-self._at // ALIGNMENT) * ALIGNMENT
        if begin + len(data) > self._limit:
            raise CacheFullError(f"they take more than the {max(0, self._limit) / GB:.1f} GB that are left")
        self._write(memoryview(bytes(begin - self._at)))
        self._write(data)
        return OWN, begin

    def _write(self, data: memoryview) -> None:
        while data:
            piece = data[: PORTION - self._at % PORTION]
            self._file.write(piece)
            self._sum.update(piece)
            self._at += len(piece)
            data = data[len(piece) :]
            if self._at % PORTION == 0:
                self._sums.append(self._sum.hexdigest())
                self._sum = hashlib.sha256()


class _Reader:
    """Makes ModelWeights of a table."""

    def __init__(self, table: Tree, own: MappedFile, source: TensorSource) -> None:
        self._table, self._own, self._source = table, own, source

    def weights(self) -> ModelWeights:
        *layers, embedding, final_norm, lm_head = map(self._decoded, self._table["parts"])
        return ModelWeights(embedding, layers, final_norm, lm_head, head_is_prepared=True)

    def _decoded(self, tree: Tree) -> Any:
        if not isinstance(tree, dict):
            return tree
        if "tensor" in tree:
            number, offset, dtype, shape = tree["tensor"]
            file = self._own if number == OWN else self._source.files[number]
            return file.view(getattr(torch, dtype), tuple(shape), offset)
        module, name = tree["class"]
        if not module.startswith("gptoss.kernels."):
            raise DamagedError(f"it names {module}.{name}")
        fields = {field: self._decoded(value) for field, value in tree["fields"].items()}
        return getattr(importlib.import_module(module), name)(**fields)


def _read_table(path: Path) -> Tree:
    tail = len(MAGIC) + 8 + 32
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - tail))
        end = file.read(tail)
        length = int.from_bytes(end[32:40], "little")
        if end[40:] != MAGIC or length > size - tail:
            raise DamagedError("its end is missing")
        file.seek(size - tail - length)
        data = file.read(length)
    if hashlib.sha256(data).digest() != end[:32]:
        raise DamagedError("its table has another SHA-256")
    return json.loads(data)


def _verify(path: Path, table: Tree) -> None:
    """Compares the portions with their sums: all, or a few if that was done since the boot.

    Raises DamagedError.
    """
    data, sums, last = np.memmap(path, mode="r"), table["sums"], table["end"]

    def check(number: int) -> None:
        begin, end = number * PORTION, min((number + 1) * PORTION, last)
        if hashlib.sha256(data[begin:end].data).hexdigest() != sums[number]:
            raise DamagedError(f"bytes {begin} to {end} have another SHA-256")

    remembered = _is_remembered(path)
    numbers = random.sample(range(len(sums)), min(SAMPLED, len(sums))) if remembered else range(len(sums))
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        list(pool.map(check, numbers))
    if not remembered:
        _remember(path)


def _state(path: Path) -> bytes:
    status = path.stat()
    boot = BOOT_ID.read_bytes() if BOOT_ID.is_file() else b""
    return b"%d %d %d %s" % (status.st_ino, status.st_size, status.st_mtime_ns, boot.strip())


def _is_remembered(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.with_suffix(VERIFIED).read_bytes() == _state(path)
    return False


def _remember(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.with_suffix(VERIFIED).write_bytes(_state(path))


def _last_used(path: Path) -> float:
    marker = path.with_suffix(VERIFIED)
    return max(p.stat().st_mtime for p in (path, marker) if p.exists())


def _others(path: Path) -> list[Path]:
    """The files of the same checkpoint and rank with another key."""
    return [other for other in path.parent.glob(f"{path.name.rpartition('-')[0]}-*{SUFFIX}") if other != path]


def _remove(path: Path) -> bool:
    """Removes a file that no process has mapped; returns whether it did."""
    if _is_held(path):
        return False
    for file in (path, path.with_suffix(VERIFIED)):
        file.unlink(missing_ok=True)
    return True


_held: dict[Path, int] = {}  # open and locked as long as this process runs


def _hold(path: Path) -> None:
    if path not in _held:
        _held[path] = os.open(path, os.O_RDONLY)
        fcntl.flock(_held[path], fcntl.LOCK_SH | fcntl.LOCK_NB)


def _is_held(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the folder against other processes, which wait: they want the same file, or use the same disk."""
    descriptor, started, reported = os.open(folder, os.O_RDONLY | os.O_DIRECTORY), time.monotonic(), False
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not reported and time.monotonic() - started > LOCK_REPORT_S:
                    logger.info("waiting for another process that lays weights out in %s", folder)
                    reported = True
                time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


_flushes: list[threading.Thread] = []


def _flush_and_remember(path: Path) -> None:
    """Waits until a new file is on the disk.

    One that cannot be written is removed: the next start makes it again.
    """
    try:
        for name in (path, path.parent):
            descriptor = os.open(name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        logger.warning("weights cache %s could not be written: %s", path, error.strerror or error)
        path.unlink(missing_ok=True)
        return
    _remember(path)
