"""Text as the model reads it: special characters replaced, lines wrapped at 80 columns.

Pages show links as `【id†text†domain】`, and answers cite pages as `【cursor†L9-L11】`. The brackets of a page's own
text are therefore replaced.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

WIDTH = 80
MAX_PARAGRAPH = 20_000  # characters that are wrapped at once: textwrap's time is quadratic in the length of a word
_CONTROLS = (*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0xD800, 0xE000))  # without tab and line ends
_REPLACED: dict[int, str | None] = {
    **dict.fromkeys(_CONTROLS, " "),
    ord("【"): "〖",
    ord("】"): "〗",
    ord("◼"): "◾",
    0x200B: None,  # zero width space
    0xFEFF: None,  # byte order mark
}
_wrapper = textwrap.TextWrapper(WIDTH, replace_whitespace=False, drop_whitespace=False)


def clean(text: str) -> str:
    """The text without brackets that look like links, and without control characters."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_REPLACED)


def on_one_line(text: str, max_chars: int) -> str:
    """The clean text with runs of whitespace as one space, cut at `max_chars`."""
    merged = " ".join(clean(text[: 8 * max_chars]).split())
    return merged if len(merged) <= max_chars else f"{merged[: max_chars - 3]}..."


def link_text(text: str, max_chars: int = 1_000) -> str:
    """The text of a link: on one line, without the mark that ends it."""
    return on_one_line(text, max_chars).replace("†", "‡")


@dataclass(frozen=True, slots=True)
class WrappedText:
    """Lines of at most 80 columns. `begins[i]` is 1 if line i begins a line of the text."""

    lines: tuple[str, ...]
    begins: bytes

    def paragraph(self, line: int) -> range:
        """The indices of the lines that belong to the same line of the text as this one."""
        first = self.begins.rindex(1, 0, line + 1)
        end = self.begins.find(1, line + 1)
        return range(first, len(self.lines) if end < 0 else end)


def wrapped(text: str) -> WrappedText:
    """The text in lines of at most 80 columns; whitespace at line ends is kept."""
    lines: list[str] = []
    begins = bytearray()
    for paragraph in text.split("\n"):
        pieces = [paragraph] if len(paragraph) <= WIDTH and "\t" not in paragraph else _wrapped_paragraph(paragraph)
        lines += pieces
        begins += b"\1" + bytes(len(pieces) - 1)
    return WrappedText(tuple(lines), bytes(begins))


def _wrapped_paragraph(paragraph: str) -> list[str]:
    parts = (paragraph[at : at + MAX_PARAGRAPH] for at in range(0, len(paragraph), MAX_PARAGRAPH))
    return [line for part in parts for line in _wrapper.wrap(part)] or [""]


# A link may be wrapped anywhere: line ends are part of these marks.
_OPENING = re.compile(r"【(?:\n?\d)+\n?†")
_CLOSING = re.compile(r"(?:†[^†【】]*)?】")


def without_links(text: str) -> str:
    """The text with the texts of its links alone, and as many lines."""

    def line_ends(mark: re.Match[str]) -> str:
        return "\n" * mark[0].count("\n")

    return _CLOSING.sub(line_ends, _OPENING.sub(line_ends, text))
