"""The command `gptoss`, and the registry of its commands.

A new command is one line in COMMANDS and one file: `some-name` is the module `some_name` of this folder, whose
`main(argv)` returns the exit code. Modules are imported when their command runs, because the engine's process imports
this file too.
"""

from __future__ import annotations

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
    "eval": "run evaluations against a server, beside OpenAI's scores",
    "completion": "print a script that completes these commands in a shell",
    "memory-plan": "print how a model fits on a number of equal GPUs",
    "convert": "write a model in another layout: Hugging Face's, original/ or GGUF",
    "make-checkpoint": "write a small checkpoint with random weights",
    "unfold": "write the embedded model as a checkpoint",
    "preflight": "check whether a model can be tested on this machine",
}

PIPE_CLOSED = 141  # as of a program that SIGPIPE ends


def usage() -> str:
    """Returns the text of `gptoss --help`."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ("usage: gptoss COMMAND [options]", "", *lines, "", "gptoss COMMAND --help shows its options.", "")
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first argument names and returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
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
    return _run(name, arguments[1:])


def _run(name: str, arguments: list[str]) -> int:
    """Runs the command and returns its exit code.

    A foreseen failure is one line on standard error, never a traceback.
    """
    from gptoss.cli.remote.errors import INTERRUPTED, CommandError
    from gptoss.cli.terminal.style import printable

    sys.argv[0] = f"gptoss {name}"  # the program's name in argparse's messages
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # JSON can hold half of a surrogate pair
    try:
        result: int = importlib.import_module(f"gptoss.cli.{name.replace('-', '_')}").main(arguments)
        sys.stdout.flush()
    except CommandError as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # of `gptoss ... | head`; the interpreter would report it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    return result
