"""The format of a file with the weights of a rank, laid out for the kernels.

The tensors, then a table in JSON, then the table's SHA-256, its length and a magic number. The table has the whole
ModelWeights as a tree; a tensor is an offset in this file, or in a file of the checkpoint if the kernels read it as it
is stored there. The table also has the SHA-256 of each portion of the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from gptoss.engine.model.tensor_source import MappedFile, TensorSource
from gptoss.engine.model.weights import ModelWeights

MAGIC = b"gptoss-weights-1"
ALIGNMENT = 4096
PORTION = 16 * 2**20  # bytes under one sum
GB = 10**9
OWN = -1  # in the table: this file instead of one of the checkpoint's
Tree = Any  # JSON


class CacheFullError(Exception):
    """The weights would exceed the limit or the disk. The message says which and by how much."""


class DamagedError(Exception):
    """The file is not what was written."""


class WeightsWriter:
    """Writes the parts of ModelWeights: the tensors that are in no file of the checkpoint, and the table."""

    def __init__(self, file: BinaryIO, source: TensorSource, limit: int) -> None:
        self._file, self._source, self._limit = file, source, limit
        self._at = 0
        self._parts: list[Tree] = []
        self._sum, self._sums = hashlib.sha256(), list[str]()  # of the portion at hand, and of those before

    def add(self, part: Any) -> None:
        """Adds a layer, or another part of ModelWeights, in the order of `WeightLoader.parts`."""
        self._parts.append(self._encoded(part))

    def finish(self) -> None:
        """Writes the table and the end of the file."""
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


class WeightsReader:
    """Makes ModelWeights of a table."""

    def __init__(self, table: Tree, own: MappedFile, source: TensorSource) -> None:
        self._table, self._own, self._source = table, own, source

    def weights(self) -> ModelWeights:
        """The weights, mapped. Raises DamagedError, or what a table of another form raises."""
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


def read_table(path: Path) -> Tree:
    """The table at the end of the file. Raises DamagedError."""
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


def check_portions(path: Path, table: Tree, numbers: Iterable[int]) -> None:
    """Compares portions of the file with their sums. Raises DamagedError."""
    data, sums, last = np.memmap(path, mode="r"), table["sums"], table["end"]

    def check(number: int) -> None:
        begin, end = number * PORTION, min((number + 1) * PORTION, last)
        if hashlib.sha256(data[begin:end].data).hexdigest() != sums[number]:
            raise DamagedError(f"bytes {begin} to {end} have another SHA-256")

    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        list(pool.map(check, numbers))
