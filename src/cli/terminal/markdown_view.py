"""Markdown that grows: finished blocks are printed once, the unfinished one is redrawn."""

from __future__ import annotations

import re
from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from gptoss.cli.terminal.style import printable

FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")


class MarkdownView:
    """A context manager: `write` adds pieces; at the end the last block is printed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pending = ""
        self._has_printed = False
        self._live = Live(console=console, transient=True, refresh_per_second=12)

    def __enter__(self) -> MarkdownView:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.update(Tail(""))
        self._live.stop()
        self._print(self._pending)

    def write(self, piece: str) -> None:
        done, self._pending = split_blocks(self._pending + printable(piece))
        self._print(done)
        self._live.update(Tail(self._pending))

    def _print(self, text: str) -> None:
        if text.strip():
            if self._has_printed:
                self._console.print()
            self._console.print(_markdown(text))
            self._has_printed = True


class Tail:
    """The last lines of a text in Markdown, as many as the terminal shows."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(_markdown(self._text), options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - 2) :] if self._text else ():
            yield from line
            yield Segment.line()


def _markdown(text: str) -> Markdown:
    return Markdown(text, hyperlinks=False)  # the address is shown, not hidden in an escape sequence


def split_blocks(text: str) -> tuple[str, str]:
    """Returns the text up to its last empty line outside of a code block, and the rest."""
    fence, position, end = "", 0, 0
    for line in text.splitlines(keepends=True):
        position += len(line)
        found = FENCE.match(line)
        if found and not fence:
            fence = found[1]
        elif fence and found and found[1].startswith(fence) and not line.strip(" `~\n"):
            fence = ""
        elif not fence and not line.strip() and line.endswith("\n"):
            end = position
    return text[:end], text[end:]
