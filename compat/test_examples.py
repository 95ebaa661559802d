"""The examples that need packages of others, against a running server of nano.

TEST_SERVER_URL=http://127.0.0.1:8000 pytest compat/test_examples.py
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
URL = os.environ.get("TEST_SERVER_URL", "http://127.0.0.1:8000")


def run(*command: str, cwd: Path = EXAMPLES) -> dict[str, str]:
    """-> what an example printed, by the word before the colon."""
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | {"GPTOSS_URL": URL}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = [line.partition(": ") for line in done.stdout.splitlines() if ": " in line]
    return {name: rest for name, _, rest in lines}


@pytest.mark.parametrize("name", ["anthropic_python.py", "langchain_chat.py"])
def test_python(name: str) -> None:
    shown = run(sys.executable, name)
    assert "42" in shown["answer"] and "42" in shown["stream"]
    assert shown["call"].startswith("get_weather")


def test_node() -> None:
    folder = Path(__file__).resolve().parents[1] / ".venv-node"
    (folder / "openai_node.mjs").write_text((EXAMPLES / "openai_node.mjs").read_text())
    shown = run("node", "openai_node.mjs", cwd=folder)
    assert "42" in shown["answer"] and "42" in shown["stream"]
    assert shown["call"].startswith("get_weather")


def test_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradio_client import Client

    monkeypatch.setenv("GPTOSS_URL", URL)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import gradio_chat

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _, local_url, _ = gradio_chat.chat.launch(prevent_thread_lock=True, server_port=port, quiet=True)
    try:
        client = Client(local_url, verbose=False)
        assert "42" in str(client.predict("What is 12 + 30?", api_name="/chat"))
        history = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
        ]
        assert "42" in list(gradio_chat.answer("What is 12 + 30?", history))[-1]
    finally:
        gradio_chat.chat.close()
