"""Citations of an answer: the marks become links with their positions, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.generation.tool_types import Citation
from gptoss.tools.browser.citations import CitationFilter
from gptoss.tools.browser.page import SearchResult, find_page, search_page, text_page
from gptoss.tools.browser.session import BrowserSession
from tests.support.tiers import sized

PAGE = "https://example.com/a_(b)?q=1"
LINK = "([example.com](https://example.com/a_%28b%29?q=1))"


def session() -> BrowserSession:
    """Cursors: 0 results, 1 a page, 2 its matches, 3 a local document."""
    made = BrowserSession()
    made.push(
        search_page("q", [SearchResult("First", "https://one.org/x"), SearchResult("Second", "https://two.org/y")])
    )
    made.push(text_page(PAGE, "A page", "text"))
    made.push(find_page(made.page(), "text"))
    made.push(text_page("local:///guide.md", "The [guide]", "text"))
    return made


def rewritten(text: str, size: int | None = None) -> tuple[str, list[Citation]]:
    """The text that a client gets, sent in pieces of this size."""
    answer = session().answer_filter()
    shown, found = "", []
    for start in range(0, len(text), size or len(text) or 1):
        piece, citations = answer.feed(text[start : start + (size or len(text))])
        shown += piece
        found += citations
    piece, citations = answer.flush()
    return shown + piece, found + citations


@pytest.mark.parametrize(
    ("text", "shown", "urls"),
    [
        ("It is so【1†L9-L11】.", f"It is so {LINK}.", [PAGE]),
        ("It is so 【1†L9】 and so", f"It is so {LINK} and so", [PAGE]),
        ("So【1†L9】it", f"So {LINK} it", [PAGE]),
        ("【1†L1】【1†L4-L5】", f"{LINK} {LINK}", [PAGE, PAGE]),
        ("【1】 【1†source】 【1†L1†example.com】", f"{LINK} {LINK} {LINK}", [PAGE] * 3),
        ("【0†L4】", "([one.org](https://one.org/x))", ["https://one.org/x"]),
        ("【0†L5-L6】", "([two.org](https://two.org/y))", ["https://two.org/y"]),
        ("【2†L1】", LINK, [PAGE]),
        ("【3†L2】", "([The  guide](local:///guide.md))", ["local:///guide.md"]),
        ("【0†L0】 【9†L1】 【x】 【】 【1†L1", "【0†L0】 【9†L1】 【x】 【】 【1†L1", []),
        ("", "", []),
    ],
)
def test_a_mark_becomes_a_link_to_its_page(text: str, shown: str, urls: list[str]) -> None:
    made, citations = rewritten(text)
    assert made == shown
    assert [one.url for one in citations] == urls
    for one in citations:
        assert made[one.start : one.end].startswith("([") and made[one.start : one.end].endswith("))")


def test_a_citation_has_the_title_of_its_page() -> None:
    assert rewritten("x【1†L1】") == (
        f"x {LINK}",
        [Citation(2, 2 + len(LINK), PAGE, "A page", f"URL: {PAGE}", "【1†L1】", 1)],
    )
    assert [one.title for one in rewritten("【2†L1】【0†L4】【3†L0】")[1]] == ["A page", "one.org", "The [guide]"]


@settings(deadline=None, max_examples=sized(200, 5_000))
@given(
    st.lists(
        st.sampled_from(
            ["【1†L9-L11】", "【1†", "【", "】", "†", "L9", "1", "text ", ".", "【0†L4】", "é🙂", "【9†L1】"]
        )
    ).map("".join),
    st.integers(1, 7),
)
def test_pieces_of_any_size_give_the_same_text(text: str, size: int) -> None:
    whole, citations = rewritten(text)
    assert rewritten(text, size) == (whole, citations)
    starts = [one.start for one in citations]
    assert starts == sorted(starts) and all(whole[one.start] == "(" for one in citations)
    if not citations:
        assert whole == text


def test_only_what_may_become_a_mark_is_held_back() -> None:
    answer = CitationFilter(lambda cursor, line: None)
    assert answer.feed("a 【") == ("a ", [])
    assert answer.feed("12†L3-L") == ("", [])
    assert answer.feed("4】 b") == ("【12†L3-L4】 b", [])
    assert answer.feed("【word") == ("【word", [])
    assert answer.feed("【1†" + "x" * 500) == ("【1†" + "x" * 500, [])
    assert answer.feed("【1") == ("", []) and answer.flush() == ("【1", []) and answer.flush() == ("", [])
