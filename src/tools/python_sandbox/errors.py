"""Why no sandbox can be had."""

from __future__ import annotations


class SandboxError(Exception):
    """There is no sandbox: the reason, and the remedy if there is one."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason, self.remedy = reason, remedy
