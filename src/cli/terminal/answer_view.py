"""How an answer appears: reasoning dimmed, hidden or plain, the text as Markdown on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack

from rich.console import Console

from gptoss.cli.terminal.markdown_view import MarkdownView
from gptoss.cli.terminal.style import Style, printable

CLEAR_LINE = "\r\x1b[K"
THINKING = "thinking ..."


def show(pieces: Iterable[tuple[str, str]], style: Style, *, reasoning: bool, markdown: bool) -> None:
    """Writes the pieces of an answer to standard output as they come."""
    with ExitStack() as stack:
        view, before = None, ""
        for kind, piece in pieces:
            if kind == "reasoning":
                before = _show_reasoning(piece, style, before, shown=reasoning)
                continue
            _end_reasoning(before)
            before = ""
            if kind == "step":
                stack.close()
                view = None
                _write(_step(piece, style))
                continue
            if not (markdown and style.colours):
                _write(printable(piece) if sys.stdout.isatty() else piece)
                continue
            if view is None:
                view = stack.enter_context(_markdown_view())
            view.write(piece)
        _end_reasoning(before)
    if not (markdown and style.colours):
        _write("\n")


def _step(text: str, style: Style) -> str:
    """Returns how a tool's step appears: its first line marked, the others indented."""
    first, *rest = printable(text).split("\n")
    return "".join((style(f"* {first}\n", "cyan"), *(style(f"  {line}\n", "dim") for line in rest)))


def _show_reasoning(piece: str, style: Style, before: str, *, shown: bool) -> str:
    """Shows a piece of reasoning, and returns what `_end_reasoning` needs.

    That is the last piece, or the notice that stands for hidden reasoning.
    """
    if shown:
        _write(style(printable(piece), "dim"))
        return piece
    if style.colours and not before:
        _write(style(THINKING, "dim"))
    return THINKING if style.colours else ""


def _end_reasoning(before: str) -> None:
    if before == THINKING:
        _write(CLEAR_LINE)
    elif before:
        _write("\n\n")


def _markdown_view() -> MarkdownView:
    return MarkdownView(Console(highlight=False))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
