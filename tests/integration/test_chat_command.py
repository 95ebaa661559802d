"""`gptoss chat` in a pseudo-terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.instant_engine import served
from tests.support.terminal import Terminal, terminal
from tests.support.waiting import wait_until

ANSWER = "**Bold** and `code`:\n\n```python\nx = 1\n```\n\n1. one\n2. two"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(ANSWER) as url:
        yield url


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("GPTOSS_URL", "GPTOSS_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def ask(chat: Terminal, text: str, answer: str) -> None:
    chat.send(text + "\n")
    chat.expect(answer)
    chat.expect("> ")


def test_three_turns_with_commands(url: str, home: Path) -> None:
    file = home / "saved.json"
    with terminal("chat", "--url", url, "--system", "S") as chat:
        chat.expect("/help lists the commands")
        chat.expect("> ")
        ask(chat, "Hello", "2 two")
        assert "Hm.\n\nBold and code:" in chat.text and "\x1b[2mHm" in chat.seen and "**" not in chat.text
        assert "\x1b[1mBold" in chat.seen
        ask(chat, "/effort high", "effort high")
        ask(chat, "/effort most", "error: /effort takes low, medium, high; now it is high")
        ask(chat, "/profile latency_first", "profile latency_first")
        ask(chat, "/reasoning hide", "reasoning is hidden")
        ask(chat, "first line\\\nsecond line", "2 two")
        assert chat.text.count("Hm.") == 1 and "\x1b[2mthinking ..." in chat.seen
        ask(chat, '"""/a block\nof text"""', "2 two")
        ask(chat, "\x1b[200~pasted\nlines\x1b[201~", "2 two")
        ask(chat, "/nothing", "error: no command /nothing: /help lists them")
        ask(chat, f"/save {file}", "saved in ")
        ask(chat, "/clear", "a new conversation")
        ask(chat, "/retry", "error: there is no question yet")
        ask(chat, f"/load {file}", "8 messages with gpt-oss-nano")
        ask(chat, f"/load {home}", "error: cannot read ")
        ask(chat, "/retry", "2 two")
        ask(chat, "/he\t", "/quit")
        chat.send("\x04")
        assert chat.wait() == 0
    saved = json.loads(file.read_text())
    assert [m["content"] for m in saved["messages"]] == [
        *("Hello", ANSWER, "first line\nsecond line", ANSWER, "/a block\nof text", ANSWER, "pasted\nlines", ANSWER)
    ]
    assert (saved["system"], saved["effort"], saved["profile"]) == ("S", "high", "latency_first")
    assert saved["messages"][1]["reasoning"] == "Hm."
    history = home / "gpt-oss-server" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600 and "Hello\n" in history.read_text()
    other = home / "other.json"
    other.write_text("{}")
    with terminal("chat", "--url", url, "--load", str(file), "--no-history") as chat:
        ask(chat, f"/save {other}", f"error: {other} is not a saved conversation")
        chat.send("/quit\n")
        assert chat.wait() == 0
    assert other.read_text() == "{}"


def test_raw_mode_shows_harmony(url: str, home: Path) -> None:
    with terminal("chat", "--url", url, "--raw", "--system", "Be brief.") as chat:
        chat.expect("> ")
        ask(chat, "Hello", "2. two<|return|>")
        start = "<|start|>user<|message|>Hello<|end|><|start|>assistant"
        assert start + "<|channel|>analysis<|message|>Hm.<|end|>" in chat.text and "Be brief." in chat.text
        assert "\x1b[36m<|channel|>\x1b[0manalysis" in chat.seen
        ask(chat, "Again", "2. two<|return|>")
        assert chat.text.count("Be brief.") == 1, "the prompt's beginning is shown once"
        assert f"<|channel|>final<|message|>{ANSWER}<|end|><|start|>user<|message|>Again" in chat.text


def test_ctrl_c_ends_the_answer_and_not_the_program(home: Path) -> None:
    slow = served("a b c d e f g h i j k l m n o p q r s t u v w x y z" * 90, pause_s=0.02)
    with (
        slow as url,
        terminal("generate", "Count", "--url", url) as answer,
        terminal("chat", "--url", url, "--plain") as chat,
    ):
        answer.expect("a b c")
        answer.send("\x03")
        assert answer.wait() == 130 and "Traceback" not in answer.text
        chat.expect("> ")
        chat.send("half a question\x03")
        chat.expect("> ")
        for number, mode in enumerate(("off", "on"), 2):
            file = home / f"{mode}.json"
            ask(chat, "/clear", "a new conversation")
            ask(chat, f"/raw {mode}", f"raw mode is {mode}")
            chat.send("Count\n")
            chat.expect("a b c")
            chat.send("\x03")
            chat.expect("stopped")
            chat.expect("> ")
            wait_until(lambda n=number: httpx.get(f"{url}/stats").json()["requests"]["cancelled"] == n)  # type: ignore[misc]
            ask(chat, f"/save {file}", "saved in ")
            kept = json.loads(file.read_text())["messages"][1]["content"]
            assert kept.startswith("a b c") and len(kept) < 400, "what was written is kept"
        chat.send("\x04")
        assert chat.wait() == 0


def test_a_server_that_refuses_does_not_end_the_program(home: Path) -> None:
    with served("Hi.", requests_per_minute=1) as url, terminal("chat", "--url", url) as chat:
        chat.expect("> ")
        ask(chat, "Hello", "Hi.")
        ask(chat, "Hello", "error: 429 from ")
        ask(chat, "/retry", "error: 429 from ")
        chat.send("\x04")
        assert chat.wait() == 0
