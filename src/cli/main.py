"""The command `gptoss`: one table of commands, each a module beside this one with a `main(argv)`.

The engine's process imports its parent's main module, and with it this file: a command's module is imported when it
runs.
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "serve": "start the server",
    "memory-plan": "what a model needs of a number of equal cards",
    "make-checkpoint": "write a checkpoint of random weights",
    "unfold": "write the embedded model as a checkpoint",
    "preflight": "say whether a model can be tested on this machine",
}


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ("usage: gptoss COMMAND [options]", "", *lines, "", "gptoss COMMAND --help shows its options.", "")
    )


def main(argv: list[str] | None = None) -> int:
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
    sys.argv[0] = f"gptoss {name}"  # what argparse calls the program
    result: int = importlib.import_module(f"gptoss.cli.{name.replace('-', '_')}").main(arguments[1:])
    return result
