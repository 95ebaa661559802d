"""A command of `gptoss` in a pseudo-terminal of its own, as a person sees it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# in the child: the terminal becomes the controlling one, so that ctrl-C reaches it as a signal
# a test run in the background ignores SIGINT, and its children with it
HEED_INTERRUPTS = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
RUN = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from gptoss.cli.main import main; sys.exit(main())"
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[=>]|\x1b\][^\x07]*\x07")


class Terminal:
    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self._fd, child = pty.openpty()
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "GPTOSS_URL", "INPUTRC")}
        environment |= {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", **(env or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-c", HEED_INTERRUPTS + RUN, *arguments],
            cwd=ROOT, stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(child)
        self.seen = ""  # all that was shown, colours included

    @property
    def text(self) -> str:
        """All that was shown, without colours and line ends of the terminal."""
        return ESCAPES.sub("", self.seen).replace("\r\n", "\n")

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, text: str, timeout_s: float = 20.0) -> None:
        """Waits for text after what earlier calls found."""
        deadline = time.monotonic() + timeout_s
        while text not in self.text[self._found :]:
            assert self._read(deadline), f"{text!r} is not in {self.text[self._found :]!r}"
        self._found = self.text.index(text, self._found) + len(text)

    def wait(self, timeout_s: float = 20.0) -> int:
        """Reads to the end; returns the exit code."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)

    _found = 0

    def _read(self, deadline: float) -> bool:
        """Reads what is there; returns False at the end of the child or of the time."""
        ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
        try:
            data = os.read(self._fd, 65_536) if ready else b""
        except OSError:  # Linux's end of a pseudo-terminal
            data = b""
        self.seen += data.decode("utf-8", "replace")
        return bool(data)


@contextlib.contextmanager
def terminal(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Terminal]:
    opened = Terminal(*arguments, env=env)
    try:
        yield opened
    finally:
        opened.close()
