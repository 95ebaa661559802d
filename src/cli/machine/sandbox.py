"""The sandbox of the Python tool."""

from __future__ import annotations

from gptoss.cli.machine.finding import Finding
from gptoss.tools.python_sandbox.errors import SandboxError
from gptoss.tools.python_sandbox.probe import find_sandbox


def python_sandbox() -> Finding:
    """Returns whether the Python tool can run here: a sandbox is started and ended."""
    try:
        sandbox = find_sandbox()
    except SandboxError as error:
        return Finding("sandbox", "note", f"no Python tool: {error.reason}", error.remedy)
    plots = "with" if sandbox.interpreter.has_matplotlib else "without"
    return Finding("sandbox", "ok", f"bubblewrap runs Python {sandbox.interpreter.version}, {plots} matplotlib")
