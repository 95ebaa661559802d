"""Parses JSON of many small values without blocking other threads, up to a limit of values.

The standard library's scanner in C holds the interpreter lock for the whole text: a million keys take a second. Its
twin in Python takes ten times as long but releases the lock.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from json.decoder import JSONArray, JSONObject  # type: ignore[attr-defined]
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

from gptoss.harmony.bpe import EncodingStoppedError

MAX_VALUES = 1_000_000
MAX_PARTS = 250_000  # objects, arrays and the keys of objects, which take most memory and time
MAX_SECONDS_IN_C = 0.04
# rough costs of json.loads in seconds per mark; keys are also looked up and memoized
_COSTS = ((b",[{", 1e-7), (b":", 1e-6))


class TooManyValuesError(ValueError):
    """More than MAX_VALUES values or MAX_PARTS objects, arrays and keys."""


def takes_long(data: bytes) -> bool:
    """Whether the scanner in C might take longer than MAX_SECONDS_IN_C.

    Punctuation within strings counts too.
    """
    marks = ((len(data) - len(data.translate(None, those))) * cost for those, cost in _COSTS)
    return sum(marks) > MAX_SECONDS_IN_C


class CountingDecoder(json.JSONDecoder):
    """A decoder that raises TooManyValuesError, and EncodingStoppedError once `stopped` returns true."""

    def __init__(self, stopped: Callable[[], bool], **options: Any) -> None:
        super().__init__(**options)
        self._stopped = stopped
        self._num_values = self._num_parts = 0
        self.parse_object, self.parse_array = self._object, self._array
        self.scan_once = scan_once = py_make_scanner(self)

        def scan_value(text: str, begin: int) -> Any:
            self._num_values += 1
            if self._num_values > MAX_VALUES:
                raise TooManyValuesError(f"more than {MAX_VALUES} values")
            if self._num_values % 10_000 == 0 and self._stopped():
                raise EncodingStoppedError
            return scan_once(text, begin)

        def scan_member(text: str, begin: int) -> Any:
            self._count_part()
            return scan_value(text, begin)

        self._scan_value, self._scan_member = scan_value, scan_member

    def _object(self, at: Any, strict: bool, _: Any, *hooks: Any) -> Any:
        self._count_part()
        return JSONObject(at, strict, self._scan_member, *hooks)

    def _array(self, at: Any, _: Any) -> Any:
        self._count_part()
        return JSONArray(at, self._scan_value)

    def _count_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise TooManyValuesError(f"more than {MAX_PARTS} objects, arrays and keys")
