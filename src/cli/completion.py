"""Prints a script that lets a shell complete gptoss: its commands, options and their values.

    eval "$(gptoss completion bash)"                        # in ~/.bashrc
    gptoss completion zsh > ~/.zfunc/_gptoss                # a folder of $fpath
    gptoss completion fish > ~/.config/fish/completions/gptoss.fish

The script is made from the options themselves: print it again after an update.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from gptoss.cli.main import COMMANDS
from gptoss.cli.remote.errors import OK
from gptoss.cli.remote.options import command_parser

SHELLS = ("bash", "zsh", "fish")
FILES, FOLDERS = ("FILE", "PATH"), ("DIR", "FOLDER")  # metavars of options that take a path


def main(argv: list[str] | None = None) -> int:
    args = options_parser().parse_args(argv)
    sys.stdout.write(script(args.shell))
    return OK


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    parser = command_parser(__doc__ or "", epilog="")
    parser.add_argument("shell", choices=SHELLS)
    return parser


def script(shell: str) -> str:
    """Returns the completion script for a shell of SHELLS."""
    import shtab

    parser = argparse.ArgumentParser(prog="gptoss")
    parser.add_argument("--version", action="store_true", help="show the version")
    commands = parser.add_subparsers(title="commands")
    for name, text in COMMANDS.items():
        options = importlib.import_module(f"gptoss.cli.{name.replace('-', '_')}").options_parser()
        _mark_values(options)
        commands.add_parser(name, help=text)
        commands.choices[name] = options
        options.prog = f"gptoss {name}"
    return str(shtab.complete(parser, shell)) + "\n"


def _mark_values(parser: argparse.ArgumentParser) -> None:
    """Marks for shtab which options take a file, a folder or one of a few words."""
    import shtab

    for action in parser._actions:
        name = action.metavar if isinstance(action.metavar, str) else ""
        if name.startswith("{"):
            action.choices = name[1:-1].split(",")
        elif action.type is Path or name in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif name in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
