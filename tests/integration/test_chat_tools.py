"""`gptoss chat --tools` in a pseudo-terminal: steps, approvals, patches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptoss.cli.main import main
from tests.support.instant_engine import served
from tests.support.mcp_server import mcp_over_http
from tests.support.script import call, call_builtin, say, think
from tests.support.scripted_engine import ScriptedEngine
from tests.support.terminal import Terminal, terminal

PATCH = (
    "<|channel|>commentary to=functions.apply_patch<|message|>*** Begin Patch\n*** Update File: old.py\n@@\n-a\n+b\n"
    "*** End Patch<|call|>"
)
ADD = call("calc__add", '{"a": 1, "b": 2}')


class Server:
    def __init__(self, engine: ScriptedEngine, url: str) -> None:
        self.engine, self.url = engine, url

    def says(self, *lines: Any) -> None:
        self.engine.lines.clear()
        self.engine.lines.extend(lines)
        self.engine.requests.clear()

    def prompt(self, number: int = -1) -> str:
        return self.engine.vocabulary.decode(self.engine.requests[number].token_ids)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pages = tmp_path_factory.mktemp("pages")
    (pages / "tea.md").write_text("# Tea\nGreen tea is brewed at 80 degrees.\n")
    engine = ScriptedEngine()
    with mcp_over_http() as mcp_url:
        settings: Any = {
            "mcp_servers": {"calc": {"url": mcp_url}},
            "browser_backend": "folder",
            "browser_folder": pages,
        }
        with served(engine=engine, **settings) as url:
            yield Server(engine, url)


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GPTOSS_URL", "GPTOSS_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def ask(chat: Terminal, text: str, *answers: str) -> None:
    chat.send(text + "\n")
    for answer in answers:
        chat.expect(answer)


def test_steps_are_shown_and_approval_is_asked(server: Server) -> None:
    with terminal("chat", "--url", server.url, "--tools", "mcp:calc,browser", "--no-history") as chat:
        chat.expect("> ")
        server.says(think("Hm.") + ADD, say("It is **3**."))
        ask(chat, "Add", '* calc.add {"a": 1, "b": 2}', "allow it? [y/N] ")
        ask(chat, "y", "* approved", "* calc.add", "3", "It is 3.", "> ")
        server.says(ADD, say("No sum."))
        ask(chat, "Again", "allow it? [y/N] ")
        ask(chat, "", "* declined", "No sum.", "> ")
        assert "It is **3**." in server.prompt() and "Add" in server.prompt()  # the conversation goes on
        server.says(call_builtin("browser.search", '{"query": "green tea"}'), say("80 degrees."))
        ask(chat, "Tea?", "* browser search green tea", "80 degrees.", "> ")
        ask(chat, "/tools off", "tools: none", "> ")
        server.says(say("Plain."))
        ask(chat, "Plain?", "Plain.", "> ")
        assert "80 degrees." in server.prompt()
        ask(chat, "/tools nothing", "error: no tool 'nothing': there are browser, python, apply_patch and mcp:LABEL")


@pytest.mark.parametrize("agreed", [True, False])
def test_a_patch_is_applied_after_approval(server: Server, tmp_path: Path, agreed: bool) -> None:
    (tmp_path / "old.py").write_text("a\n")
    with terminal(
        "chat", "--url", server.url, "--tools", "apply_patch", "--root", str(tmp_path), "--no-history"
    ) as chat:
        chat.expect("> ")
        server.says(PATCH, say("Done."))
        ask(chat, "Change it", "* update_file old.py", "-a", "+b", "allow it? [y/N] ")
        ask(chat, "y" if agreed else "n", "* applied" if agreed else "* not applied: The user declined", "Done.", "> ")
    assert (tmp_path / "old.py").read_text() == ("b\n" if agreed else "a\n")
    assert ("declined" in server.prompt()) == (not agreed)


def test_a_patch_that_does_not_fit_is_told_to_the_model(server: Server, tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text("other\n")
    arguments = ("chat", "--url", server.url, "--tools", "apply_patch", "--root", str(tmp_path), "--approve", "always")
    with terminal(*arguments, "--no-history") as chat:
        chat.expect("> ")
        server.says(PATCH, say("Sorry."))
        ask(chat, "Change it", "* not applied: ", "Sorry.", "> ")
    assert (tmp_path / "old.py").read_text() == "other\n" and "old.py" in server.prompt()


def test_without_a_terminal_nothing_is_approved(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("Add\n"))
    server.says(ADD, say("No."))
    assert main(["chat", "--url", server.url, "--tools", "mcp:calc"]) == 0
    shown = capsys.readouterr().out
    assert "* declined" in shown and "No." in shown


def test_wrong_options(capsys: pytest.CaptureFixture[str], server: Server) -> None:
    assert main(["chat", "--url", server.url, "--tools", "browser,nix"]) == 2
    assert "no tool 'nix'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["chat", "--url", server.url, "--tools", "browser", "--raw"])
