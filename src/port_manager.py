"""Reserves, checks and frees ports.

The socket that was tested is the socket that serves, so no other process can take the port in between.

    python src/port_manager.py --check 8000    # exit code 0: free, 1: in use
    python src/port_manager.py --list          # our running servers, one per line
    python src/port_manager.py --free 8000     # exit code 0: now free, 1: still in use, because it is not our server

A running server keeps a record (port, process id, start time of the process), so that only our own servers are ever
stopped, never a process that got the same id later. Because records decide which process is stopped, they are trusted
only if no other user can write to their folder.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import psutil

logger = logging.getLogger(__name__)

MAX_TRIES = 100
END_TIMEOUT_S = 45.0  # servers drain first
START_TOLERANCE_S = 0.05  # the kernel counts a process's start in hundredths of a second


class PortError(OSError):
    """The port cannot be reserved; the message names its owner."""


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """One of our running servers. `started`: start time of its process, seconds since the epoch."""

    port: int
    host: str
    pid: int
    started: float

    @property
    def process(self) -> psutil.Process | None:
        """The process, if it is still the one that wrote the record."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < START_TOLERANCE_S
        except psutil.Error:
            return None
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None


def reserve(host: str, port: int, *, auto: bool = False, force: bool = False) -> socket.socket:
    """Returns a socket bound to `port`.

    Args:
        auto: use the next free port if `port` is in use.
        force: stop our own server if it holds the port.

    Raises:
        PortError: in use, not permitted, or `host` is not an address of this machine.
    """
    tries = MAX_TRIES if auto and port else 1
    for candidate in range(port, min(port + tries, 65_536)):
        try:
            return _bind(host, candidate)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise PortError(f"cannot bind {host}:{candidate}: {error.strerror or error}") from error
    if auto:
        raise PortError(f"no free port between {port} and {port + tries - 1}")
    if force:
        end_server(port)
        try:
            return _bind(host, port)
        except OSError as error:
            raise PortError(f"port {port} was freed, but is in use again{_owner_text(port)}: {error}") from error
    raise PortError(
        f"port {port} is in use{_owner_text(port)}; choose another with --port, or use --auto-port"
        + (", or --force-port to stop that server" if _record_of(port) is not None else "")
    )


def end_server(port: int, timeout_s: float = END_TIMEOUT_S) -> None:
    """Stops our server that listens on `port`: asks it to drain, and kills it after `timeout_s`.

    Raises:
        PortError: the port is held by any other process.
    """
    record = _record_of(port)
    process = record.process if record is not None else None
    if process is None or not _is_owner(process, port):
        raise PortError(f"port {port} is in use{_owner_text(port)}, which is not one of our servers; leaving it alone")
    logger.warning("stopping the server on port %d (pid %d)", port, process.pid)
    assert record is not None
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGTERM)
        if not _gone(record, timeout_s):
            process.kill()
            _gone(record, 5)


def _gone(record: ServerRecord, timeout_s: float) -> bool:
    """Waits for the process to end. A zombie counts as ended."""
    deadline = time.monotonic() + timeout_s
    while record.process is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def recorded(bound: socket.socket) -> Iterator[None]:
    """Keeps the record of this process as the server of the bound port while the context is open."""
    host, port = bound.getsockname()[:2]
    record = ServerRecord(port, host, os.getpid(), psutil.Process().create_time())
    path = _folder() / f"{port}.json"
    written = False
    try:
        _make_folder(path.parent)
        _write(path, json.dumps(asdict(record)))
        written = True
    except OSError as error:
        logger.warning("cannot write the record of this server: %s; --force-port will not find it", error)
    try:
        yield
    finally:
        if written and _read(path) == record:
            path.unlink(missing_ok=True)


def running_servers() -> list[ServerRecord]:
    """Our running servers, by port. Removes the records of dead ones.

    Raises:
        PortError: other users can write to the folder of records.
    """
    folder, found = _folder(), []
    try:
        for path in (folder.parent, folder):
            _check_folder(path)
    except FileNotFoundError:
        return []
    for path in sorted(folder.glob("*.json")):
        record = _read(path)
        if record is not None and record.process is not None:
            found.append(record)
        else:
            with contextlib.suppress(OSError):  # it may be a folder
                path.unlink()
    return sorted(found, key=lambda record: record.port)


