"""The examples that need no packages of others run, and show what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.server_process import ROOT, ServerProcess, running_server

EXAMPLES = ROOT / "examples"
IN_COMPAT = {"anthropic_python.py", "gradio_chat.py", "langchain_chat.py", "openai_node.mjs"}
HERE = {"batch.py", "curl.sh", "gptoss_client.py", "openai_python.py"}


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(
        "--model", "nano", "--cpu-kv-cache-gib", "0.2", "--batch-dir", str(tmp_path_factory.mktemp("batches"))
    ) as server:
        yield server


def run(server: ServerProcess, *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"GPTOSS_URL": server.url, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.nightly
def test_every_example_shows_what_it_says(nano: ServerProcess) -> None:
    def python(name: str) -> str:
        return run(nano, sys.executable, str(EXAMPLES / name))

    shown = python("openai_python.py")
    assert "answer: " in shown and "42" in shown and "parsed: result=" in shown
    assert "call: get_weather {'city': 'Oslo'}" in shown
    shown = python("gptoss_client.py")
    assert "health: ok" in shown and "42" in shown and "(gpt-oss-nano, profile latency_first)" in shown
    assert "('get_weather', '{" in shown and "7" in shown
    shown = python("batch.py")
    assert "completed" in shown and "sum-5" in shown and "10" in shown
    shown = run(nano, "bash", str(EXAMPLES / "curl.sh"))
    assert '"content"' in shown and "data: [DONE]" in shown and '\\"city\\"' in shown


def test_every_example_is_run_by_a_test() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".mjs")} == HERE | IN_COMPAT
    compat = (ROOT / "compat" / "test_examples.py").read_text()
    assert all(name.removesuffix(".py") in compat for name in IN_COMPAT)
