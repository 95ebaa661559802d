"""Starts a program in a sandbox of bubblewrap, with namespaces of its own and only the files it needs.

The program sees /usr and its Python read-only, and empty folders in memory for its own files. It has no network, sees
no other process, has no capability and no way to new namespaces, and it ends with this process.

Where this process is root's, the user namespace has two users: root, who can enter /root and the like while the sandbox
is set up, and an unprivileged one that the driver becomes before it runs anything. Root's processes would be exempt
from the limit on their number, and root owns much of /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptoss.tools.python_sandbox.errors import SandboxError
from gptoss.tools.python_sandbox.interpreter import Interpreter
from gptoss.tools.python_sandbox.limits import SandboxLimits
from gptoss.tools.python_sandbox.seccomp import filter_program

USER = 1000  # within the sandbox
NOBODY = 65534  # outside, when the server is root
START_S = 20.0  # for bubblewrap to report the namespaces
GONE_S = 5.0  # for Linux to end all processes of a sandbox
FOLDER, HERE = "/mnt/data", "/run/sandbox"
_ACCOUNTS = f"user:x:{USER}:{USER}::{FOLDER}:/bin/sh\n".encode()
_FONTS = b"<fontconfig><dir>/usr/share/fonts</dir><cachedir>/tmp/.fontconfig</cachedir></fontconfig>\n"
_FILES = ("driver.py", "sandbox_figures.py")
_ENVIRONMENT = {
    "HOME": FOLDER,
    "FONTCONFIG_FILE": "/etc/fonts/fonts.conf",
    "LANG": "C.UTF-8",
    "MPLBACKEND": "module://sandbox_figures",
    "MPLCONFIGDIR": "/tmp/.matplotlib",
    "PYTHONDONTWRITEBYTECODE": "1",
    # as many threads as processors would take much address space, and processors from the engine
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}


@dataclass(slots=True)
class Started:
    """A program in its sandbox; it waits for `release`."""

    process: subprocess.Popen[bytes]  # bubblewrap, outside
    output: int  # the read end of standard output and error
    write_end: int  # of the pipe to the driver
    read_end: int  # of the pipe from the driver
    _info: int
    _block: int
    _init: int | None = None  # a descriptor of the sandbox's process 1

    def release(self) -> None:
        """Lets the program start. Blocks for some milliseconds. Raises SandboxError."""
        try:
            init = int(json.loads(_read_json(self._info))["child-pid"])
            self._init = os.pidfd_open(init)
            if is_root():
                for name in ("uid_map", "gid_map"):
                    Path(f"/proc/{init}/{name}").write_text(f"0 0 1\n{USER} {NOBODY} 1\n")
            os.write(self._block, b"1")
        except (OSError, SandboxError) as error:
            self.end()
            raise SandboxError(last_line(self.output) or f"bubblewrap does not start: {error}") from None
        finally:
            os.close(self._info)
            os.close(self._block)

    def discard(self) -> None:
        """Ends a program to which no client has connected."""
        self.end()
        for end in (self.output, self.write_end, self.read_end):
            os.close(end)

    def end(self) -> None:
        """Kills all processes of the sandbox and waits until they are gone. Blocks for some milliseconds.

        Process 1 goes first, and all others with it; bubblewrap then waits for it, so that no zombie is left to process
        1 of this machine.
        """
        if self._init is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
            _wait_until_readable(self._init, GONE_S)
            os.close(self._init)
            self._init = None
        try:
            self.process.wait(GONE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _wait_until_readable(descriptor: int, timeout_s: float) -> None:
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    waiting.poll(timeout_s * 1000)


def find_bubblewrap() -> str:
    """The path of bwrap. Raises SandboxError."""
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError("bubblewrap (bwrap) is not installed", "apt-get install bubblewrap")
    return found


@dataclass(frozen=True, slots=True)
class Sandbox:
    """How containers are started on this machine: see probe.py."""

    bwrap: str
    interpreter: Interpreter
    own_proc: bool = True  # False where no /proc can be mounted, as within some containers

    def start(self, limits: SandboxLimits) -> Started:
        """Starts a driver, which waits for `release`. Raises SandboxError.

        Linux ends the sandbox with the thread that calls this.
        """
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            given = _Pipes(ours, theirs)
            output, their_output = given.pipe()
            read_end, their_write_end = given.pipe()
            their_read_end, write_end = given.pipe(towards_sandbox=True)
            info, their_info = given.pipe()
            their_block, block = given.pipe(towards_sandbox=True)
            driver = self._driver(limits, their_read_end, their_write_end)
            arguments = [*self._arguments(limits, given, their_info, their_block), "--", *driver]
            process = self._popen(arguments, given.passed, their_output)
            ours.pop_all()
        return Started(process, output, write_end, read_end, info, block)

    def _popen(self, arguments: Sequence[str], passed: Sequence[int], output: int) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [self.bwrap, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=passed,
                env={},
                cwd="/",
                start_new_session=True,  # ctrl-C of the server's terminal is not for it
            )
        except OSError as error:
            raise SandboxError(f"{self.bwrap} cannot be started: {error.strerror}") from None

    def _driver(self, limits: SandboxLimits, read_end: int, write_end: int) -> list[str]:
        settings = {
            "pipes": [read_end, write_end],
            "user": USER if is_root() else None,
            "nice": 10,
            "limits": {
                "AS": limits.memory_bytes,
                "NPROC": limits.processes + 1,  # the driver's thread that hears the host
                "FSIZE": limits.disk_bytes,
                "NOFILE": 256,
                "CORE": 0,
            },
        }
        return [str(self.interpreter.path), "-I", f"{HERE}/driver.py", json.dumps(settings)]

    def _arguments(self, limits: SandboxLimits, given: _Pipes, info: int, block: int) -> Iterator[str]:
        yield from ("--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv")
        yield from ("--hostname", "sandbox", "--info-fd", str(info))
        yield from _as_root(block) if is_root() else _as_user()
        yield from _system_files()
        yield from ("--proc", "/proc") if self.own_proc else ("--dir", "/proc")
        yield from ("--dev", "/dev")
        for place in (FOLDER, "/tmp", "/dev/shm"):
            yield from ("--perms", "1777", "--size", str(limits.disk_bytes), "--tmpfs", place)
        for folder in self.interpreter.folders:  # which may be below /tmp
            yield from _readable_folders(*reversed(list(folder.parents)[:-1]))
            yield from ("--ro-bind", str(folder), str(folder))
        for name in _FILES:
            content = (Path(__file__).parent / name).read_bytes()
            yield from ("--perms", "0444", "--ro-bind-data", given.data(content), f"{HERE}/{name}")
        for content, file in ((_ACCOUNTS, "/etc/passwd"), (_FONTS, "/etc/fonts/fonts.conf")):
            yield from ("--perms", "0444", "--ro-bind-data", given.data(content), file)
        yield from ("--remount-ro", "/dev", "--remount-ro", "/")
        program = filter_program()
        if program is not None:
            yield from ("--seccomp", given.data(program))
        elif not is_root():
            yield "--disable-userns"
        programs = os.pathsep.join((str(self.interpreter.path.parent), "/usr/local/bin", "/usr/bin", "/bin"))
        for variable, value in {**_ENVIRONMENT, "PATH": programs}.items():
            yield from ("--setenv", variable, value)
        yield from ("--chdir", FOLDER)


def is_root() -> bool:
    return os.geteuid() == 0


def _as_root(block: int) -> Iterator[str]:
    """Root waits for the namespace's users, and keeps what it needs to become the other one."""
    yield from ("--userns-block-fd", str(block))
    yield from ("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")


