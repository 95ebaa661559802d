"""Stop strings, which end the text of an answer."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Cuts text before the first stop string; holds back what could still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None  # the string that ended the text

    def feed(self, text: str) -> str:
        if not self._stops:
            return text
        held = self._held + text
        found = [(at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            at, self.found = min(found, key=lambda one: one[0])
            self._held = ""
            return held[:at]
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
