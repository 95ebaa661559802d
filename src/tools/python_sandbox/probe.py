"""Finds out whether this machine has a sandbox, by starting one; if not, why, and what helps."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from gptoss.tools.python_sandbox.bubblewrap import Sandbox, Started, find_bubblewrap, last_line
from gptoss.tools.python_sandbox.errors import SandboxError
from gptoss.tools.python_sandbox.interpreter import find_interpreter
from gptoss.tools.python_sandbox.limits import SandboxLimits

READY_S = 60.0
_DEBIAN = Path("/proc/sys/kernel/unprivileged_userns_clone")
_UBUNTU = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
_COUNT = Path("/proc/sys/user/max_user_namespaces")
_CONTAINERS = (Path("/.dockerenv"), Path("/run/.containerenv"))


def find_sandbox(interpreter: Path | None = None, limits: SandboxLimits | None = None) -> Sandbox:
    """The sandbox of this machine, after starting and ending one container. Raises SandboxError.

    `interpreter` is python_tool_interpreter. Blocks for a second or so.
    """
    if sys.platform != "linux":
        raise SandboxError("the sandbox needs Linux", "run the server on Linux, or without the Python tool")
    sandbox = Sandbox(find_bubblewrap(), find_interpreter(interpreter))
    limits = limits or SandboxLimits()
    try:
        _try(sandbox, limits)
    except SandboxError as error:
        if "proc" not in error.reason:
            raise _explained(error) from None
        sandbox = replace(sandbox, own_proc=False)  # a container whose /proc is masked allows no other one
        try:
            _try(sandbox, limits)
        except SandboxError as second:
            raise _explained(second) from None
    return sandbox


def _try(sandbox: Sandbox, limits: SandboxLimits) -> None:
    """Starts a driver and ends it again. Raises SandboxError."""
    started = sandbox.start(limits)
    try:
        started.release()
        _wait(started)
    finally:
        started.end()
        for end in (started.output, started.write_end, started.read_end):
            os.close(end)


def _wait(started: Started) -> None:
    """Waits for the driver's first frame."""
    until = time.monotonic() + READY_S
    ready, _, _ = select.select([started.read_end], [], [], max(0.0, until - time.monotonic()))
    if not ready:
        raise SandboxError(f"the interpreter did not start within {READY_S:g} s")
    if not os.read(started.read_end, 4):
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.process.wait(5)
        raise SandboxError(last_line(started.output) or "the interpreter ended at once")


def _explained(error: SandboxError) -> SandboxError:
    """The error with the setting of the system that causes it, and what to do."""
    text = error.reason
    if not any(word in text for word in ("namespace", "Operation not permitted", "Permission denied", "uid map")):
        if "Unknown option" in text:
            return SandboxError(f"bubblewrap is too old ({text})", "install bubblewrap 0.8 or newer")
        return error
    if _value(_DEBIAN) == "0":
        return SandboxError(_forbidden(_DEBIAN, text), "sysctl -w kernel.unprivileged_userns_clone=1")
    if _value(_COUNT) == "0":
        return SandboxError(_forbidden(_COUNT, text), "sysctl -w user.max_user_namespaces=10000")
    if _value(_UBUNTU) == "1":
        remedy = "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile for bwrap"
        return SandboxError(_forbidden(_UBUNTU, text), remedy)
    if any(path.exists() for path in _CONTAINERS):
        remedy = "start the container with --security-opt seccomp=unconfined --security-opt apparmor=unconfined"
        return SandboxError(f"this container does not allow user namespaces ({text})", remedy)
    return SandboxError(f"user namespaces are not allowed here ({text})", "allow them for the server's user")


def _forbidden(setting: Path, text: str) -> str:
    return f"user namespaces are not allowed here: {setting} is {_value(setting)} ({text})"


def _value(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
