"""Codex, headless, against this API with an engine that follows a script.

    npm install --prefix /tmp/codex @openai/codex
    CODEX=/tmp/codex/node_modules/.bin/codex pytest compat/test_codex.py

Nothing but loopback is reached. Without CODEX the tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gptoss.engine.client.errors import EngineError, QueueFullError
from gptoss.engine.core.grammar_matcher import GuidedDecoding
from tests.support.instant_engine import served
from tests.support.script import Dies, Line, call, say, think
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tokenizer import public_tokenizer

COMMAND = os.environ.get("CODEX", "")
ROOT = Path(__file__).parent.parent
MODEL = "gpt-oss-nano"
CONFIG = """model = "{model}"
model_provider = "gptoss"
model_catalog_json = "{models}"
web_search = "disabled"
approval_policy = "never"
sandbox_mode = "danger-full-access"

[model_providers.gptoss]
name = "gptoss"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "GPTOSS_API_KEY"

[mcp_servers.notes]
command = "{python}"
args = ["{notes}"]
"""
READ = think("I read it.") + call("mcp__notes__read_note", '{"id":"7"}')
PATCH = """*** Begin Patch
*** Add File: todo.txt
+buy milk
*** Update File: old.txt
@@
-one
+two
 three
*** End Patch"""
CHANGE = think("I write it.") + f"<|channel|>commentary to=functions.apply_patch<|message|>{PATCH}<|call|>"
LIST = think("I look.") + call("exec_command", '{"cmd":"cat old.txt"}')
SAID = think("So.") + say("It is written.")
pytestmark = pytest.mark.skipif(not COMMAND, reason="CODEX does not name its command")


class Codex:
    """Its settings, the folder that it works in, and the server that it asks."""

    def __init__(self, folder: Path, engine: ScriptedEngine, url: str) -> None:
        self.engine, self.work, self.home = engine, folder / "work", folder / "home"
        self.work.mkdir()
        self.home.mkdir()
        models, notes = self.home / "models.json", ROOT / "compat/notes_server.py"
        models.write_text((ROOT / "deploy/codex/models.json").read_text().replace("gpt-oss-20b", MODEL))
        text = CONFIG.format(model=MODEL, models=models, url=url, python=sys.executable, notes=notes)
        (self.home / "config.toml").write_text(text)

    def run(self, prompt: str) -> list[dict[str, Any]]:
        """The items of its report."""
        done = subprocess.run(
            [COMMAND, "exec", "--skip-git-repo-check", "--json", prompt],
            env={
                "HOME": str(self.home),
                "CODEX_HOME": str(self.home),
                "PATH": os.environ["PATH"],
                "GPTOSS_API_KEY": "x",
            },
            cwd=self.work,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert done.returncode == 0 and events[-1]["type"] == "turn.completed", done.stdout + done.stderr
        return [event["item"] for event in events if event["type"] == "item.completed"]


@pytest.fixture
def codex(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Codex]:
    engine = ScriptedEngine(request.param)
    with served(engine=engine) as url:
        yield Codex(tmp_path, engine, url)


def script(*lines: Line) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("codex", [lines], indirect=True, ids=["script"])


def check_written(engine: ScriptedEngine, lines: Sequence[str]) -> None:
    """Each line is what its request's grammar allows, and the next prompt goes on from it, token by token."""
    guided = GuidedDecoding(public_tokenizer())
    for index, line in enumerate(lines):
        request, ids = engine.requests[index], engine.vocabulary.encode_with_special(line)
        guided.add(str(index), request.params.grammar or "")
        for token in ids:
            guided.advance(str(index), token)
        if index + 1 < len(lines):
            whole = [*request.token_ids, *ids]
            assert engine.requests[index + 1].token_ids[: len(whole)] == whole


@script(READ, CHANGE, LIST, SAID)
def test_it_calls_an_mcp_tool_and_applies_a_patch(codex: Codex) -> None:
    (codex.work / "old.txt").write_text("one\nthree\n")
    items = codex.run("Write down note 7")
    assert (codex.work / "todo.txt").read_text() == "buy milk\n"
    assert (codex.work / "old.txt").read_text() == "two\nthree\n"
    kinds = [item["type"] for item in items]
    assert [kind for kind in kinds if kind != "reasoning"] == [
        "mcp_tool_call",
        "file_change",
        "command_execution",
        "agent_message",
    ]
    assert items[-1]["text"] == "It is written."
    check_written(codex.engine, (READ, CHANGE, LIST, SAID))
    told = codex.engine.vocabulary.decode(codex.engine.requests[-1].token_ids)
    assert "note 7: buy milk" in told and "two\nthree\n" in told


@script(CHANGE, SAID)
def test_a_patch_that_does_not_apply_is_told_to_the_model(codex: Codex) -> None:
    items = codex.run("Change it")
    assert items[-1]["text"] == "It is written."
    told = codex.engine.vocabulary.decode(codex.engine.requests[-1].token_ids)
    assert "old.txt" in told.rpartition("functions.apply_patch to=assistant")[2]


@script(QueueFullError("full", 1.0), EngineError("not now"), Dies(think("Hm.")), SAID)
def test_what_is_retried(codex: Codex) -> None:
    assert codex.run("Hi")[-1]["text"] == "It is written."
    assert len(codex.engine.requests) >= 2


@script(SAID)
def test_without_tools_for_other_agents_the_prompt_is_shorter(codex: Codex) -> None:
    config = codex.home / "config.toml"
    config.write_text(config.read_text() + "\n[agents]\nenabled = false\n")
    assert codex.run("Hi")[-1]["text"] == "It is written."
    prompt = codex.engine.requests[0].token_ids
    assert "multi_agent" not in codex.engine.vocabulary.decode(prompt) and len(prompt) < 3500
