"""Which Python runs in the sandbox, and what it needs of the file system."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gptoss.tools.python_sandbox.errors import SandboxError

_QUESTION = """
import importlib.util, json, sys
plots = importlib.util.find_spec("matplotlib") is not None
print(json.dumps([sys.version.split()[0], sys.prefix, sys.base_prefix, plots]))
"""
_SYSTEM = Path("/usr")


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python, by the path with which it is started."""

    path: Path
    version: str
    folders: tuple[Path, ...]  # outside /usr, to be shown read-only
    has_matplotlib: bool


def find_interpreter(path: Path | None) -> Interpreter:
    """The Python at this path; None: the one that runs this program. Raises SandboxError."""
    chosen = path or Path(sys.executable)
    try:
        done = subprocess.run(
            [str(chosen), "-I", "-c", _QUESTION], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
        version, prefix, base, plots = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        reason = f"{chosen} is not a Python interpreter that runs here: {error}"
        raise SandboxError(reason, "set python_tool_interpreter to a Python 3.11 or newer") from None
    folders = {Path(prefix), Path(base), Path(prefix).resolve(), Path(base).resolve()}
    if Path("/") in folders:
        raise SandboxError(f"{chosen} is installed in /", "set python_tool_interpreter to a Python in a folder")
    outside = sorted(folder for folder in folders if not folder.is_relative_to(_SYSTEM))
    return Interpreter(chosen.absolute(), version, tuple(outside), plots)
