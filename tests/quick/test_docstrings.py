"""Docstrings in src: a first line of at most 100 characters that is whole, and says what is returned or done."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"
MAX_FIRST_LINE = 100
SENTENCE_END = re.compile(r"[.!?:][\"'`)]*$")
STARTS_MID_WAY = re.compile(r"Of (?!the )|The same\b|->|None\b|Raises \w+(?:(?:,| or) (?:\w+'s )?\w+)*[.;]")
NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the text of each docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, NODES) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text


def faults(text: str) -> Iterator[str]:
    first, *rest = text.split("\n")
    if len(first) > MAX_FIRST_LINE:
        yield f"its first line has {len(first)} characters"
    if rest and rest[0].strip() and not SENTENCE_END.search(first):
        yield "its first line ends within a sentence"
    if STARTS_MID_WAY.match(text):
        yield "its first line does not say what is returned or done"
    if re.search(r"\n\s*\n\s*\n", text):
        yield "it has two blank lines in a row"


@pytest.mark.parametrize("folder", sorted(p.name for p in SRC.iterdir() if p.is_dir() and p.name != "__pycache__"))
def test_docstrings_of_a_package(folder: str) -> None:
    assert list(found((SRC / folder).rglob("*.py"))) == []


def test_docstrings_of_the_top_modules() -> None:
    assert list(found(SRC.glob("*.py"))) == []


def found(paths: Iterator[Path]) -> Iterator[str]:
    for path in sorted(paths):
        for line, text in docstrings(path):
            yield from (f"{path.relative_to(SRC)}:{line}: {fault}" for fault in faults(text))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x" * 101, "its first line has 101 characters"),
        ("Returns the\nnumber.", "its first line ends within a sentence"),
        ("Of its tokens.", "its first line does not say what is returned or done"),
        ("-> a number.", "its first line does not say what is returned or done"),
        ("None for free text.", "its first line does not say what is returned or done"),
        ("Raises ValueError.", "its first line does not say what is returned or done"),
        (
            "Raises ValueError or json's KeyError; nothing is sent.",
            "its first line does not say what is returned or done",
        ),
        ("Returns one.\n\n\nMore.", "it has two blank lines in a row"),
    ],
)
def test_faults_are_found(text: str, fault: str) -> None:
    assert list(faults(text)) == [fault]


@pytest.mark.parametrize(
    "text", ["Returns one.", "A number\n\nof ids.", "Raises ValueError if it is odd.", "x: y.\nMore."]
)
def test_good_docstrings_pass(text: str) -> None:
    assert list(faults(text)) == []