def _as_user() -> Iterator[str]:
    yield from ("--uid", str(USER), "--gid", str(USER), "--cap-drop", "ALL")


def _readable_folders(*folders: Path) -> Iterator[str]:
    """Makes folders that bubblewrap would make for itself with a mode that keeps other users out."""
    for folder in folders:
        yield from ("--perms", "0755", "--dir", str(folder))


def _system_files() -> Iterator[str]:
    """Shows /usr and what programs in it need, as far as this system has it."""
    yield from _readable_folders(*map(Path, ("/etc", "/etc/fonts", "/run", HERE, "/mnt")))
    yield from ("--ro-bind", "/usr", "/usr")
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            yield from ("--symlink", str(path.readlink()), str(path))
        elif path.is_dir():
            yield from ("--ro-bind", str(path), str(path))
    for file in ("/etc/ld.so.cache", "/etc/alternatives"):
        yield from ("--ro-bind-try", file, file)


class _Pipes:
    """Pipes of which one end is ours and one is the sandbox's."""

    def __init__(self, ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> None:
        self._ours, self._theirs = ours, theirs
        self.passed: list[int] = []

    def pipe(self, *, towards_sandbox: bool = False) -> tuple[int, int]:
        """The read end and the write end."""
        ends = os.pipe()
        their, our = ends if towards_sandbox else ends[::-1]
        self._theirs.callback(os.close, their)
        self._ours.callback(_close, our)
        self.passed.append(their)
        return ends

    def data(self, content: bytes) -> str:
        """A descriptor from which bubblewrap reads the content."""
        end = os.memfd_create("sandbox")
        self._theirs.callback(os.close, end)
        os.write(end, content)
        os.lseek(end, 0, os.SEEK_SET)
        self.passed.append(end)
        return str(end)


def _close(end: int) -> None:
    with contextlib.suppress(OSError):
        os.close(end)


def _read_json(end: int) -> bytes:
    """What bubblewrap reports, which comes in parts. Raises SandboxError if it ends before."""
    text, until = b"", time.monotonic() + START_S
    while not text.rstrip().endswith(b"}"):
        ready, _, _ = select.select([end], [], [], max(0.0, until - time.monotonic()))
        part = os.read(end, 4096) if ready else b""
        if not part:
            raise SandboxError("it ended" if ready else f"it did not answer within {START_S:g} s")
        text += part
    return text


def last_line(output: int) -> str:
    """What the program wrote last; it has ended."""
    os.set_blocking(output, False)
    try:
        lines = os.read(output, 65_536).decode(errors="replace").strip().splitlines()
    except BlockingIOError:
        return ""
    return lines[-1] if lines else ""
