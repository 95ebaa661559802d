"""Reads the header of a GGUF file: its keys, and where its tensors are. No torch, no numpy.

Written for files from anywhere: no count or length is trusted before it is compared with the size of the file, so a
hostile header costs an error and no memory. The `gguf` package's reader makes an array for each entry of the vocabulary
(seconds and a gigabyte for gpt-oss) and checks nothing, so it serves only to dequantise and to write.

Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
MAX_STRINGS = 1 << 22  # in one array; the vocabulary has 201,088 tokens and some 450,000 merges
MAX_FILES = 999
SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
STRING, ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
# name, id, values of a block, bytes of a block: ggml.h, as in the package's GGML_QUANT_SIZES
_TYPES = """
F32 0 1 4, F16 1 1 2, Q4_0 2 32 18, Q4_1 3 32 20, Q5_0 6 32 22, Q5_1 7 32 24, Q8_0 8 32 34, Q8_1 9 32 40,
Q2_K 10 256 84, Q3_K 11 256 110, Q4_K 12 256 144, Q5_K 13 256 176, Q6_K 14 256 210, Q8_K 15 256 292,
IQ2_XXS 16 256 66, IQ2_XS 17 256 74, IQ3_XXS 18 256 98, IQ1_S 19 256 50, IQ4_NL 20 32 18, IQ3_S 21 256 110,
IQ2_S 22 256 82, IQ4_XS 23 256 136, I8 24 1 1, I16 25 1 2, I32 26 1 4, I64 27 1 8, F64 28 1 8, IQ1_M 29 256 56,
BF16 30 1 2, TQ1_0 34 256 54, TQ2_0 35 256 66, MXFP4 39 32 17, NVFP4 40 64 36, Q1_0 41 128 18
"""


class GgufError(Exception):
    """The file is not a readable GGUF file. The message names it, and the key or tensor."""


@dataclass(frozen=True, slots=True)
class GgufType:
    name: str
    block_values: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    path: Path
    type: GgufType
    shape: tuple[int, ...]  # the last dimension is contiguous; the file has them in the other order
    offset: int  # from the beginning of the file

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count // self.type.block_values * self.type.block_bytes


@dataclass(frozen=True, slots=True)
class StringArray:
    """Where an array of strings lies; `read_strings` reads it."""

    path: Path
    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class GgufModel:
    """The keys of the first file, and the tensors of all files of a model."""

    paths: tuple[Path, ...]
    keys: dict[str, Any]
    tensors: dict[str, GgufTensor]


def _types() -> dict[int, GgufType]:
    rows = [row.split() for row in _TYPES.replace("\n", " ").split(",")]
    return {int(number): GgufType(name, int(values), int(size)) for name, number, values, size in rows}


TYPES = _types()


def read_model(path: Path) -> GgufModel:
    """Reads the headers of a model: of one file, or of all files of a split one.

    `path` may name any of them.

    Raises:
        GgufError: a file is missing, truncated, or not a GGUF file of a supported version.
    """
    paths = split_files(path)
    headers = [_read_header(part) for part in paths]
    count = headers[0].keys.get("split.count", 1)
    if count not in (0, len(paths)):
        raise GgufError(f"{path}: split.count is {count}, but its name is that of {len(paths)} file(s)")
    tensors: dict[str, GgufTensor] = {}
    for number, header in enumerate(headers):
        if len(paths) > 1 and header.keys.get("split.no") != number:
            raise GgufError(f"{paths[number]}: split.no is {header.keys.get('split.no')}, expected {number}")
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise GgufError(f"{tensor.path}: tensor {name!r} is also in {tensors[name].path.name}")
            tensors[name] = tensor
    expected = headers[0].keys.get("split.tensors.count", len(tensors))
    if len(paths) > 1 and expected != len(tensors):
        raise GgufError(f"{path}: the files have {len(tensors)} tensors, split.tensors.count is {expected}")
    return GgufModel(tuple(paths), headers[0].keys, tensors)


def split_files(path: Path) -> list[Path]:
    """The files of the model that `path` is one of, in order. Raises GgufError if one is missing."""
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match[3]) == 0:
        return [path]
    count = int(match[3])
    if count > MAX_FILES:
        raise GgufError(f"{path}: {count} files of one model, at most {MAX_FILES}")
    paths = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    for part in paths:
        if not part.is_file():
            raise GgufError(f"{part} is missing: {path.name} is one of {count} files")
    return paths


def read_strings(array: StringArray) -> list[str]:
    """The strings of an array. Raises GgufError if one is not UTF-8."""
    with _mapped(array.path) as data:
        cursor = _Cursor(data, array.path, array.offset)
        return [cursor.text("a string") for _ in range(array.count)]


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise GgufError(f"{path} is empty") from None
    except OSError as error:
        raise GgufError(f"{path}: {error.strerror or error}") from error


def _read_header(path: Path) -> GgufModel:
    with _mapped(path) as data:
        cursor = _Cursor(data, path, 0)
        num_tensors, num_keys = _counts(cursor)
        keys = dict(_keys(cursor, num_keys))
        alignment = keys.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise GgufError(f"{path}: general.alignment is {alignment!r}, expected a power of two")
        infos = list(_tensor_infos(cursor, num_tensors))
        start = -(-cursor.at // alignment) * alignment
        return GgufModel((path,), keys, _placed(infos, path, start, alignment, len(data)))


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """The numbers of tensors and keys."""
    path = cursor.path
    if cursor.take(4, "the magic") != MAGIC:
        raise GgufError(f"{path} is not a GGUF file")
    version = cursor.number("<I", "the version")
    if version not in VERSIONS:
        kind = "big-endian" if version and version & 0xFFFF == 0 else f"version {version}"
        raise GgufError(f"{path} is a {kind} GGUF file; versions {VERSIONS[0]} and {VERSIONS[1]} can be read")
    num_tensors, num_keys = cursor.number("<Q", "the number of tensors"), cursor.number("<Q", "the number of keys")
    cursor.expect(num_tensors, 8 + 4 + 8 + 4 + 8, f"{num_tensors} tensors")
    cursor.expect(num_keys, 8 + 4 + 1, f"{num_keys} keys")
    return num_tensors, num_keys


def _keys(cursor: _Cursor, count: int) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for _ in range(count):
        name = cursor.text("a key")
        if name in seen:
            raise GgufError(f"{cursor.path}: key {name!r} is there twice")
        seen.add(name)
        yield name, _value(cursor, name, cursor.number("<I", f"the type of {name!r}"))


def _value(cursor: _Cursor, name: str, kind: int) -> Any:
    if kind == STRING:
        return cursor.text(f"key {name!r}")
    if kind in SCALARS:
        return cursor.number(SCALARS[kind], f"key {name!r}")
    if kind != ARRAY:
        raise GgufError(f"{cursor.path}: key {name!r} has the unknown type {kind}")
    element, count = cursor.number("<I", f"key {name!r}"), cursor.number("<Q", f"key {name!r}")
    if element == STRING:
        cursor.expect(count, 8, f"key {name!r} with {count} strings")
        if count > MAX_STRINGS:
            raise GgufError(f"{cursor.path}: key {name!r} has {count} strings, at most {MAX_STRINGS}")
        array = StringArray(cursor.path, cursor.at, count)
        cursor.skip_strings(count, name)
        return array
    if element not in SCALARS:
        raise GgufError(f"{cursor.path}: key {name!r} is an array of the unsupported type {element}")
    code = SCALARS[element]
    cursor.expect(count, struct.calcsize(code), f"key {name!r} with {count} values")
    data = cursor.take(count * struct.calcsize(code), f"key {name!r}")
    return [value for (value,) in struct.iter_unpack(code, data)] if count <= MAX_STRINGS else None


def _tensor_infos(cursor: _Cursor, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Yields name, shape, type and offset from the beginning of the data."""
    for _ in range(count):
        name = cursor.text("a tensor's name")
        dimensions = cursor.number("<I", f"tensor {name!r}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise GgufError(f"{cursor.path}: tensor {name!r} has {dimensions} dimensions")
        sizes = [cursor.number("<Q", f"tensor {name!r}") for _ in range(dimensions)]
        kind, offset = cursor.number("<I", f"tensor {name!r}"), cursor.number("<Q", f"tensor {name!r}")
        yield name, tuple(reversed(sizes)), kind, offset


def _placed(
    infos: list[tuple[str, tuple[int, ...], int, int]], path: Path, start: int, alignment: int, file_bytes: int
) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for name, shape, number, offset in infos:
        if name in tensors:
            raise GgufError(f"{path}: tensor {name!r} is there twice")
        kind = TYPES.get(number)
        if kind is None:
            raise GgufError(f"{path}: tensor {name!r} has the unknown type {number}")
        if min(shape) < 1 or shape[-1] % kind.block_values:
            raise GgufError(f"{path}: tensor {name!r} has shape {shape}, which {kind.name} cannot have")
        if offset % alignment:
            raise GgufError(f"{path}: tensor {name!r} begins at {offset}, not at a multiple of {alignment}")
        tensor = GgufTensor(path, kind, shape, start + offset)
        if tensor.offset + tensor.num_bytes > file_bytes:
            raise GgufError(
                f"{path} is truncated: tensor {name!r} of shape {shape} in {kind.name} ends at byte "
                f"{tensor.offset + tensor.num_bytes}, the file has {file_bytes}"
            )
        tensors[name] = tensor
    return tensors


class _Cursor:
    """A position in a mapped file, which reads nothing beyond its end."""

    def __init__(self, data: mmap.mmap, path: Path, at: int) -> None:
        self.path, self.at = path, at
        self._data, self._size = data, len(data)

    def expect(self, count: int, least_bytes: int, what: str) -> None:
        """Raises GgufError if `count` things of at least that size cannot be in the rest of the file."""
        if count * least_bytes > self._size - self.at:
            raise GgufError(f"{self.path} is truncated or damaged: {what} do not fit into {self._size} bytes")

    def take(self, count: int, what: str) -> bytes:
        self.expect(count, 1, what)
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def text(self, what: str) -> str:
        data = self.take(self.number("<Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise GgufError(f"{self.path}: {what} is not UTF-8") from None

    def skip_strings(self, count: int, name: str) -> None:
        data, at, length_at = self._data, self.at, _LENGTH.unpack_from
        try:
            for _ in range(count):  # 650,000 times for gpt-oss's vocabulary and merges
                at += 8 + length_at(data, at)[0]
        except (struct.error, OverflowError):  # beyond the end
            at = self._size + 1
        if at > self._size:
            raise GgufError(f"{self.path} is truncated: key {name!r}")
        self.at = at
