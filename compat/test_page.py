"""The page at / in a real browser (Debian's chromium), against a server with an API key.

compat/run.sh page        # installs playwright and axe-core into .venv-compat; chromium must be on PATH
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.server_process import ServerProcess, running_server  # noqa: E402

KEY = "key-for-the-page"
CHAT = "**/v1/chat/completions"
LAPTOP, PHONE = {"width": 1366, "height": 768}, {"width": 390, "height": 844}
REFUSED = re.compile(r"Failed to load resource|status of 4\d\d|net::ERR")  # what a test makes fail on purpose
MARKDOWN = """# Title

**bold** [link](https://example.org/) [bad](javascript:alert(1)) ![pixel](https://example.org/pixel.png) <b>raw</b>

| format | bits |
|:--|--:|
| MXFP4 | 4.25 |

```python
print("copy me")
```

5. five
   - nested
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server("--cpu-kv-cache-gib", "0.2", env={"GPTOSS_API_KEY": KEY}) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "chromium is not installed"
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def options() -> dict[str, Any]:
    return {"viewport": LAPTOP}


@pytest.fixture
def bare(server: ServerProcess, browser: Browser, options: dict[str, Any]) -> Iterator[Page]:
    """The page as a new visitor gets it, without a key. Fails on errors in the console and on other hosts."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
    page = context.new_page()
    problems: list[str] = []
    hosts: set[str] = set()
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" and not REFUSED.search(m.text) else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.goto(server.url)
    yield page
    page.unroute_all(behavior="ignoreErrors")
    assert problems == []
    assert hosts == {server.url.removeprefix("http://")}, "the page asked another host"
    context.close()


@pytest.fixture
def page(bare: Page) -> Page:
    """The page with the key, ready."""
    enter_key(bare, KEY)
    expect(bare.locator("#status")).to_have_text("Ready", timeout=10_000)
    expect(bare.locator(".example").first).to_be_visible()
    return bare


def enter_key(page: Page, key: str) -> None:
    expect(page.locator("#key-dialog")).to_be_visible(timeout=10_000)
    page.fill("#key", key)
    page.press("#key", "Enter")


def wait_answer(page: Page) -> Any:
    expect(page.locator("#send")).to_be_visible(timeout=60_000)
    return page.locator(".turn").last


def ask(page: Page, text: str) -> Any:
    page.fill("#input", text)
    page.press("#input", "Enter")
    return wait_answer(page)


def chunk(delta: dict[str, Any]) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]})}\n\n"


def answer_with(page: Page, text: str, end: str = "data: [DONE]\n\n") -> None:
    """Answers the next requests with `text`, in pieces of seven characters."""
    body = "".join(chunk({"content": text[i : i + 7]}) for i in range(0, len(text), 7)) + end
    headers = {"content-type": "text/event-stream"}
    page.route(CHAT, lambda route: route.fulfill(headers=headers, body=body))


def violations(page: Page) -> list[str]:
    result = Axe().run(page)
    return [f"{v['id']}: {[n['target'] for n in v['nodes']]}" for v in result.response["violations"]]


# --- key ---


def test_the_page_asks_for_the_key(bare: Page) -> None:
    expect(bare.locator("#key-text")).to_have_text("This server requires an API key.", timeout=10_000)
    expect(bare.locator("#status")).to_have_text("API key required")
    enter_key(bare, "wrong")
    expect(bare.locator("#key-text")).to_have_text("The server did not accept the key.", timeout=10_000)
    bare.press("#key", "Escape")
    bare.wait_for_timeout(2500)
    expect(bare.locator("#key-dialog")).to_be_hidden()
    note = ask(bare, "Hello").locator(".note")
    expect(note).to_contain_text("The server did not accept the API key.")
    enter_key(bare, KEY)
    expect(bare.locator("#status")).to_have_text("Ready", timeout=10_000)
    bare.click("#retry")
    expect(wait_answer(bare).locator(".answer")).not_to_be_empty()


# --- chat ---

EXAMPLES = {
    "What can you do?": "small sums",
    "What is 47 - 18?": "29",
    "Count down from 10 to 1.": "10, 9, 8, 7, 6, 5, 4, 3, 2, 1",
    "Reverse the word planet.": "tenalp",
    "List five animals.": "\n",
    "What is the weather in Oslo?": "21",
}


def test_the_embedded_model_can_do_every_example(page: Page) -> None:
    assert page.locator(".example span").all_inner_texts() == list(EXAMPLES)
    for i, (prompt, expected) in enumerate(EXAMPLES.items()):
        if i:
            page.click("#new")
        page.locator(".example", has_text=prompt).click()
        last = wait_answer(page)
        assert expected in last.locator(".answer").inner_text(), prompt
    assert page.locator("#conversations .open").all_inner_texts() == list(reversed(EXAMPLES))


def test_reasoning_is_folded_away(page: Page) -> None:
    page.select_option("#effort", "high")
    last = ask(page, "What is 12 + 30?")
    expect(last.locator(".answer")).to_contain_text("42")
    expect(last.locator("details")).to_have_count(1)
    assert last.locator("details").get_attribute("open") is None
    last.locator("summary").click()
    expect(last.locator("details div")).to_be_visible()
    expect(last.locator(".meta")).to_contain_text(re.compile(r"\d+ tokens · first after \d+ ms · \d+ tokens/s"))


def test_a_tool_call_is_shown_and_its_result_answered(page: Page) -> None:
    page.select_option("#tool", "get_weather")
    last = ask(page, "What is the weather in Oslo?")
    expect(page.locator(".call")).to_contain_text('get_weather({"city": "Oslo"})')
    expect(last.locator(".answer")).to_contain_text("21")


def test_markup_in_a_message_is_text(page: Page) -> None:
    ask(page, "<img src=x onerror=alert(1)>")
    assert page.locator("#log img").count() == 0
    assert page.locator(".bubble").inner_text() == "<img src=x onerror=alert(1)>"


def test_markdown(page: Page) -> None:
    answer_with(page, MARKDOWN)
    answer = ask(page, "Show me").locator(".answer")
    expect(answer.locator("h3")).to_have_text("Title")
    expect(answer.locator("strong")).to_have_text("bold")
    links = answer.locator("a")
    assert [link.get_attribute("href") for link in links.all()] == ["https://example.org/"]
    assert links.first.get_attribute("rel") == "noopener noreferrer"
    assert answer.locator("img, script, b").count() == 0
    expect(answer).to_contain_text("<b>raw</b>")
    assert answer.locator("td").all_inner_texts() == ["MXFP4", "4.25"]
    assert answer.locator("td").last.evaluate("cell => getComputedStyle(cell).textAlign") == "right"
    assert answer.locator("ol").get_attribute("start") == "5"
    answer.locator(".code button").click()
    expect(answer.locator(".code button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == 'print("copy me")'
    page.locator(".assistant > .actions button", has_text="Copy").click()
    page.wait_for_timeout(100)
    assert page.evaluate("navigator.clipboard.readText()") == MARKDOWN


HOSTILE = (
    "<script>alert(1)</script>",
    "<svg onload=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "<a href='javascript:alert(1)' style='position:fixed'>x</a>",
    "![x](x 'a\" onerror=alert(1)')",
    "```<script>\nalert(1)\n```",
    "<form action=//evil><input name=key></form>",
    "| <img src=x onerror=alert(1)> |\n|--|\n| <iframe src=//evil></iframe> |",
)


def test_hostile_markdown_makes_only_harmless_elements(page: Page) -> None:
    made = page.evaluate(
        """async (texts) => {
            const { MarkdownView } = await import("./page/markdown.js");
            return texts.map((text) => {
                const root = document.createElement("div");
                new MarkdownView(root).update(text);
                const all = [...root.querySelectorAll("*")];
                return {
                    names: all.map((e) => e.localName),
                    attributes: all.flatMap((e) => [...e.attributes].map((a) => a.name)),
                    links: all.filter((e) => e.href).map((e) => e.getAttribute("href")),
                };
            });
        }""",
        list(HOSTILE),
    )
    for text, found in zip(HOSTILE, made, strict=True):
        assert not {"script", "img", "iframe", "form", "input", "style"} & set(found["names"]), text
        assert not [name for name in found["attributes"] if name.startswith("on") or name in ("style", "id", "name")], (
            text
        )
        assert not [link for link in found["links"] if not re.match(r"https?:|mailto:|#i-", link)], text


def test_unchanged_blocks_keep_their_elements(page: Page) -> None:
    kept = page.evaluate(
        """async () => {
            const { MarkdownView } = await import("./page/markdown.js");
            const view = new MarkdownView(document.createElement("div"));
            view.update("first\\n\\nsec");
            const [first, second] = view.root.children;
            view.update("first\\n\\nsecond\\n\\nthird");
            return [view.root.children[0] === first, view.root.children[1] === second, view.root.textContent];
        }"""
    )
    assert kept[:2] == [True, False]
    assert kept[2].split() == ["first", "second", "third"]


def wait_idle(server: ServerProcess) -> None:
    """Waits until the engine runs nothing: stopping has reached it."""
    deadline = time.monotonic() + 10
    while httpx.get(f"{server.url}/stats", headers={"authorization": f"Bearer {KEY}"}).json()["engine"]["num_running"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def endless(route: Route) -> None:
    body = {**route.request.post_data_json, "max_tokens": 7000, "ignore_eos": True}
    route.continue_(post_data=json.dumps(body))


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop(page: Page, server: ServerProcess, how: str) -> None:
    page.route(CHAT, endless)
    page.fill("#input", "Count from 1 to 10.")
    page.press("#input", "Enter")
    expect(page.locator(".turn").last.locator(".answer")).to_contain_text("4", timeout=30_000)
    if how == "button":
        page.click("#stop")
    else:
        page.press("#input", "Escape")
    last = wait_answer(page)
    expect(last.locator(".note")).to_have_text("Stopped.")
    wait_idle(server)
    page.unroute(CHAT)
    expect(ask(page, "What is 12 + 30?").locator(".answer")).to_contain_text("42")


def test_an_answer_goes_on_while_another_conversation_is_open(page: Page) -> None:
    page.route(CHAT, endless)
    page.fill("#input", "Count from 1 to 10.")
    page.press("#input", "Enter")
    expect(page.locator(".turn").last.locator(".answer")).to_contain_text("4", timeout=30_000)
    page.click("#new")
    page.unroute(CHAT)
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#conversations .busy")).to_have_count(1)
    expect(ask(page, "What is 12 + 30?").locator(".answer")).to_contain_text("42")
    page.click("#conversations .open >> text=Count from")
    expect(page.locator("#stop")).to_be_visible()
    page.click("#stop")
    expect(wait_answer(page).locator(".note")).to_have_text("Stopped.")


# --- conversations ---


def test_conversations_survive_a_reload_and_can_be_renamed_and_deleted(page: Page) -> None:
    ask(page, "My name is Ada. Please remember it.")
    page.reload()
    expect(page.locator(".bubble")).to_have_text("My name is Ada. Please remember it.")
    expect(page.locator("#status")).to_have_text("Ready", timeout=10_000)
    expect(ask(page, "What is my name?").locator(".answer")).to_contain_text("Ada")
    page.hover("#conversations li")
    page.click("#conversations button[title^=Rename]")
    page.keyboard.type("About Ada")
    page.keyboard.press("Enter")
    expect(page.locator("#conversations .open")).to_have_text("About Ada")
    page.click("#new")
    ask(page, "What is 12 + 30?")
    assert page.locator("#conversations .open").all_inner_texts() == ["What is 12 + 30?", "About Ada"]
    page.click("#conversations button[title='Delete What is 12 + 30?']")
    page.click("#delete-dialog [data-close]")
    expect(page.locator("#conversations .open")).to_have_count(2)
    page.click("#conversations button[title='Delete What is 12 + 30?']")
    page.click("#delete-dialog .danger")
    expect(page.locator("#conversations .open")).to_have_text(["About Ada"])
    page.reload()
    expect(page.locator("#conversations .open")).to_have_text(["About Ada"])


def test_closing_the_page_keeps_what_was_answered(page: Page) -> None:
    page.route(CHAT, endless)
    page.fill("#input", "Count from 1 to 10.")
    page.press("#input", "Enter")
    expect(page.locator(".turn").last.locator(".answer")).to_contain_text("4", timeout=30_000)
    page.reload()
    expect(page.locator(".turn").last.locator(".answer")).to_contain_text("4")
    expect(page.locator(".turn").last.locator(".note")).to_contain_text("page was closed")


def test_full_storage_is_reported(page: Page) -> None:
    page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    )
    ask(page, "What is 12 + 30?")
    expect(page.locator("#storage")).to_contain_text("full or blocked")


# --- errors ---

ERRORS = (
    (429, {"message": "The queue is full.", "code": "rate_limit_exceeded"}, "The server is busy. Try again in 7 s."),
    (
        429,
        {"message": "Limit of 3 requests per minute reached."},
        "The limit of this API key is reached. Try again in 7 s.",
    ),
    (503, {"message": "engine is dead", "code": "engine_dead"}, "The model's engine has failed."),
    (503, {"message": "engine is loading", "code": "overloaded"}, "The model is not available yet. Try again in 7 s."),
    (503, {"message": "The server is shutting down.", "code": "draining"}, "The server is shutting down."),
    (500, {"message": "The server had an error."}, "The server had an internal error. Its log has the details."),
    (400, {"message": "The context is 8192 tokens."}, "The context is 8192 tokens."),
    (502, {}, "The server or a proxy before it answered with status 502."),
)


def fulfil(answer: dict[str, Any], route: Route) -> None:
    route.fulfill(**answer)


def test_errors_are_reported_in_plain_words(page: Page) -> None:
    for status, error, expected in ERRORS:
        page.unroute_all()
        body = json.dumps({"error": error}) if error else "<html>"
        answer = {"status": status, "body": body, "headers": {"retry-after": "7"}}
        page.route(CHAT, functools.partial(fulfil, answer))
        expect(ask(page, "Hi").locator(".note")).to_contain_text(expected)
        if error:
            expect(page.locator(".note").last).to_contain_text(error["message"])


def test_lost_connections(page: Page) -> None:
    page.route(CHAT, lambda route: route.abort())
    expect(ask(page, "Hi").locator(".note")).to_contain_text("No connection to the server.")
    page.unroute_all()
    answer_with(page, "Half an answer", end="")
    last = ask(page, "Hi")
    expect(last.locator(".answer")).to_have_text("Half an answer")
    expect(last.locator(".note")).to_have_text("The connection was lost before the answer was complete.")
    page.unroute_all()
    answer_with(page, "Half", end=f"data: {json.dumps({'error': {'message': 'exit code -9', 'code': None}})}\n\n")
    expect(ask(page, "Hi").locator(".note")).to_contain_text("engine failed before the answer was complete")
    page.route("**/health", lambda route: route.abort())
    expect(page.locator("#status")).to_have_text("No connection", timeout=10_000)


# --- figures ---


def test_plots_have_axes_values_and_a_cursor(page: Page) -> None:
    ask(page, "What is 12 + 30?")
    page.wait_for_timeout(2500)
    assert page.locator(".plot .title").all_inner_texts() == [
        "Output tokens/s", "Prompts tokens/s", "Requests", "First token",
        "Between tokens", "Whole answer", "KV cache in use", "Cache hits",
    ]  # fmt: skip
    canvas = page.locator(".canvas").first
    assert re.fullmatch(r"Output now: \d+ tokens/s", canvas.get_attribute("aria-label") or "")
    assert re.search(r"Answered\s*[1-9]", page.locator("#totals").inner_text())
    box = page.locator(".plot .u-over").first.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 20)
    expect(page.locator("#moment")).to_contain_text(re.compile(r"at \d\d:\d\d:\d\d"))
    page.mouse.move(5, 5)
    expect(page.locator("#moment")).to_have_text("")
    canvas.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#moment")).to_contain_text("at ")
    assert "at " in (page.locator(".canvas").last.get_attribute("aria-label") or ""), "all plots follow"


@pytest.mark.parametrize("options", [{"viewport": PHONE, "has_touch": True, "is_mobile": True}])
def test_a_tap_moves_the_cursor(page: Page) -> None:
    page.click("#tabs [data-view=figures]")
    page.wait_for_timeout(2500)
    box = page.locator(".plot .u-over").first.bounding_box()
    assert box
    page.touchscreen.tap(box["x"] + box["width"] - 3, box["y"] + 20)
    page.wait_for_timeout(1500)
    assert "at " in (page.locator(".canvas").last.get_attribute("aria-label") or "")


def test_a_reload_keeps_the_plots(page: Page) -> None:
    page.wait_for_timeout(3000)
    stored = "JSON.parse(sessionStorage.figures).times.length"
    page.reload()
    before = page.evaluate(stored)
    expect(page.locator("#status")).to_have_text("Ready", timeout=10_000)
    page.wait_for_timeout(2000)
    page.reload()
    assert before >= 3 and page.evaluate(stored) > before


@pytest.mark.parametrize("options", [{"viewport": LAPTOP}, {"viewport": PHONE}])
def test_the_figures_fill_the_screen(page: Page, options: dict[str, Any]) -> None:
    if options["viewport"] is PHONE:
        page.click("#tabs [data-view=figures]")
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight"), "the page itself does not scroll"
    bottom = page.locator(".plot").last.bounding_box()
    end = page.locator("#figures-view").bounding_box()
    assert bottom and end
    assert 0 <= end["y"] + end["height"] - bottom["y"] - bottom["height"] <= 16, "no scrolling, no empty space"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_gpus(page: Page) -> None:
    def with_gpus(route: Route) -> None:
        report = route.fetch().json()
        gpu = {"name": "GPU", "total_bytes": 80e9, "used_bytes": 40e9, "utilization": 0.5, "temperature_c": None}
        report["gpus"] = [{"index": i, **gpu} for i in range(8)]
        route.fulfill(json=report)

    page.route("**/stats", with_gpus)
    expect(page.locator(".plot")).to_have_count(10, timeout=10_000)
    expect(page.locator("#gpus tbody tr")).to_have_count(8)
    expect(page.locator("#gpus tbody tr").first).to_have_text("0 GPU40.0 / 80.0 GB50 %–")
    assert violations(page) == []


# --- access for everyone ---


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["laptop", "phone"])
def test_axe(server: ServerProcess, browser: Browser, scheme: Any, size: str) -> None:
    context = browser.new_context(viewport=LAPTOP if size == "laptop" else PHONE, color_scheme=scheme)
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#key-dialog")).to_be_visible(timeout=10_000)
    found = {"key": violations(page)}
    enter_key(page, KEY)
    expect(page.locator(".example").first).to_be_visible(timeout=10_000)
    found["examples"] = violations(page)
    page.select_option("#tool", "get_weather")
    ask(page, "What is the weather in Oslo?")
    answer_with(page, MARKDOWN)
    ask(page, "Show me")
    page.unroute(CHAT)
    page.route(CHAT, lambda route: route.abort())
    ask(page, "Hi")
    page.wait_for_timeout(3000)  # for the plots to have points
    found["chat"] = violations(page)
    page.screenshot(path=str(ROOT / "reports" / f"page-{size}-{scheme}.png"))
    if size == "phone":
        for view in ("list", "figures"):
            page.click(f"#tabs [data-view={view}]")
            found[view] = violations(page)
            page.screenshot(path=str(ROOT / "reports" / f"page-{size}-{scheme}-{view}.png"))
    context.close()
    assert found == {name: [] for name in found}


def test_everything_is_reached_by_keyboard(page: Page) -> None:
    page.locator("body").press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("What is 12 + 30?")
    page.keyboard.press("Enter")
    wait_answer(page)
    expect(page.locator("#input")).to_be_focused()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"new", "What is 12 + 30?", "retry", "effort", "window", "theme", "key-open"} <= reached


def test_the_theme_is_chosen_and_kept(page: Page) -> None:
    def background() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = background()
    page.click("#theme")
    page.click("#theme")
    expect(page.locator("#theme")).to_contain_text("Theme: dark")
    dark = background()
    assert dark != light
    page.reload()
    assert background() == dark


# --- behind a proxy ---


def test_behind_a_path_prefix(server: ServerProcess, browser: Browser) -> None:
    context = browser.new_context(viewport=LAPTOP)
    page = context.new_page()
    asked: list[str] = []

    def strip(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(response=route.fetch(url=route.request.url.replace("/models/gpt/", "/")))

    page.route("**/models/gpt/**", strip)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{server.url}/models/gpt/")
    enter_key(page, KEY)
    expect(page.locator("#status")).to_have_text("Ready", timeout=10_000)
    expect(ask(page, "What is 12 + 30?").locator(".answer")).to_contain_text("42")
    assert not [url for url in asked if "/models/gpt/" not in url]
    page.unroute_all(behavior="ignoreErrors")
    context.close()
