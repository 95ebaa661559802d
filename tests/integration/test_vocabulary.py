"""The vocabulary in a process of its own, which no network can be reached from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.vocabulary import tokenizer_folder

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = """
import socket, sys
def refuse(*a, **k): raise AssertionError("network used")
socket.socket.connect = refuse; socket.create_connection = refuse; socket.getaddrinfo = refuse
from pathlib import Path
from gptoss.harmony.vocabulary_files import load_vocabulary
checkpoint = Path(sys.argv[2]) if len(sys.argv) > 2 else None
loaded = load_vocabulary(checkpoint, Path(sys.argv[1]))
print(loaded.source); print(loaded.encode("hello world"))
"""


def run_blocked(*args: Path) -> list[str]:
    command = [sys.executable, "-c", BLOCKED, *map(str, args)]
    env = {"PATH": "/usr/bin:/bin", "HTTPS_PROXY": "http://127.0.0.1:1", "HOME": str(args[0])}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_bundled_ranks_load_without_a_network(tmp_path: Path) -> None:
    source, ids = run_blocked(tmp_path)
    assert "bundled" in source
    assert ids == "[24912, 2375]"


def test_the_checkpoints_tokenizer_comes_first_and_gives_the_same_ids(tmp_path: Path) -> None:
    source, ids = run_blocked(tmp_path, tokenizer_folder())
    assert source.endswith("tokenizer.json")
    assert ids == "[24912, 2375]"
    again, _ = run_blocked(tmp_path, tokenizer_folder())
    assert again.endswith("(cached)")
