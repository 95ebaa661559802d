"""Runs cells of Python one after the other, inside the sandbox. It imports the standard library only.

The host sends frames on one pipe and reads frames from another: a length of four bytes, then JSON. What a cell and its
child processes print goes to standard output, which the host reads too. After each cell the driver writes the mark that
the host chose for it.

    {"run": code, "mark": text} -> {"image": base64, "media_type": ...}*, {"done": "ok" | "error", "message": ...}
    {"interrupt": true}         -> KeyboardInterrupt in the cell that runs
"""

from __future__ import annotations

import ast
import asyncio
import base64
import builtins
import contextlib
import inspect
import json
import linecache
import os
import queue
import resource
import signal
import struct
import subprocess
import sys
import threading
import traceback
import types
from typing import Any

MAX_IMAGES = 16
FOLDER = "/mnt/data"
HERE = "/run/sandbox"  # where the host puts this file and sandbox_figures.py


class Channel:
    """Frames from and to the host."""

    def __init__(self, read_end: int, write_end: int) -> None:
        for end in (read_end, write_end):
            os.set_inheritable(end, False)
        self._reader, self._write_end = os.fdopen(read_end, "rb"), write_end
        self._lock = threading.Lock()

    def receive(self) -> dict[str, Any] | None:
        """The next frame; None when the host has closed the pipe."""
        head = self._reader.read(4)
        if len(head) < 4:
            return None
        frame: dict[str, Any] = json.loads(self._reader.read(struct.unpack("!I", head)[0]))
        return frame

    def send(self, **frame: Any) -> None:
        body = json.dumps(frame).encode()
        data = struct.pack("!I", len(body)) + body
        with self._lock:
            while data:
                data = data[os.write(self._write_end, data) :]


