"""Claude Code, headless, against this API with an engine that follows a script.

    npm install --ignore-scripts --prefix /tmp/claude @anthropic-ai/claude-code
    CLAUDE_CODE=/tmp/claude/node_modules/@anthropic-ai/claude-code-linux-x64/claude pytest compat/test_claude_code.py

Nothing but loopback is reached. Without CLAUDE_CODE the tests are skipped. With RECORD=FOLDER the bodies of its
requests are written there, for compat/anonymise.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptoss.api.messages import routes
from gptoss.engine.client.errors import EngineError, QueueFullError
from tests.support.instant_engine import served
from tests.support.script import Dies, Line, call, say, think
from tests.support.scripted_engine import ScriptedEngine

COMMAND = os.environ.get("CLAUDE_CODE", "")
MODEL = "gpt-oss-nano"
CONTEXT = 131_072
ECHO = think("I run it.") + call("Bash", '{ "command": "echo hi-from-the-shell"}')
SAID = think("So.") + say("The shell said hi.")
VARIABLES = {
    "ANTHROPIC_AUTH_TOKEN": "none",
    "ANTHROPIC_MODEL": MODEL,
    "ANTHROPIC_SMALL_FAST_MODEL": MODEL,
    "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(CONTEXT),
    "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(CONTEXT),
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
}
pytestmark = pytest.mark.skipif(not COMMAND, reason="CLAUDE_CODE does not name its binary")


class Run:
    """One headless run, and what the server saw of it."""

    def __init__(self, url: str, folder: Path, prompt: str, **variables: str) -> None:
        home = folder / "home"
        home.mkdir(exist_ok=True)
        started = time.monotonic()
        done = subprocess.run(
            [COMMAND, "-p", prompt, "--output-format", "json", "--allowedTools", "Bash"],
            env={"HOME": str(home), "PATH": os.environ["PATH"], "ANTHROPIC_BASE_URL": url, **VARIABLES, **variables},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        self.seconds = time.monotonic() - started
        assert done.stdout.strip(), done.stderr
        self.result: dict[str, Any] = json.loads(done.stdout)


@contextlib.contextmanager
def server(*lines: Line, max_model_len: int = CONTEXT) -> Iterator[tuple[ScriptedEngine, str]]:
    engine = ScriptedEngine(lines, max_model_len)
    with served(engine=engine) as url:
        yield engine, url


@pytest.fixture(autouse=True)
def bodies(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Those of the test's requests."""
    seen: list[dict[str, Any]] = []
    read = routes.read_body

    async def recorded(*args: Any) -> dict[str, Any]:
        body = await read(*args)
        seen.append(body)
        if "RECORD" in os.environ:
            Path(os.environ["RECORD"], f"{time.time_ns()}.json").write_text(json.dumps(body))
        return body

    monkeypatch.setattr(routes, "read_body", recorded)
    return seen


def test_an_answer(tmp_path: Path) -> None:
    with server(SAID) as (_, url):
        run = Run(url, tmp_path, "Hi")
    assert run.result["result"] == "The shell said hi." and not run.result["is_error"]
    assert run.result["modelUsage"][MODEL]["contextWindow"] == CONTEXT


def test_a_tool_loop_reuses_all_of_the_turn_before(tmp_path: Path, bodies: list[dict[str, Any]]) -> None:
    with server(ECHO, SAID) as (engine, url):
        run = Run(url, tmp_path, "Run echo hi-from-the-shell")
    assert run.result["result"] == "The shell said hi." and run.result["num_turns"] == 2
    one, two = engine.requests
    whole = one.token_ids + engine.vocabulary.encode_with_special(ECHO)
    assert two.token_ids[: len(whole)] == whole
    assert "hi-from-the-shell" in engine.vocabulary.decode(two.token_ids[len(whole) :])
    assert "x-anthropic-billing-header" not in engine.vocabulary.decode(one.token_ids)
    thought = bodies[-1]["messages"][-2]["content"][0]
    assert thought["type"] == "thinking" and thought["thinking"] == "" and thought["signature"]
    assert run.result["usage"]["cache_read_input_tokens"] >= len(one.token_ids) - 16


@pytest.mark.parametrize("line", [QueueFullError("full", 1.0), EngineError("not now"), Dies(think("Hm."))])
def test_what_is_retried(tmp_path: Path, line: Line) -> None:
    with server(line, SAID) as (_, url):
        run = Run(url, tmp_path, "Hi")
    assert run.result["result"] == "The shell said hi.", run.result
    assert run.seconds < 60


def test_too_large_an_answer_is_asked_for_again_with_less(tmp_path: Path, bodies: list[dict[str, Any]]) -> None:
    with server(SAID, max_model_len=30_000) as (_, url):
        run = Run(url, tmp_path, "Hi")
    assert run.result["result"] == "The shell said hi.", run.result
    assert bodies[0]["max_tokens"] == 32000 and bodies[-1]["max_tokens"] < 30_000


def test_too_long_a_prompt_ends(tmp_path: Path) -> None:
    with server(max_model_len=4096) as (_, url):
        run = Run(url, tmp_path, "Hi")
    assert run.result["terminal_reason"] == "prompt_too_long"


def test_the_context_is_counted(tmp_path: Path, bodies: list[dict[str, Any]]) -> None:
    with server() as (_, url):
        run = Run(url, tmp_path, "/context")
    assert not run.result["is_error"]
    assert len(bodies) > 3 and all("max_tokens" not in body for body in bodies)
