"""The browser of a configuration, and what is missing in one."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

import pytest
from openai_harmony import Conversation, Message, Role, SystemContent
from pydantic import ValidationError

from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig
from gptoss.harmony.render import system_message
from gptoss.tools.browser.build import make_browser
from gptoss.tools.browser.runner import browser_namespace
from tests.support.vocabulary import public_vocabulary


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ({"browser_backend": "folder", "browser_folder": Path("/nonexistent")}, {}, "/nonexistent is not a folder"),
        ({"browser_backend": "searxng", "browser_url": "localhost:8080"}, {}, "needs browser_url, the http"),
        ({"browser_backend": "exa"}, {"YDC_API_KEY": "x"}, "'exa' needs its key in EXA_API_KEY"),
        ({"browser_backend": "you"}, {"YDC_API_KEY": " "}, "'you' needs its key in YDC_API_KEY"),
    ],
)
def test_what_is_missing_is_named(settings: Any, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_browser(ServerConfig(**settings), len, environment)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"browser_backend": "folder"}, "needs browser_folder"),
        ({"browser_backend": "searxng"}, "needs browser_url"),
        ({"browser_backend": "bing"}, "browser_backend"),
        ({"browser_domains": ["https://example.com"]}, "is not a domain"),
        ({"allow_request_mcp_urls": True}, "needs request_mcp_hosts"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ServerConfig(**settings)


def test_without_a_backend_there_is_no_browser() -> None:
    assert make_browser(ServerConfig(), len) is None


@pytest.mark.parametrize(
    ("backend", "absent", "message"),
    [
        ("folder", "lxml", "requires lxml; .*pip install lxml$"),
        ("exa", "httpx2", "requires httpx2; .*pip install lxml httpx2 httpcore2$"),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: Any, absent: str, message: str
) -> None:
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == absent else find(name))
    with pytest.raises(ConfigError, match=message):
        make_browser(ServerConfig(browser_backend=backend, browser_folder=tmp_path), len, {"EXA_API_KEY": "k"})


@pytest.mark.parametrize("backend", ["folder", "searxng", "exa", "you"])
async def test_each_backend_is_made(tmp_path: Path, backend: Any) -> None:
    config = ServerConfig(
        browser_backend=backend,
        browser_folder=tmp_path,
        browser_url="http://127.0.0.1:8080",
        browser_domains=["example.com"],
        private_tool_networks=["10.0.0.0/8"],
    )
    browser = make_browser(config, len, {"EXA_API_KEY": "k", "YDC_API_KEY": "k"})
    assert browser is not None and browser.name == "browser"
    await browser.close()


def test_the_model_is_shown_the_browser_that_it_was_trained_with() -> None:
    encoding = public_vocabulary().encoding
    content = SystemContent.new().with_browser_tool().with_required_channels(["analysis", "commentary", "final"])
    ids = encoding.render_conversation(
        Conversation.from_messages([Message.from_role_and_content(Role.SYSTEM, content)])
    )
    theirs = encoding.decode(ids)
    shown = system_message("medium", has_tools=False, current_date=None, builtins=[browser_namespace()]).text
    begin = theirs.index("# Tools")
    end = theirs.index("# Valid channels")
    assert theirs[begin:end].strip() in shown
