"""`--local`: commands that load the model themselves, in a pseudo-terminal and without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import psutil
import pytest

from tests.support.server_process import ROOT
from tests.support.terminal import terminal

QUESTION = "What is 12 + 30?"


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gptoss", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120)


def test_generate_answers_without_a_server() -> None:
    # a server's key would be asked for, if there were one
    done = run("generate", "--local", "--model", "nano", "--seed", "1", "--json", QUESTION, GPTOSS_API_KEY="k" * 20)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert "42" in answer["text"] and answer["usage"]["completion_tokens"] > 3


def test_chat_in_a_terminal_streams_and_leaves_no_process() -> None:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with terminal("chat", "--local", "--plain") as shown:
        shown.expect("> ")
        assert "gpt-oss-nano at this process" in shown.text
        shown.send(f"{QUESTION}\n")
        shown.expect("42")
        shown.send("/quit\n")
        assert shown.wait() == 0
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (("--local", "--model", "no-such-model"), "no-such-model"),
        (("--local", "--url", "http://127.0.0.1:1"), "--url and --local contradict each other"),
        (("--config", "x.yaml"), "--config has a meaning only with --local"),
        (("--local", "--config", "no-such.yaml"), "no-such.yaml"),
    ],
)
def test_what_cannot_be_loaded_is_said(arguments: tuple[str, ...], problem: str) -> None:
    done = run("generate", *arguments, QUESTION)
    assert done.returncode == 2 and problem in done.stderr and done.stderr.count("\n") == 1
