"""Standard streams of `gptoss` that are closed, full, or not text."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.server_process import ROOT


@pytest.mark.parametrize(
    ("redirections", "exit_code", "message"),
    [
        (">/dev/full", 1, "error: cannot write: No space left on device\n"),
        (">&-", 1, "error: cannot write: Bad file descriptor\n"),
        ("<&- >/dev/null", 0, ""),
        (">/dev/full 2>&-", 1, ""),
    ],
)
def test_streams_that_are_closed_or_full(redirections: str, exit_code: int, message: str) -> None:
    command = f'exec "$0" -m gptoss --help {redirections}'
    done = subprocess.run(["sh", "-c", command, sys.executable], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (exit_code, message)


@pytest.mark.parametrize(("redirections", "input_"), [("<&-", b""), ("", b"\xff\xfe")])
def test_a_prompt_that_cannot_be_read(redirections: str, input_: bytes) -> None:
    command = f'exec "$0" -m gptoss generate --url 127.0.0.1:9 {redirections}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable],
        cwd=ROOT,
        input=input_,
        capture_output=True,
        timeout=60,
        env={"LC_ALL": "C"},
    )
    expected = "standard input is not UTF-8 text" if input_ else "the prompt is empty"
    assert (done.returncode, done.stderr.decode()) == (2, f"error: {expected}\n")
