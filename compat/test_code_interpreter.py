"""The code interpreter through openai-agents and the AI SDK, with an engine that follows a script.

    AGENTS_PYTHON=.venv-agents/bin/python AI_SDK=.venv-node/ai pytest compat/test_code_interpreter.py

Without these variables, or without bubblewrap, the tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.instant_engine import served
from tests.support.sandbox import machine_sandbox
from tests.support.script import call_builtin, say, think
from tests.support.scripted_engine import ScriptedEngine

HERE = Path(__file__).parent
LINES = (think("I compute.") + call_builtin("python", "x = 41\nx + 1"), say("It is 42."))
AGAIN = (call_builtin("python", "x"), say("Still 41."))


def run(command: list[str], *lines: str) -> Any:
    """What a client prints that talks with an API whose engine writes these lines."""
    machine_sandbox()
    with served(engine=ScriptedEngine(lines), enable_python_tool=True) as url:
        done = subprocess.run([*command, url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif("AGENTS_PYTHON" not in os.environ, reason="AGENTS_PYTHON: a Python with openai-agents")
def test_openai_agents() -> None:
    shown = run([os.environ["AGENTS_PYTHON"], str(HERE / "agents_client.py")], *LINES, *AGAIN)
    assert shown["answers"] == ["It is 42.", "Still 41."]
    assert [call["status"] for call in shown["calls"]] == ["completed", "completed"]
    assert len({call["container"] for call in shown["calls"]}) == 1  # the state is kept
    assert "response.code_interpreter_call.interpreting" in shown["events"]
    assert shown["events"][-1] == "response.completed"


@pytest.mark.skipif("AI_SDK" not in os.environ, reason="AI_SDK: a folder with the AI SDK's packages")
def test_the_ai_sdk() -> None:
    script = Path(os.environ["AI_SDK"]) / "ai_sdk_client.mjs"  # where it finds the packages
    shutil.copy(HERE / "ai_sdk_client.mjs", script)
    shown = run(["node", str(script)], *LINES, *LINES)
    assert shown["answer"] == "It is 42."
    assert [call["code"] for call in shown["calls"]] == ["x = 41\nx + 1"]
    assert shown["results"] == [{"outputs": [{"type": "logs", "logs": "42\n"}]}]
    assert [part for part in shown["parts"] if part.startswith("tool")] == [
        *("tool-input-start", "tool-input-delta", "tool-input-end", "tool-call", "tool-result")
    ]