def is_free(host: str, port: int) -> bool:
    """Whether `port` can be bound now. Raises PortError if `host` is not an address of this machine."""
    try:
        _bind(host, port).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise PortError(f"cannot bind {host}:{port}: {error.strerror or error}") from error
    return True


def owner(port: int) -> psutil.Process | None:
    """The process that listens on `port`; None if there is none or it is not visible to this user."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return None
    for connection in connections:
        if (
            connection.status == psutil.CONN_LISTEN
            and getattr(connection.laddr, "port", None) == port
            and connection.pid
        ):
            try:
                return psutil.Process(connection.pid)
            except psutil.NoSuchProcess:
                return None
    return None


def _is_owner(process: psutil.Process, port: int) -> bool:
    try:
        return any(
            c.status == psutil.CONN_LISTEN and getattr(c.laddr, "port", None) == port
            for c in process.net_connections("tcp")
        )
    except psutil.Error:
        return False


def _record_of(port: int) -> ServerRecord | None:
    try:
        return next((record for record in running_servers() if record.port == port), None)
    except PortError as error:
        logger.warning("%s", error)
        return None


def _folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime).resolve() / "gpt-oss-server"
    return Path(tempfile.gettempdir()) / f"gpt-oss-server-{os.getuid()}" / "gpt-oss-server"


def _make_folder(folder: Path) -> None:
    """Creates the folder and its parent. Raises OSError, or PortError if other users can write there."""
    for path in (folder.parent, folder):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        _check_folder(path)
        if path.name.startswith("gpt-oss-server"):  # not XDG_RUNTIME_DIR
            path.chmod(0o700)  # earlier versions made it readable by others


def _check_folder(path: Path) -> None:
    """Checks that only this user can write to `path`.

    Any user can create a folder of this name in /tmp first.

    Raises:
        PortError: `path` is not a folder, or another user owns it or can write to it.
        FileNotFoundError: it is missing.
    """
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        problem = "is not a folder"
    elif status.st_uid != os.getuid():
        problem = f"belongs to user {status.st_uid}"
    elif status.st_mode & 0o022:
        problem = f"is writable by others (mode {stat.S_IMODE(status.st_mode):03o})"
    else:
        return
    remedy = "remove it, or " if path.name.startswith("gpt-oss-server") else ""  # not /tmp
    raise PortError(
        f"server records are not kept in {path}, which {problem}: {remedy}set XDG_RUNTIME_DIR to a folder of your own"
    )


def _write(path: Path, text: str) -> None:
    """Replaces the file atomically, whatever is there. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)
    temporary.replace(path)


def _read(path: Path) -> ServerRecord | None:
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with open(os.open(path, flags)) as file:
            record = msgspec.convert(json.load(file), ServerRecord)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("damaged server record %s: %s", path, error)
        return None
    if not 0 < record.port < 65_536 or not 0 < record.pid < 2**31:
        logger.warning("damaged server record %s: port or pid out of range", path)
        return None
    return record


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(2048)  # a port is in use only once a socket listens on it
    except OSError:
        bound.close()
        raise
    bound.set_inheritable(False)
    return bound


def _owner_text(port: int) -> str:
    process = owner(port)
    if process is None:
        return ""
    try:
        return f" by {process.name()} (pid {process.pid})"
    except psutil.Error:
        return f" (pid {process.pid})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="port_manager", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to check")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", type=_port, metavar="PORT", help="exit code 0 if free, 1 if in use")
    action.add_argument("--list", action="store_true", help="list our running servers")
    action.add_argument("--free", type=_port, metavar="PORT", help="stop our server that holds it")
    args = parser.parse_args(argv)
    try:
        if args.list:
            for record in running_servers():
                sys.stdout.write(f"{record.host}:{record.port} pid {record.pid}\n")
            return 0
        port = args.check if args.check is not None else args.free
        free = is_free(args.host, port)
        if args.check is not None or free:
            sys.stdout.write(f"port {port} is {'free' if free else f'in use{_owner_text(port)}'}\n")
            return 0 if free else 1
        end_server(port)
    except PortError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    freed = is_free(args.host, port)
    sys.stdout.write(f"port {port} is {'free' if freed else f'still in use{_owner_text(port)}'}\n")
    return 0 if freed else 1


def _port(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65_535:
        raise argparse.ArgumentTypeError(f"{text} is not a port (1 to 65535)")
    return port


if __name__ == "__main__":
    sys.exit(main())
