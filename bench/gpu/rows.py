"""Keeps the rows of a GPU run in rows.jsonl, and in it how each step ended. No torch: run.sh calls it around each step.

    python -m bench.gpu.rows begin decode-20b --out reports/gpu          # its earlier rows go, those of others stay
    python -m bench.gpu.rows end decode-20b --code 137 --seconds 12 --out reports/gpu

A step that has begun is marked as failed until its end is known, so that one that takes the run with it shows too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FILE = "rows.jsonl"
KEYS = {"section": str, "name": str, "note": str, "us": (int, float)}
END = "the step"  # the name of the row that says how a step ended
NO_TIME = -1  # in place of an exit code
REASONS = {NO_TIME: "no time left", 3: "no NVIDIA GPU", 124: "over its time limit"}


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of all steps. Lines that are damaged, as by a process killed while it wrote, are skipped with a note."""
    found = []
    path = out / FILE
    for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else [], 1):
        row = _row(line)
        if row is None:
            sys.stderr.write(f"{path}: line {number} is damaged and skipped: {line[:60]}\n")
        else:
            found.append(row)
    return found


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    is_whole = isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in KEYS.items())
    return row if is_whole else None


def append(out: Path, row: dict[str, Any]) -> None:
    """Adds a row on a line of its own, also after a line that was left half written."""
    with (out / FILE).open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def begin(out: Path, step: str) -> None:
    """Removes what the step left earlier, and marks it as not ended."""
    kept = [row for row in read_rows(out) if row.get("step") != step]
    _write(out, [*kept, _end(step, "FAILED begun, not ended")])


def end(out: Path, step: str, code: int, seconds: int) -> None:
    """Puts the mark of the step after its rows, with its exit code."""
    reason = REASONS.get(code, f"killed by signal {code - 128}" if code > 128 else "")
    shown = f"FAILED {reason or 'exit code ' + str(code)}" if code else "done"
    note = f"{shown}, after {seconds} s" + ("" if code <= 0 else f" (exit code {code}): rows may be missing")
    kept = [row for row in read_rows(out) if (row.get("step"), row["name"]) != (step, END)]
    _write(out, [*kept, _end(step, note) | {"exit_code": code}])


def _end(step: str, note: str) -> dict[str, Any]:
    return {"section": step, "name": END, "us": 0.0, "note": note, "step": step}


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    made = out / f"{FILE}.new"
    made.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.replace(out / FILE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("begin", "end"))
    parser.add_argument("step")
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("reports/gpu"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "begin":
        begin(args.out, args.step)
    else:
        end(args.out, args.step, args.code, args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
