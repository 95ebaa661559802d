"""Keeps weights that had to be laid out again in a file, which later starts and processes map.

One file for each rank of a model (weights_file.py has its format). Its name has a key over all that its content depends
on: paths, sizes and times of the checkpoint's files, the rank's part, the types, the instruction set, and the code that
lays weights out.

A file is written under another name and renamed, and flushed to the disk while the server starts. Its portions are
compared with their sums once after each boot of the machine, and again if the file's size or time has changed. That
finds what a power failure left unwritten, so that no start waits for the flush. Every other start compares the table
and a few portions, chosen at random. Files in use are locked and never removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from gptoss.engine.model.tensor_source import MappedFile, TensorSource
from gptoss.engine.model.weights import ModelWeights, WeightLoader
from gptoss.engine.model.weights_file import (
    GB,
    CacheFullError,
    DamagedError,
    Tree,
    WeightsReader,
    WeightsWriter,
    check_portions,
    read_table,
)
from gptoss.kernels import layers as kernel_layers

logger = logging.getLogger(__name__)

SUFFIX, MAKING, VERIFIED = ".weights", ".making", ".verified"
SAMPLED = 2  # portions that each start compares: some 20 ms
SPARE_BYTES = 2 * GB  # that are left free on the disk
LEAST_BYTES = GB  # of a checkpoint; a smaller one is laid out again at each start, in less than a second
LOCK_POLL_S, LOCK_REPORT_S = 0.1, 5.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


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
            table = read_table(path)
            if not made_now:
                _verify(path, table)
            weights = WeightsReader(table, MappedFile(path), source).weights()
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
                writer = WeightsWriter(file, source, self._limit())
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


def _verify(path: Path, table: Tree) -> None:
    """Compares all portions with their sums, or a few if all were compared since the boot.

    Raises DamagedError.
    """
    remembered, count = _is_remembered(path), len(table["sums"])
    check_portions(path, table, random.sample(range(count), min(SAMPLED, count)) if remembered else range(count))
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
    """Locks the folder. Other processes wait: they need the same file, or use the same disk."""
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
