"""The files of configs/ and assets/: inside an installed package, beside src/ in a checkout."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def resource(*parts: str) -> Path:
    """Path of a file or folder below configs/ or assets/: `resource("assets", "page")`."""
    package = Path(str(files("gptoss")))
    folder = package if (package / "assets").is_dir() else package.parent
    return folder.joinpath(*parts)
