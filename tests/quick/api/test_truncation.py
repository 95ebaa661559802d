"""What `truncation: "auto"` may cut: whole items from the beginning, and never a call without its results."""

from __future__ import annotations

from typing import Any

import pytest

from gptoss.api.responses.input.items import PlacedItem
from gptoss.api.responses.truncation import Cuts, answer_tokens

KINDS = {"c": "function_call", "o": "function_call_output", "k": "custom_tool_call", "p": "custom_tool_call_output"}
ROLES = {"u": "user", "a": "assistant", "s": "system", "d": "developer"}


def item(word: str) -> dict[str, Any]:
    """`c1` is a call with id 1, `o1` its result, `u2` the second user message."""
    if word[0] in KINDS:
        return {"type": KINDS[word[0]], "call_id": word[1:], "word": word}
    if word[0] == "r":
        return {"type": "reasoning", "word": word}
    return {"role": ROLES[word[0]], "word": word}


def cuts_of(words: str) -> Cuts:
    return Cuts([PlacedItem(item(word), f"input[{i}]") for i, word in enumerate(words.split())])


def kept(words: str) -> list[str]:
    """What each cut leaves."""
    cuts = cuts_of(words)
    return [" ".join(words.split()[index] for index in cuts.kept(cut)) for cut in range(len(cuts))]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("u1", []),
        ("u1 a1", []),  # the last user message and the last item
        ("u1 a1 u2", ["a1 u2", "u2"]),
        ("s1 d1 u1 d2 u2", ["s1 d1 d2 u2", "s1 d1 u2"]),
        ("u1 c1 o1 a1 u2", ["c1 o1 a1 u2", "a1 u2", "u2"]),
        ("u1 k1 p1 a1 u2", ["k1 p1 a1 u2", "a1 u2", "u2"]),
        ("c1 c2 o1 o2 u2", ["u2"]),
        ("c1 o1 c1 o1 u2", ["c1 o1 u2", "u2"]),  # the id comes again
        ("u1 r1 c1 o1 c2 o2", ["u1 c1 o1 c2 o2", "u1 c2 o2"]),  # of the last turn too
        ("u1 c1 a1 u2 o1", ["c1 a1 u2 o1"]),  # the last item is the call's result
        ("u1 c1 u2", ["c1 u2", "u2"]),  # a call that was never answered
        ("c1 a1 o1 a2 u2", ["a2 u2", "u2"]),
    ],
)
def test_cuts_part_no_call_from_its_results(words: str, wanted: list[str]) -> None:
    assert kept(words) == [words, *wanted]


def test_the_smallest_cut_that_fits_is_taken() -> None:
    cuts = cuts_of("u1 c1 o1 a1 u2")
    for limit, wanted in (9, 0), (5, 0), (4, 1), (3, 2), (2, 2), (1, 3), (0, None):
        assert cuts.smallest(lambda kept, limit=limit: len(kept) <= limit) == wanted  # type: ignore[misc]
    assert cuts.smallest(lambda kept: True, 2) == 2


def test_an_answer_gets_what_was_asked_for_within_a_quarter_of_the_context() -> None:
    assert [answer_tokens(asked, 4096) for asked in (None, 1, 100, 5000)] == [1024, 1, 100, 1024]
    assert answer_tokens(None, 3) == 1
