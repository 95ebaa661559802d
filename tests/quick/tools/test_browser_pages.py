"""Pages in the form that the model was trained on: lines, windows, links, matches; and HTML as text."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gptoss.tools.browser.documents import Document, decoded, page_of
from gptoss.tools.browser.errors import BrowserError
from gptoss.tools.browser.html_text import CUT, MAX_TEXT, html_to_text
from gptoss.tools.browser.page import MAX_MATCHES, Page, SearchResult, find_page, search_page, text_page
from gptoss.tools.browser.text import WIDTH, clean, on_one_line, without_links, wrapped
from gptoss.tools.browser.view import VIEW_TOKENS, show_page
from tests.support.tiers import sized
from tests.support.vocabulary import public_vocabulary

URL = "https://example.com/docs/page.html"
TEXTS = st.text(
    st.one_of(
        st.sampled_from(" \n\t-a【】†0L:*"), st.characters(codec="utf-8"), st.sampled_from("日本語🙂é\u200b\0\x0b")
    ),
    max_size=400,
)
SLOWLY = settings(
    deadline=None,
    max_examples=sized(40, 2_000),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def count_tokens(text: str) -> int:
    return len(public_vocabulary().encode(text))


def shown(page: Page, first: int = 0, num_lines: int | None = None, cursor: int = 0) -> str:
    return show_page(page, cursor, first, num_lines, count_tokens)


def viewed(text: str) -> tuple[int, int, int]:
    """First and last line that are shown, and the last of the page."""
    found = re.search(r"^\*\*viewing lines \[(\d+) - (\d+)\] of (\d+)\*\*\n\n", text, re.MULTILINE)
    assert found is not None, text
    return int(found[1]), int(found[2]), int(found[3])


def html(body: str, head: str = "") -> str:
    return f"<html><head>{head}</head><body>{body}</body></html>"


def test_a_page_is_shown_as_the_model_was_trained_to_read_it() -> None:
    page = text_page(URL, "A title", "First line.\n\n" + "word " * 20)
    assert shown(page, cursor=3) == (
        "[3] A title (https://example.com/docs/page.html)\n"
        "**viewing lines [0 - 5] of 5**\n"
        "\n"
        "L0: \n"
        "L1: URL: https://example.com/docs/page.html\n"
        "L2: First line.\n"
        "L3: \n"
        "L4: " + "word " * 16 + "\n"
        "L5: " + "word " * 4
    )


def test_a_list_of_results_has_a_link_each_with_its_domain() -> None:
    results = [SearchResult("One†", "https://a.org/x", "about\n one"), SearchResult("", "https://b.org:81/y")]
    page = search_page("what 【is】 it", results)
    assert shown(page) == (
        "[0] what 〖is〗 it\n**viewing lines [0 - 5] of 5**\n\nL0: \nL1: URL: \nL2: # Search results\nL3: \n"
        "L4:   * 【0†One‡†a.org】 about one\nL5:   * 【1†https://b.org:81/y†b.org:81】"
    )
    assert [link.url for link in page.links] == ["https://a.org/x", "https://b.org:81/y"]
    assert page.source(4) == SearchResult("", "https://a.org/x", "One‡ about one")
    assert page.source(5) == SearchResult("", "https://b.org:81/y", "https://b.org:81/y")
    assert page.source(2) is page.source(9) is None


def test_a_window_ends_before_the_line_with_which_it_would_be_too_large() -> None:
    page = text_page(URL, "T", "\n".join(f"line {index} has some words in it" for index in range(500)))
    text = shown(page, 100)
    first, last, end = viewed(text)
    assert (first, end) == (100, 501) and 150 < last < 250
    assert count_tokens(text) <= VIEW_TOKENS < count_tokens(shown(page, 100, last - first + 2)) + 40
    assert viewed(shown(page, 490)) == (490, 501, 501)
    assert viewed(shown(page, 5, 3)) == (5, 7, 501)
    assert viewed(shown(page, 0, 400))[1] < 200  # more lines than fit were asked for
    for line in (502, -1):
        with pytest.raises(BrowserError, match="0 to 501"):
            shown(page, line)


@SLOWLY
@given(TEXTS, TEXTS, st.integers(0, 60), st.one_of(st.none(), st.integers(1, 50)), st.integers(0, 10**6))
@example("日" * 300, "🙂" * 4000, 0, None, 0)
@example("t", "\n" * 3000, 7, None, 12)
@example("\u0bf5" * 2000, "\U000e0041" * 3000, 0, None, 999_999)
def test_no_window_is_too_large_and_no_line_out_of_range(
    title: str, text: str, first: int, num_lines: int | None, cursor: int
) -> None:
    page = text_page(f"https://example.com/{title}", title, clean(text))
    last = len(page.lines) - 1
    if first > last:
        with pytest.raises(BrowserError):
            shown(page, first)
        return
    window = shown(page, first, num_lines, cursor)
    assert count_tokens(window) <= VIEW_TOKENS
    begin, end, total = viewed(window)
    assert begin == first <= end <= last == total
    assert num_lines is None or end - begin < num_lines
    body = window.split("\n\n", 1)[1].split("\n")
    assert [re.match(r"L(\d+): ", line)[1] for line in body] == [str(n) for n in range(begin, end + 1)]  # type: ignore[index]
    assert [line.split(": ", 1)[1] for line in body] == list(page.lines[begin : end + 1])


@SLOWLY
@given(TEXTS)
@example("a-" * 500)
@example("x" * 30_000)
def test_wrapping_keeps_every_character_and_says_where_a_line_begins(text: str) -> None:
    cleaned = clean(text)
    made = wrapped(cleaned)
    assert max(map(len, made.lines)) <= WIDTH and len(made.begins) == len(made.lines)
    joined = "".join(("\n" if begins else "") + line for line, begins in zip(made.lines, made.begins, strict=True))
    assert joined[1:] == "\n".join(line.expandtabs() for line in cleaned.split("\n"))
    for index in range(len(made.lines)):
        part = made.paragraph(index)
        assert index in part and made.begins[part.start] and sum(made.begins[n] for n in part) == 1


def test_clean_text_has_no_brackets_and_no_control_characters() -> None:
    assert clean("【3†x】\0\x1b[1m\r\n\u200b\ud800b\rc\td") == "〖3†x〗  [1m\n b\nc\td"
    assert on_one_line(" a\n b ", 100) == "a b" and on_one_line("abcdef" * 100, 10) == "abcdefa..."


def test_links_are_numbered_by_target_and_show_another_domain() -> None:
    made = html_to_text(
        html(
            "<p><a href='other.html'>Other †</a> and <a href='https://foo.org/a#b'>Foo</a>, <a href='/docs/other.html'>again"
            "</a> <a href='#top'>top</a> <a href='mailto:a@b.c'>mail</a> <a href='javascript:x()'>js</a> <a>none</a>"
            " <a href='http://[::1'>bad</a> <a href='ftp://x.org/y'>ftp</a> <a href='/i'><img alt='pic' src=x></a>"
            "<a href='https://www.arxiv.org/abs/1706.03762'>paper</a></p>"
        ),
        URL,
    )
    assert made.text == (
        "【0†Other ‡】 and 【1†Foo†foo.org】, 【0†again】 top mail js none bad ftp [Image 0: pic]【2†paper†ar5iv.org】"
    )
    assert made.links == [
        "https://example.com/docs/other.html",
        "https://foo.org/a",
        "https://ar5iv.org/abs/1706.03762",
    ]


def test_headings_lists_code_and_tables_keep_their_form() -> None:
    made = html_to_text(
        html(
            "<h2>Head <b>two</b></h2><p>a<br>b</p><ul><li>One<li><p>Two</p><ol><li>x<li>y</ol></ul><pre>def f():\n    pass\n\n\n"
            "\nx</pre><table><tr><th>A<th>B</tr><tr><td>1<td>2</td></table><blockquote>said</blockquote>e=mc<sup>2</sup>"
            " H<sub>2</sub>O",
            "<title> The\n title </title>",
        ),
        URL,
    )
    assert made.title == "The title"
    assert made.text == (
        "## Head two\n\na\nb\n\n  * One\n  * Two\n\n    1. x\n    2. y\n\ndef f():\n    pass\n\nx\n\nA | B\n1 | 2\n\n> said\n\n"
        "e=mc^{2} H_{2}O"
    )


def test_what_a_reader_does_not_see_is_left_out() -> None:
    made = html_to_text(
        html(
            "<style>x{}</style><p>seen<script>alert()</script><noscript>no</noscript></p><p hidden>h</p><!-- c -->"
            "<div style='color:red; Display : None'>d</div><svg><title>s</title><text>t</text></svg><math><mi>x</mi></math>"
            "<img title=T><img> 【9†fake†x】 &lt;|end|&gt;",
            "<title>t</title><script>1</script>",
        ),
        URL,
    )
    assert made.text == "seen\n\n[Image 0: T][Image 1] 〖9†fake†x〗 <|end|>"


def test_a_link_that_is_never_closed_loses_no_text() -> None:
    words = " ".join(f"w{number}" for number in range(2_000))
    page = page_of(Document(URL, html(f"<div><a href='/a'>{words}<p>after</p></div>").encode(), "text/html"))
    lines = without_links("\n".join(page.lines)).split("\n")
    assert "".join(line or "\n" for line in lines[2:]).split() == [*words.split(), "after"]
    assert page.lines[2].startswith("【0†w0 w1")


HOSTILE = {
    "nested": "<div>" * 300_000 + "deep",
    "closed": "<div>" * 100_000 + "</p>" * 100_000 + "x",
    "links": "<a href=x>y" * 40_000,
    "attributes": "<a " + " ".join(f"a{n}=1" for n in range(100_000)) + ">x</a>tail",
    "many attributes": ("<b " + "a " * 8_000 + ">x") * 60,
    "one word": "x" * 3_000_000,
    "hyphens": "a-" * 1_000_000,
    "lists": "<ul><li>" * 100_000,
    "brackets": "<" * 200_000,
    "entities": "&amp;" * 100_000,
    "empty": "",
    "comment": "<!--" * 100_000,
    "nothing": "\0\0\0",
    "sup": "<sup>" * 50_000 + "x",
    "tables": "<table><tr><td>" * 20_000 + "x",
    "lines": "<br>" * 200_000 + "end",
    "long link": f"<a href='https://e.org/{'x' * 100_000}'>text</a>",
    "style": f"<p style='{'display ' * 100_000}'>x",
}


@pytest.mark.timeout(60)  # some took minutes without the bounds
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_page_is_a_bounded_page(name: str) -> None:
    page = page_of(Document(URL, html(HOSTILE[name]).encode(), "text/html", "utf-8"))
    assert count_tokens(shown(page)) <= VIEW_TOKENS
    find_page(page, "x")
    assert sum(map(len, page.lines)) <= MAX_TEXT + 1_000
    if name in ("one word", "hyphens", "nested", "closed"):
        assert "".join(page.lines).endswith(CUT.strip())


@SLOWLY
@given(
    st.lists(st.sampled_from([*"<>/= '\"&;!-\n", "<a href=", "</a>", "<p", "<li>", "<pre>", "text", "\0", "<!--", "é"]))
)
def test_any_html_becomes_text(pieces: list[str]) -> None:
    page = page_of(Document(URL, "".join(pieces).encode(), "text/html"))
    ids = {int(number) for number in re.findall(r"【(\d+)†", "\n".join(page.lines))}
    assert ids <= set(range(len(page.links)))


@pytest.mark.parametrize(
    ("body", "charset", "expected"),
    [
        ("é".encode(), None, "é"),
        ("é".encode("cp1252"), None, "é"),
        ("é".encode("cp1252"), "ISO-8859-1", "é"),
        ("日本".encode("shift_jis"), "Shift_JIS", "日本"),
        ("日本".encode("euc_jp"), "'euc-jp'", "日本"),
        ("中".encode("gb18030"), "gb2312", "中"),
        (b"\xef\xbb\xbf" + "é".encode(), "latin-1", "é"),
        ("é".encode("utf-16"), "utf-8", "é"),
        ("é".encode(), "rot13", "é"),
        ("é".encode(), "no such", "é"),
        ("é".encode(), "idna", "é"),
        (b'<meta charset="windows-1251">' + "й".encode("cp1251"), None, '<meta charset="windows-1251">й'),
        (b"<meta http-equiv=x content='text/html; charset=utf-16'>\xc3\xa9", None, "<meta http-equiv=x content='text/html; charset=utf-16'>é"),
        (b"\xff\xff", "utf-8", "\ufffd\ufffd"),
    ],
)  # fmt: skip
def test_the_encoding_is_the_one_that_the_document_names(body: bytes, charset: str | None, expected: str) -> None:
    assert decoded(Document(URL, body, "text/html", charset)) == expected


@pytest.mark.parametrize("kind", ["application/pdf", "image/png", "application/octet-stream", "video/mp4"])
def test_a_document_that_is_not_text_is_an_error(kind: str) -> None:
    with pytest.raises(BrowserError, match=kind):
        page_of(Document(URL, b"%PDF-1.7 \0", kind))


def test_text_without_a_type_is_read_as_what_it_looks_like() -> None:
    assert page_of(Document(URL, b" <p>a<p>b", "")).lines[2:] == ("a", "", "b")
    assert page_of(Document(URL, b"a <p> b", "")).lines[2:] == ("a <p> b",)
    assert page_of(Document(URL, b'{"a": 1}', "application/ld+json")).lines[2:] == ('{"a": 1}',)
    with pytest.raises(BrowserError, match="cannot be shown"):
        page_of(Document(URL, b"a\0b", ""))


def test_the_source_of_a_page_is_its_html() -> None:
    page = page_of(Document(URL, "<p>a &amp; 【b】".encode(), "text/html"), shows_source=True)
    assert page.url == f"view-source:{URL}" and page.lines[2:] == ("<p>a &amp; 〖b〗",)


def test_markdown_keeps_its_form_and_has_links() -> None:
    body = b'# Guide\n\nSee [setup](setup.md) or [*that*](https://x.org/y "t"), not ![pic](p.png) or [here](#a).\n'
    page = page_of(Document("local:///docs/guide.md", body, "text/markdown"))
    assert page.title == "Guide"
    assert "".join(page.lines[4:]) == "See 【0†setup】 or 【1†*that*†x.org】, not ![pic](p.png) or [here](#a)."
    assert [link.url for link in page.links] == ["local:///docs/setup.md", "https://x.org/y"]


def test_matches_are_listed_with_their_lines_and_lead_there() -> None:
    text = "\n".join(["intro", *("filler" for _ in range(8)), "A Needle here", "next", "and", "more", "rest", "NEEDLE"])
    page = text_page(URL, "T", text)
    found = find_page(page, "needle")
    assert found.lines == (
        "# 【0†match at L11】", "A Needle here", "next", "and", "more", "", "# 【1†match at L16】", "NEEDLE",
    )  # fmt: skip
    assert [(link.url, link.line) for link in found.links] == [(URL, 11), (URL, 16)]
    assert found.kind == "find" and found.source(1) == SearchResult("T", URL, "A Needle here")


def test_a_match_may_go_on_in_the_next_line_and_inside_a_link() -> None:
    page = page_of(
        Document(
            URL,
            html(f"<p>{'x' * 70} <a href='/a'>Some long words</a> end</p><p>long</p><p>words</p>").encode(),
            "text/html",
        )
    )
    assert page.lines[2:4] == ("x" * 70 + " 【0†Some ", "long words】 end")
    assert [link.line for link in find_page(page, "Some LONG words end").links] == [2]
    assert find_page(page, "0†").links == [] and "No match" in find_page(page, "absent").lines[0]
    assert [link.line for link in find_page(page, "words").links] == [3, 7]


def test_matches_are_bounded() -> None:
    page = text_page(URL, "T", "\n".join("a" for _ in range(1000)))
    assert len(find_page(page, "a").links) == MAX_MATCHES
    assert find_page(page, "").links == []


@SLOWLY
@given(TEXTS, st.text(st.sampled_from("a -b\nL日"), max_size=5))
def test_a_match_is_where_its_line_says(text: str, pattern: str) -> None:
    page = text_page(URL, "T", clean(text).replace("†", "‡"))
    found = find_page(page, pattern)
    for link in found.links:
        assert link.line is not None
        part = page.text.paragraph(link.line)
        after = "".join(page.lines[n] for n in range(link.line, part.stop)).lower()
        assert clean(pattern).replace("\n", " ").lower() in after


def test_links_are_removed_wherever_they_are_wrapped() -> None:
    assert without_links("a 【1\n2†te\nxt†dom\nain】 b 【3†t】") == "a \nte\nxt\n b t"
