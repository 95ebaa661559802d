"""Reads a small JSON file that a user names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 20


def read_object(path: Path, error: type[Exception]) -> dict[str, Any]:
    """Returns the object that the file holds.

    Raises:
        error: the file is missing, larger than MAX_BYTES, or holds no object.
    """
    try:
        is_file = path.is_file()
        size = path.stat().st_size
        if is_file and size <= MAX_BYTES:  # a pipe would be waited for
            value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}") from None
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not valid JSON: {cause}") from None
    if not is_file:
        raise error(f"{path} is not a file")
    if size > MAX_BYTES:
        raise error(f"{path} is larger than {MAX_BYTES} bytes")
    if not isinstance(value, dict):
        raise error(f"{path} must hold an object")
    return value
