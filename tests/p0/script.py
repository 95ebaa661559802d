"""Runs one file of this folder as a script: `python tests/p0/test_2_sse_streaming.py --url http://127.0.0.1:8000`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(file: str) -> None:
    """Leaves with pytest's exit code."""
    command = [sys.executable, "-m", "pytest", str(Path(file).resolve()), "-v", *sys.argv[1:]]
    sys.exit(subprocess.run(command, cwd=ROOT).returncode)
