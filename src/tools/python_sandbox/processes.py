"""The processes of a container, seen from outside."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LOOKS = 3


def descendants(pid: int) -> list[int]:
    """The ids of a process's children, their children and so on; not its own."""
    found: list[int] = []
    pending = [pid]
    while pending:
        for child in _children(pending.pop()):
            found.append(child)
            pending.append(child)
    return found


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []
    children: list[int] = []
    for task in tasks:
        with contextlib.suppress(OSError):
            children += map(int, (task / "children").read_text().split())
    return children


def memory_of(pids: list[int], limit: int) -> int:
    """Bytes of memory that the processes hold together.

    Pages that several processes share are counted once only where the simple sum exceeds the limit: that takes longer.
    """
    simple = sum(map(_resident, pids))
    return simple if simple <= limit else sum(map(_proportional, pids))


def _resident(pid: int) -> int:
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * _PAGE


def _proportional(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def stop(pid: int) -> None:
    """Stops all descendants, those too that are started meanwhile.

    Linux lists children reliably only where nothing moves, so it ends when several looks in a row find nothing new.
    """
    stopped: set[int] = set()
    looks = 0
    while looks < _LOOKS:
        new = set(descendants(pid)) - stopped
        for child in new:
            _send(child, signal.SIGSTOP)
        stopped |= new
        looks = 0 if new else looks + 1


def resume(pid: int) -> None:
    """Resumes all descendants."""
    for child in descendants(pid):
        _send(child, signal.SIGCONT)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
