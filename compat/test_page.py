"""The page at / in a real browser (Debian's chromium), against a server with an API key.

compat/run.sh page        # installs playwright into .venv-compat; chromium must be on PATH
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.server_process import ServerProcess, running_server  # noqa: E402

KEY = "key-for-the-page"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server("--cpu-kv-cache-gib", "0.2", env={"GPTOSS_API_KEY": KEY}) as running:
        yield running


@pytest.fixture
def page(server: ServerProcess) -> Iterator[Page]:
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser_path, "chromium is not installed"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        problems: list[str] = []
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" and "401" not in m.text else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        hosts: set[str] = set()
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(server.url)
        yield page
        assert problems == []
        assert hosts == {server.url.removeprefix("http://")}, "nothing is asked of another host"
        browser.close()


def test_without_the_key_it_says_so(page: Page) -> None:
    expect(page.locator("#status")).to_contain_text("needs the API key")


def test_figures_and_chat(page: Page) -> None:
    page.fill("#key", KEY)
    page.locator("#key").blur()
    expect(page.locator("#status")).to_have_text("ok", timeout=10_000)
    expect(page.locator("#tags")).to_contain_text("gpt-oss-nano")
    assert page.locator(".tile").count() == 12
    page.select_option("#effort", "high")
    page.fill("#input", "What is 12 + 30?")
    page.click("#send")
    expect(page.locator("#send")).to_be_visible(timeout=60_000)
    answer = page.locator(".turn").last
    expect(answer.locator("details")).to_have_count(1)
    assert answer.locator("details").get_attribute("open") is None, "reasoning is folded away"
    expect(answer.locator(".text")).to_contain_text("42")
    answered = page.locator(".tile", has_text="Answered").locator("output")
    expect(answered).to_have_text("1", timeout=10_000)


def test_a_tool_call_is_shown_and_its_result_answered(page: Page) -> None:
    page.fill("#key", KEY)
    page.locator("#key").blur()
    page.select_option("#tool", "weather")
    page.fill("#input", "What is the weather in Oslo?")
    page.click("#send")
    expect(page.locator(".call")).to_contain_text('get_weather({"city": "Oslo"})', timeout=60_000)
    expect(page.locator(".turn").last.locator(".text")).to_contain_text("21", timeout=60_000)
    page.wait_for_timeout(5000)  # for the plots to have points
    page.screenshot(path=str(ROOT / "reports" / "page.png"))


def test_markup_in_an_answer_is_text(page: Page) -> None:
    page.fill("#key", KEY)
    page.locator("#key").blur()
    page.fill("#input", "<img src=x onerror=alert(1)>")
    page.click("#send")
    expect(page.locator("#send")).to_be_visible(timeout=60_000)
    assert page.locator("#log img").count() == 0
