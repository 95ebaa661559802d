"""What one check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that this machine has or lacks.

    `missing`: no server starts without it. `note`: a server starts, but slower, or not with every model.
    """

    name: str
    state: Literal["ok", "note", "missing"]
    text: str
    remedy: str = ""