class Driver:
    """The interpreter's state, and the cell that runs."""

    def __init__(self, channel: Channel, output: int) -> None:
        self._channel, self._output = channel, output  # a copy of standard output that no cell closes
        self._main = types.ModuleType("__main__")
        self._cells: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._count = self._images = 0
        self._running = False
        self._loop: asyncio.AbstractEventLoop | None = None
        sys.modules["__main__"] = self._main
        builtins.display = self.display  # type: ignore[attr-defined]
        self._main.__dict__["_shell"] = _shell

    def serve(self) -> None:
        """Runs cells until the host closes the pipe."""
        signal.signal(signal.SIGINT, self._interrupted)
        threading.Thread(target=self._receive, daemon=True).start()
        self._channel.send(ready=True, python=sys.version.split()[0])
        while True:
            frame = self._cells.get()
            status, message = self._run(frame["run"])
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os.write(self._output, frame["mark"].encode())
            self._channel.send(done=status, message=message)

    def _receive(self) -> None:
        while (frame := self._channel.receive()) is not None:
            if "run" in frame:
                self._cells.put(frame)
            elif self._running:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        os._exit(0)

    def _interrupted(self, *_: object) -> None:
        if self._running:
            raise KeyboardInterrupt

    def _run(self, code: str) -> tuple[str, str]:
        self._count += 1
        self._images = 0
        name = f"<cell {self._count}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        try:
            self._running = True
            try:
                self._execute(code, name)
                self._show_figures()
            finally:
                self._running = False
        except SystemExit as error:
            return "ok", f"SystemExit: {error.code}"
        except BaseException as error:  # whatever a cell raises
            _print_traceback(error)
            return "error", traceback.format_exception_only(error)[-1].strip()
        return "ok", ""

    def _execute(self, code: str, name: str) -> None:
        tree = _parse(code, name)
        last = tree.body[-1] if tree.body else None
        if isinstance(last, ast.Expr):
            tree.body.pop()
        if tree.body:
            self._evaluate(tree, name, "exec")
        if isinstance(last, ast.Expr):
            value = self._evaluate(ast.Expression(last.value), name, "eval")
            if value is not None:
                self._main.__dict__["_"] = value
                self.display(value)

    def _evaluate(self, tree: ast.Module | ast.Expression, name: str, mode: str) -> Any:
        compiled = compile(tree, name, mode, flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        value = eval(compiled, self._main.__dict__)
        if compiled.co_flags & inspect.CO_COROUTINE:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
            return self._loop.run_until_complete(value)
        return value

    def display(self, *values: Any) -> None:
        """Shows values as a notebook does: as images where they can be, else as text."""
        for value in values:
            image = _png(value)
            if image is None:
                sys.stdout.write(f"{value!r}\n")
            else:
                self._send_image(image)

    def _send_image(self, png: bytes) -> None:
        self._images += 1
        if self._images == MAX_IMAGES + 1:
            sys.stdout.write(f"[only the first {MAX_IMAGES} images of a cell are shown]\n")
        if self._images <= MAX_IMAGES:
            sys.stdout.flush()
            self._channel.send(image=base64.b64encode(png).decode(), media_type="image/png")

    def _show_figures(self) -> None:
        """Sends the figures that are open, and closes them."""
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is None:
            return
        for number in pyplot.get_fignums():
            self.display(pyplot.figure(number))
        pyplot.close("all")


def _parse(code: str, name: str) -> ast.Module:
    """The cell's tree. Lines that begin with `!` run in a shell, as in a notebook."""
    try:
        return _tree(code, name)
    except SyntaxError:
        lines = code.split("\n")
        if not any(line.startswith(("!", "%matplotlib")) for line in lines):
            raise
        return _tree("\n".join(map(_without_magic, lines)), name)


def _tree(code: str, name: str) -> ast.Module:
    tree = compile(code, name, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    assert isinstance(tree, ast.Module)
    return tree


def _without_magic(line: str) -> str:
    if line.startswith("%matplotlib"):
        return "pass"
    return f"_shell({line[1:]!r})" if line.startswith("!") else line


def _shell(command: str) -> None:
    sys.stdout.flush()
    subprocess.run(command, shell=True, stdin=subprocess.DEVNULL)


def _png(value: Any) -> bytes | None:
    """The value as a PNG: a figure of matplotlib, or what offers `_repr_png_`, as images of Pillow do."""
    figure = getattr(sys.modules.get("matplotlib.figure"), "Figure", None)
    if figure is not None and isinstance(value, figure):
        import io

        buffer = io.BytesIO()
        value.savefig(buffer, format="png", bbox_inches="tight")
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is not None:
            pyplot.close(value)
        return buffer.getvalue()
    if isinstance(value, type):
        return None
    try:
        png = value._repr_png_()
    except Exception:
        return None
    return png if isinstance(png, bytes) else None


def _print_traceback(error: BaseException) -> None:
    """Prints a traceback of the cell."""
    shown = _without_driver(traceback.TracebackException.from_exception(error))
    sys.stdout.flush()
    sys.stderr.write("".join(shown.format()))


def _without_driver(shown: traceback.TracebackException) -> traceback.TracebackException:
    """The traceback, and those it refers to, without the frames of this file."""
    for one in (shown, shown.__cause__, shown.__context__):
        if one is not None:
            one.stack[:] = [frame for frame in one.stack if frame.filename != __file__]
    return shown


def _limit(limits: dict[str, int]) -> None:
    """Lowers the limits of this process and its children for good."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _give_up_root(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def main() -> None:
    settings = json.loads(sys.argv[1])
    _limit(settings["limits"])
    if settings["user"] is not None:
        _give_up_root(settings["user"])
    os.umask(0o022)
    os.nice(settings["nice"])
    os.chdir(FOLDER)
    output = os.dup(1)
    os.set_inheritable(output, False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)  # noqa: SIM115
    sys.path[:] = ["", *sys.path, HERE]
    sys.argv = [""]
    driver = Driver(Channel(*settings["pipes"]), output)
    driver.serve()


if __name__ == "__main__":
    main()
