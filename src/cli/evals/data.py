"""Reads the evaluations' files in the formats in which they are published."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from gptoss.cli.remote.connection import reason
from gptoss.cli.remote.errors import UsageError

T = TypeVar("T")
Record = dict[str, Any]


def find(folder: Path, patterns: Sequence[str], what: str) -> list[Path]:
    """Returns the files that match the first pattern with any match. Raises UsageError if there is none."""
    if not folder.is_dir():
        raise UsageError(f"--data: there is no folder {str(folder)!r}")
    for pattern in patterns:
        if found := sorted(folder.rglob(pattern)):
            return found
    raise UsageError(f"--data: {str(folder)!r} has no file of {what}: {' or '.join(patterns)}")


def read(path: Path, fields: Sequence[str]) -> list[Record]:
    """Returns the records of a .jsonl, .json, .csv or .parquet file.

    Raises:
        UsageError: it cannot be read, or a record lacks one of `fields`; names file, record and field.
    """
    try:
        records = list(_records(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read {path}: {reason(error)}") from None
    for number, record in enumerate(records, 1):
        for field in fields:
            if not isinstance(record, dict) or field not in record:
                raise UsageError(f"{path}, record {number}: no field {field!r}")
    if not records:
        raise UsageError(f"{path} is empty")
    return records


def _records(path: Path) -> Iterator[Record]:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    else:
        yield from _json_lines(path)


def _json_lines(path: Path) -> Iterator[Record]:
    """Yields a file's objects, one a line, or those of one array."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
        except ValueError as error:
            raise UsageError(f"{path} is not JSON: {reason(error)}") from None
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number}, is not JSON: {reason(error)}") from None


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"{path.name} needs pyarrow: pip install pyarrow, or convert it to .jsonl") from None
    yield from pyarrow.parquet.read_table(path).to_pylist()


def some(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """Returns `limit` of the items, chosen by the seed, in their order; all if there is no limit."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i] for i in sorted(Random(seed).sample(range(len(items)), limit))]
