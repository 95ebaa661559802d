"""Paths of the files in configs/ and assets/: inside an installed package, next to src/ in a checkout."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def resource(*parts: str) -> Path:
    """Returns the path of a file or folder: `resource("assets", "page")`."""
    package = Path(str(files("gptoss")))
    folder = package if (package / "assets").is_dir() else package.parent
    return folder.joinpath(*parts)
