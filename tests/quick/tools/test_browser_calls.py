"""The browser's calls over a folder of documents: what the model reads, and what the client sees of it."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.config.errors import ConfigError
from gptoss.generation.tool_types import SessionOptions, TextPart, ToolCall, ToolResult
from gptoss.tools.browser import folder as folders
from gptoss.tools.browser import session as sessions
from gptoss.tools.browser.arguments import read_call
from gptoss.tools.browser.backend import Scope, usable
from gptoss.tools.browser.errors import BrowserError
from gptoss.tools.browser.folder import FolderBackend
from gptoss.tools.browser.page import SearchResult, text_page
from gptoss.tools.browser.runner import BrowserRunner
from gptoss.tools.browser.session import BrowserSession
from tests.support.tiers import sized

Call = Callable[..., Awaitable[ToolResult]]
GUIDE = "# Guide\n\nHow to install the pump, see [parts](parts/list.html).\n\n" + "\n".join(
    f"Step {n}" for n in range(300)
)
PARTS = "<title>Parts</title><h1>Parts</h1><ul><li>Valve <a href='../guide.md'>guide</a><li>Pump: 12 bar</ul>"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "docs"
    (root / "parts").mkdir(parents=True)
    (root / "guide.md").write_text(GUIDE)
    (root / "parts" / "list.html").write_text(PARTS)
    (root / "notes.txt").write_text("The pump is loud.\nThe valve is not.\n")
    (root / "image.png").write_bytes(b"\x89PNG\0pump")
    (root / ".secret").write_text("pump password")
    (tmp_path / "outside.txt").write_text("pump outside")
    (root / "link.txt").symlink_to(tmp_path / "outside.txt")
    (root / "hidden-link.txt").symlink_to(root / ".secret")
    return root


@pytest.fixture
def runner(root: Path) -> BrowserRunner:
    return BrowserRunner(FolderBackend(root), lambda text: len(text) // 4 + 1)


@pytest.fixture
def session() -> BrowserSession:
    return BrowserSession()


@pytest.fixture
def call(runner: BrowserRunner, session: BrowserSession) -> Call:
    async def run(
        function: str, options: dict[str, Any] | None = None, /, text: str | None = None, **given: Any
    ) -> ToolResult:
        sent = json.dumps(given) if text is None else text
        return await runner.call(
            ToolCall(
                recipient=f"browser.{function}",
                text=sent,
                call_id="c",
                deadline=time.monotonic() + 9,
                max_bytes=2**20,
                options=options or {},
            ),
            session,
        )

    return run


def text_of(result: ToolResult) -> str:
    assert isinstance(result.content[0], TextPart)
    return result.content[0].text


async def test_search_open_find_and_scroll(call: Call) -> None:
    found = await call("search", query="pump bar")
    assert text_of(found).startswith("[0] pump bar\n**viewing lines [0 - ")
    assert found.extras["action"] == {"type": "search", "query": "pump bar", "queries": ["pump bar"]}
    urls = found.extras["sources"]
    assert urls[0] == "local:///parts/list.html" and set(urls[1:]) == {"local:///guide.md", "local:///notes.txt"}
    assert "【0†Parts】 * Pump: 12 bar" in text_of(found)

    opened = await call("open", id=0)
    assert text_of(opened).startswith("[1] Parts (local:///parts/list.html)\n")
    assert "  * Valve 【0†guide】" in text_of(opened)
    assert found.extras["results"][0] == {"url": urls[0], "title": "Parts"}
    action = {"type": "open_page", "url": "local:///parts/list.html"}
    assert opened.extras == {"action": action, "sources": [], "results": [], "title": "Parts"}

    guide = await call("open", id=0, cursor=1)
    assert text_of(guide).startswith("[2] Guide (local:///guide.md)\n**viewing lines [0 - ")
    scrolled = await call("open", loc=100, num_lines=2)
    assert (
        text_of(scrolled)
        == "[3] Guide (local:///guide.md)\n**viewing lines [100 - 101] of 305**\n\nL100: Step 94\nL101: Step 95"
    )

    matches = await call("find", pattern="STEP 29")
    assert text_of(matches).startswith("[4] Matches of `STEP 29` in Guide (local:///guide.md/find?pattern=STEP 29)\n")
    assert "L0: # 【0†match at L35】\nL1: Step 29\nL2: Step 30" in text_of(matches)
    assert matches.extras["action"] == {"type": "find_in_page", "url": "local:///guide.md", "pattern": "STEP 29"}
    there = await call("open", id=0)
    assert "\nL31: Step 25\n" in text_of(there) and text_of(there).startswith("[5] Guide")
    again = await call("open", cursor=0, id=2)
    assert text_of(again).startswith("[6] ")


async def test_a_page_is_opened_by_its_url_and_read_again(call: Call, root: Path) -> None:
    assert "loud" in text_of(await call("open", id="local:///notes.txt"))
    (root / "notes.txt").write_text("quiet now")
    assert "loud" in text_of(await call("open", cursor=0))
    assert "quiet now" in text_of(await call("open", id="local:///notes.txt"))
    assert "loud" in text_of(await call("open", cursor=0))


async def test_the_source_of_a_page_can_be_read(call: Call) -> None:
    await call("open", id="local:///parts/list.html")
    for shown in (
        await call("open", view_source=True),
        await call("open", id="view-source:local:///parts/list.html"),
        await call("open", id="local:///parts/list.html", view_source=True),
    ):
        assert "(view-source:local:///parts/list.html)" in text_of(shown)
        assert "<li>Valve <a href='../guide.md'>guide</a>" in text_of(shown).replace("\n", "").replace("L3: ", "")
        assert shown.extras["action"] == {"type": "open_page", "url": "local:///parts/list.html"}


@pytest.mark.parametrize(
    ("function", "given", "kind", "message"),
    [
        ("open", {}, "invalid", "No page is open"),
        ("find", {"pattern": "x"}, "invalid", "No page is open"),
        ("search", {}, "invalid", "`query` is missing"),
        ("search", {"query": " "}, "invalid", "`query` is missing"),
        ("find", {"pattern": None}, "invalid", "`pattern` is missing"),
        ("open", {"id": True}, "invalid", "`id` is not an integer"),
        ("open", {"loc": "x"}, "invalid", "`loc` is not an integer"),
        ("open", {"num_lines": 1.5}, "invalid", "`num_lines` is not an integer"),
        ("open", {"id": "local:///absent.md"}, "http", "There is no document"),
        ("open", {"id": "local:///../outside.txt"}, "http", "There is no document"),
        ("open", {"id": "local:///%2e%2e/outside.txt"}, "http", "There is no document"),
        ("open", {"id": "local:////etc/passwd"}, "http", "There is no document"),
        ("open", {"id": "local:///link.txt"}, "http", "There is no document"),
        ("open", {"id": "local:///hidden-link.txt"}, "http", "There is no document"),
        ("open", {"id": "local:///.secret"}, "http", "There is no document"),
        ("open", {"id": "local:///a%00b"}, "http", "There is no document"),
        ("open", {"id": "local:///" + "x/" * 900}, "http", "There is no document"),
        ("open", {"id": "local:///image.png"}, "execution", "cannot be shown"),
        ("open", {"id": "https://example.com"}, "execution", "Only documents below local:///"),
        ("open", {"id": "example.com:80/x"}, "execution", "Only documents below"),
        ("open", {"id": "file:///etc/passwd"}, "execution", "Only documents below"),
        ("open", {"id": "javascript:alert(1)"}, "invalid", "is not a URL that can be opened"),
        ("open", {"id": "http://[::1"}, "invalid", "is not a URL"),
        ("open", {"id": "https://e.org/" + "x" * 3000}, "invalid", "longer than"),
        ("click", {}, "invalid", "There is no function 'click'"),
    ],
)  # fmt: skip
async def test_what_cannot_be_answered_is_a_failure_that_the_model_reads(
    call: Call, session: BrowserSession, function: str, given: dict[str, Any], kind: str, message: str
) -> None:
    result = await call(function, **given)
    assert result.failure is not None and result.failure.kind == kind
    assert message in result.failure.message and text_of(result) == result.failure.message
    assert session.next_cursor == 0
    assert result.extras["action"]["type"] == {"find": "find_in_page", "open": "open_page"}.get(function, "search")


@pytest.mark.parametrize("text", ["{", "[1]", "null", '"x"', "[" * 100_000, '{"query": 1e999}'])
async def test_arguments_that_are_not_an_object_are_a_failure(call: Call, text: str) -> None:
    result = await call("search", text=text)
    assert result.failure is not None and result.failure.kind == "invalid"


async def test_cursors_and_links_out_of_range_are_failures(call: Call, session: BrowserSession) -> None:
    await call("search", query="pump")
    await call("open", id=0)
    for function, arguments, message in (
        ("open", {"cursor": 2}, "There is no cursor 2: the cursors of the open pages are 0 to 1."),
        ("open", {"id": 99, "cursor": 0}, "no link with the id 99"),
        ("open", {"loc": 10_000}, "`loc` is 10000, but the lines of this page are 0 to"),
        ("find", {"pattern": "x", "cursor": 0}, "not on a list of results"),
        ("open", {"cursor": 0, "view_source": True}, "has no source"),
    ):
        result = await call(function, **arguments)
        assert result.failure is not None and message in result.failure.message
    assert session.next_cursor == 2


def test_arguments_are_read_as_they_are_meant() -> None:
    assert read_call("open", '{"id": 3.0, "cursor": "1", "loc": -1, "source": "web"}') == read_call(
        "open", '{"id": "3", "cursor": 1}'
    )
    assert read_call("open", "") == read_call("open", '{"id": -1, "cursor": -1, "num_lines": -1, "view_source": false}')
    assert read_call("search", '{"query": 42, "topn": 3, "x": {}}') == read_call(
        "search", '{"query": "42", "top_n": "3"}'
    )


@settings(deadline=None, max_examples=sized(100, 3_000))
@given(
    st.sampled_from(["search", "open", "find", "x"]),
    st.dictionaries(
        st.sampled_from(["query", "id", "cursor", "loc", "num_lines", "pattern", "topn", "view_source"]),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(max_size=20),
            st.lists(st.integers(), max_size=1),
        ),
    ),
)
def test_any_arguments_are_read_or_refused(function: str, given: dict[str, Any]) -> None:
    try:
        read = read_call(function, json.dumps(given))
    except BrowserError as error:
        assert error.kind == "invalid" and error.message
    else:
        for name in ("line", "num_lines", "cursor"):
            assert (getattr(read, name, None) or 0) >= 0


async def test_only_allowed_domains_are_found_and_opened(root: Path, session: BrowserSession) -> None:
    runner = BrowserRunner(FolderBackend(root, "https://docs.example.com/v1"), len)
    options = {"allowed_domains": ("example.com",), "search_context_size": "low"}

    async def run(function: str, options: dict[str, Any], **given: Any) -> ToolResult:
        asked = ToolCall(
            recipient=f"browser.{function}",
            text=json.dumps(given),
            call_id="",
            deadline=0,
            max_bytes=1,
            options=options,
        )
        return await runner.call(asked, session)

    found = await run("search", options, query="pump")
    assert "https://docs.example.com/v1/guide.md" in str(found.extras["sources"])
    none = await run("search", {"allowed_domains": ("example.org",)}, query="pump")
    assert none.ok and none.extras["sources"] == [] and "found nothing" in text_of(none)
    refused = await run("open", {"allowed_domains": ("ample.com",)}, id="https://docs.example.com/v1/guide.md")
    assert refused.failure is not None and "outside the domains" in refused.failure.message
    assert (await run("open", options, id="https://docs.example.com/v1/guide.md")).ok


def test_a_scope_follows_the_fields_of_the_request() -> None:
    scope = Scope.of_options(
        {
            "allowed_domains": ("Example.com.", "b.org"),
            "search_context_size": "high",
            "user_location": {"country": "DE"},
        }
    )
    assert scope == Scope(20, ("example.com", "b.org"), "DE")
    assert Scope.of_options({}) == Scope(10, None, None)
    both = Scope.of_options({"allowed_domains": ("b.org",)}, ["a.b.org"])
    assert both.allows("https://x.a.b.org") and not both.allows("https://b.org")
    assert not Scope.of_options({}, ["a.org"]).allows("https://b.org")
    blocked = Scope.of_options({"blocked_domains": ("A.org",)})
    assert blocked.allows("https://b.org") and not blocked.allows("https://x.a.org/")
    assert (
        scope.allows("https://a.EXAMPLE.com./x")
        and scope.allows("http://b.org:81")
        and not scope.allows("https://xexample.com")
    )
    assert (
        not scope.allows("https://evil.org/example.com")
        and not scope.allows("http://[")
        and not scope.allows("local:///x")
    )
    assert Scope(10, ("arxiv.org",)).allows("https://ar5iv.org/abs/1")
    results = [
        SearchResult("", url)
        for url in ("https://b.org/1", "https://c.org", "https://b.org/1", "https://b.org/2", "https://b.org/3")
    ]
    assert [one.url for one in usable(results, Scope(2, ("b.org",)))] == ["https://b.org/1", "https://b.org/2"]


async def test_a_search_finds_files_that_have_changed(root: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "FRESH_S", 0.0)
    assert (await call("search", query="flux")).extras["sources"] == []
    (root / "new.txt").write_text("flux")
    (root / "guide.md").unlink()
    assert (await call("search", query="flux")).extras["sources"] == ["local:///new.txt"]
    assert "guide" not in text_of(await call("search", query="install step"))
    os.utime(root / "new.txt", ns=(1, 1))
    (root / "new.txt").write_text("other")
    assert (await call("search", query="flux")).extras["sources"] == []


async def test_rare_words_and_titles_count_more(root: Path, call: Call) -> None:
    (root / "a.txt").write_text("the the the the valve the " * 20)
    (root / "b.txt").write_text("the membrane")
    (root / "membrane.txt").write_text("the spare part")
    found = await call("search", query="the membrane")
    assert found.extras["sources"][:2] == ["local:///membrane.txt", "local:///b.txt"]


async def test_text_in_chinese_and_japanese_is_found_by_its_characters(root: Path, call: Call) -> None:
    (root / "c.md").write_text("# 東京\n\n東京は日本の首都です。")
    assert (await call("search", query="首都")).extras["sources"] == ["local:///c.md"]


def test_a_folder_that_is_not_there_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="browser_folder: .* is not a folder"):
        FolderBackend(tmp_path / "absent")


async def test_a_session_keeps_a_bounded_amount_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_CHARS", 20_000)
    session = BrowserSession()
    for number in range(6):
        session.push(text_page(f"https://e.org/{number}", f"T{number}", "x" * 6_000))
    with pytest.raises(BrowserError, match="cursor 0 is no longer kept: open https://e.org/0 again"):
        session.page(0)
    assert session.page(5).title == "T5" and session.page().title == "T5"
    assert session.opened("https://e.org/0") is None and session.opened("https://e.org/5") is not None
    cited = session.source(0, 3)
    assert cited is not None and cited.title == "T0"
    await session.close()
    with pytest.raises(BrowserError, match="No page"):
        session.page()


async def test_a_session_is_its_own(runner: BrowserRunner) -> None:
    one, other = [await runner.open(SessionOptions(tenant="t")) for _ in range(2)]
    assert one.id != other.id and one.is_alive and runner.name == "browser" and not runner.parallel
    assert [f"browser.{name}" for name in ("search", "open", "find")] == [*runner.namespace.recipients]
    await runner.close()


async def test_many_searches_index_the_folder_once(root: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = []
    scan = FolderBackend._scan
    monkeypatch.setattr(FolderBackend, "_scan", lambda self: (scans.append(1), scan(self))[1])
    results = await asyncio.gather(*(call("search", query="pump") for _ in range(5)))
    assert all(result.ok for result in results) and len(scans) == 1


async def test_a_search_that_is_cut_off_does_not_end_the_indexing(
    root: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, scans = threading.Event(), threading.Event(), []
    scan = FolderBackend._scan

    def slow(self: FolderBackend) -> Any:
        scans.append(1)
        begun.set()
        assert go_on.wait(20)
        return scan(self)

    monkeypatch.setattr(FolderBackend, "_scan", slow)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await call("search", query="pump")
    assert begun.is_set()
    go_on.set()
    assert (await call("search", query="pump")).extras["sources"] and len(scans) == 1
