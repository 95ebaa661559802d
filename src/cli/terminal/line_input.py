"""Questions typed in a terminal: line editing, history and completion by readline."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptoss.cli.terminal.style import Style

BLOCK = '"""'
PROMPT, MORE = "> ", ". "
MAX_HISTORY = 1000

try:
    import readline
except ImportError:  # a Python without it: no editing, no history
    readline = None  # type: ignore[assignment]


class LineInput:
    """Reads questions, which may have several lines.

    A line that ends with a backslash continues in the next; three quotes begin and end a block.
    """

    def __init__(self, style: Style, words: Sequence[str]) -> None:
        """`words`: completed by the tab key."""
        self._style = style
        self._words = sorted(words)
        if readline is not None:
            readline.set_completer(self._complete)
            readline.set_completer_delims(" ")
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one question

    def read(self) -> tuple[str, bool]:
        """Returns the text and whether it is a block, which is never a command. Raises EOFError at ctrl-D."""
        line = self._line(PROMPT)
        if line.lstrip().startswith(BLOCK):
            return self._block(line.lstrip().removeprefix(BLOCK)), True
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line(MORE))
        return "\n".join(lines).strip(), False

    def _block(self, first: str) -> str:
        lines = [first]
        while not lines[-1].rstrip().endswith(BLOCK):
            lines.append(self._line(MORE))
        lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str:
        if self._style.colours and readline is not None:
            return input(
                f"\001\x1b[1m\002{prompt}\001\x1b[0m\002"
            )  # readline counts what is between 1 and 2 as no column
        return input(prompt)

    def _complete(self, text: str, state: int) -> str | None:
        found = [word for word in self._words if word.startswith(text)] if text.startswith("/") else []
        return found[state] if state < len(found) else None


def history_path() -> Path:
    """Returns the file of earlier questions: in $XDG_STATE_HOME, or ~/.local/state."""
    root = os.environ.get("XDG_STATE_HOME", "")
    base = Path(root) if os.path.isabs(root) else Path(os.path.expanduser("~")) / ".local" / "state"
    return base / "gpt-oss-server" / "chat_history"


@contextlib.contextmanager
def kept_history(path: Path | None) -> Iterator[None]:
    """Reads earlier questions and writes them back at the end, for this user only; None keeps nothing."""
    if readline is None or path is None:
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            readline.set_history_length(MAX_HISTORY)
            readline.write_history_file(path)
