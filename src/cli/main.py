"""The command `gptoss`, and the registry of its commands.

A new command is one line in COMMANDS and one file: `some-name` is the module `some_name` of this folder, whose
`main(argv)` returns the exit code. Modules are imported when their command runs, because the engine's process imports
this file too.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import sys

COMMANDS = {
    "serve": "start the server",
    "stop": "stop a server on this machine, after its running requests",
    "status": "show whether a server is ready, what it has loaded, and its figures",
    "check": "show what this machine has and lacks for a server",
    "chat": "talk with a model in the terminal",
    "generate": "answer one prompt, on standard output",
    "replay": "send recorded requests again and compare the answers",
    "apply-patch": "apply a patch in the model's form to the files of a folder",
    "batch": "answer the requests of a file, with an engine of its own and no server",
    "mcp": "offer the browser and Python tools to other programs, as an MCP server",
    "bench": "measure latency and throughput of a server, or of two in turns",
    "eval": "run evaluations against a server, compared with OpenAI's scores",
    "completion": "print a script that completes these commands in a shell",
    "memory-plan": "print how a model fits on a number of equal GPUs",
    "convert": "write a model in another layout: Hugging Face's, original/ or GGUF",
    "make-checkpoint": "write a small checkpoint with random weights",
    "unfold": "write the embedded model as a checkpoint",
    "preflight": "check whether a model can be tested on this machine",
}

PIPE_CLOSED = 141  # as of a program that SIGPIPE ends
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def usage() -> str:
    """Returns the text of `gptoss --help`."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ("usage: gptoss COMMAND [options]", "", *lines, "", "gptoss COMMAND --help shows its options.", "")
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first argument names and returns its exit code.

    A foreseen failure is one line on standard error, never a traceback.
    """
    from gptoss.cli.remote.errors import INTERRUPTED, CommandError
    from gptoss.cli.terminal.style import printable

    _prepare_streams()
    try:
        result = _dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except CommandError as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # of `gptoss ... | head`
        _drop_output()
        return PIPE_CLOSED
    except OSError as error:
        return _file_error(error)
    return result


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0 if arguments else 2
    if name == "--version":
        from gptoss import __version__

        sys.stdout.write(f"{__version__}\n")
        return 0
    if name not in COMMANDS:
        sys.stderr.write(f"gptoss: unknown command {name!r}\n{usage()}")
        return 2
    sys.argv[0] = f"gptoss {name}"  # the program's name in argparse's messages
    result: int = importlib.import_module(f"gptoss.cli.{name.replace('-', '_')}").main(arguments[1:])
    return result


def _prepare_streams() -> None:
    """Opens those that the parent process closed, so that no other file gets their number.

    Reading finds nothing, writing output fails, and messages are lost.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)  # the lowest free one
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # JSON can hold half of a surrogate pair


def _file_error(error: OSError) -> int:
    """Reports a file that cannot be used, or a full disk. Raises the error if it is another."""
    from gptoss.cli.remote.errors import NO, USAGE

    if error.filename is None and error.errno not in _CANNOT_WRITE:
        raise error
    text = f"cannot use {error.filename}" if error.filename is not None else "cannot write"
    with contextlib.suppress(OSError):
        sys.stderr.write(f"error: {text}: {error.strerror}\n")
    _drop_output()
    return NO if error.filename is None else USAGE


def _drop_output() -> None:
    """Ends output that cannot be written; the interpreter would report it once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
