"""What a call of the browser can fail with."""

from __future__ import annotations

from gptoss.generation.tool_types import FailureKind


class BrowserError(Exception):
    """A call that cannot be answered. The model reads the message."""

    def __init__(self, kind: FailureKind, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.code = kind, message, code
