"""Applies a patch in the model's form (V4A) to the files of a folder: all of it, or nothing.

    gptoss apply-patch [--root DIR] [--dry-run] [--json] [FILE]

Without FILE the patch is read from standard input. Nothing outside the folder is read or changed, symbolic links are
not followed, and '*** Add File' and '*** Move to' never replace a file.

exit codes: 0 applied, 1 the patch does not fit, 2 usage
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from gptoss.cli.remote.errors import CommandError, UsageError
from gptoss.cli.remote.options import command_parser
from gptoss.cli.terminal.style import printable
from gptoss.tools.apply_patch.apply import Changed, apply_patch
from gptoss.tools.apply_patch.parser import PatchError

MAX_PATCH_BYTES = 64 * 2**20


def main(argv: list[str] | None = None) -> int:
    args = options_parser().parse_args(argv)
    if not args.root.is_dir():
        raise UsageError(f"--root {args.root} is not a folder")
    try:
        changes = apply_patch(_read(args.file), args.root, dry_run=args.dry_run)
    except PatchError as error:
        raise CommandError(str(error)) from None
    if args.json:
        answer = {"applied": not args.dry_run, "changes": [asdict(change) for change in changes]}
        sys.stdout.write(json.dumps(answer, indent=2) + "\n")
    else:
        sys.stdout.write("".join(_line(change) + "\n" for change in changes))
    return 0


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    parser = command_parser(__doc__ or "", epilog="")
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="the patch (default: standard input)")
    parser.add_argument(
        "--root", type=Path, default=Path(), metavar="DIR", help="folder of the files (default: the current one)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check whether the patch fits and change nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _read(file: Path | None) -> str:
    """Returns the patch's text. Raises UsageError."""
    name = "standard input" if file is None or str(file) == "-" else str(file)
    try:
        if name == "standard input":
            content = sys.stdin.buffer.read(MAX_PATCH_BYTES + 1)
        else:
            with Path(name).open("rb") as opened:
                content = opened.read(MAX_PATCH_BYTES + 1)
        if len(content) > MAX_PATCH_BYTES:
            raise UsageError(f"{name} has more than {MAX_PATCH_BYTES} bytes")
        return content.decode()
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: byte {error.start}") from None


def _line(change: Changed) -> str:
    moved = "" if change.moved_to is None else f" -> {change.moved_to}"
    return printable(f"{change.letter} {change.path}{moved} (+{change.added} -{change.removed})")
