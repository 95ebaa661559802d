"""What ends a command: one line for people and an exit code for scripts (docs/command-line.md)."""

from __future__ import annotations

OK, NO, USAGE, UNREACHABLE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 4, 130


class CommandError(Exception):
    """The command ends with this message and `exit_code`."""

    exit_code = NO


class UsageError(CommandError):
    """An option, a variable or a file that the command cannot use."""

    exit_code = USAGE


class Unreachable(CommandError):
    """No server answers there, or the connection broke."""

    exit_code = UNREACHABLE


class Refused(CommandError):
    """The server answered with an error. `status` is 0 for an error within a stream."""

    exit_code = REFUSED

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status
