"""An input item, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PlacedItem:
    """An item as it was sent or stored, and the field of the request that it came by."""

    item: Any
    where: str
