"""Starts of the server that are expected to end at once, each in a fork of a process that has imported its modules.

A start of its own would spend most of its time on imports. What `python src/server.py` does besides is tested with servers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.support.server_process import PYTHON, ROOT

PARENT = """
import json, os, sys, tempfile, traceback
import gptoss.launcher
from gptoss.server import main
for line in sys.stdin:
    asked = json.loads(line)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.environ.update(asked["env"])
            try:
                code = main(asked["flags"])
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    print(json.dumps([code, *texts]), flush=True)
"""


class ForkedStarts:
    def __init__(self) -> None:
        self._parent = subprocess.Popen(
            [os.environ.get(PYTHON, sys.executable), "-c", PARENT],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.write(json.dumps({"flags": flags, "env": env}) + "\n")
        self._parent.stdin.flush()
        answer: list[Any] = json.loads(self._parent.stdout.readline())
        return subprocess.CompletedProcess(flags, answer[0], answer[1], answer[2])

    def close(self) -> None:
        self._parent.communicate()
