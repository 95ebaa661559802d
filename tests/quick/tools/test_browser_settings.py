"""The browser of a configuration, and what is missing in one."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

import pytest
from openai_harmony import Conversation, Message, Role, SystemContent

from gptoss.config.errors import ConfigError
from gptoss.harmony.render import system_message
from gptoss.tools.browser.build import BrowserSettings, build_browser
from gptoss.tools.browser.runner import browser_namespace
from tests.support.vocabulary import public_vocabulary


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ({"backend": "folder"}, {}, "needs browser_folder"),
        ({"backend": "folder", "folder": Path("/nonexistent")}, {}, "/nonexistent is not a folder"),
        ({"backend": "searxng"}, {}, "needs browser_url"),
        ({"backend": "searxng", "url": "localhost:8080"}, {}, "needs browser_url"),
        ({"backend": "exa"}, {"YDC_API_KEY": "x"}, "'exa' needs its key in EXA_API_KEY"),
        ({"backend": "you"}, {"YDC_API_KEY": " "}, "'you' needs its key in YDC_API_KEY"),
    ],
)
def test_what_is_missing_is_named(settings: Any, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_browser(BrowserSettings(**settings), len, environment)


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
        build_browser(BrowserSettings(backend=backend, folder=tmp_path), len, {"EXA_API_KEY": "k"})


async def test_each_backend_is_built(tmp_path: Path) -> None:
    environment = {"EXA_API_KEY": "k", "YDC_API_KEY": "k"}
    for more in (
        {"backend": "folder", "folder": tmp_path},
        {"backend": "searxng", "url": "http://127.0.0.1:8080"},
        {"backend": "exa"},
        {"backend": "you"},
    ):
        settings: dict[str, Any] = {"domains": ["example.com"], "private_networks": ["10.0.0.0/8"], **more}
        await build_browser(BrowserSettings(**settings), len, environment).close()


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
