"""What bench/gpu/run.sh keeps, marks and refuses; a stand-in for Python plays the steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import rows

ROOT = Path(__file__).resolve().parents[2]
EARLIER = [
    {"section": step, "name": f"earlier {step}", "us": 1.0, "note": "", "step": step}
    for step in ("decode-20b", "decode-120b", "smoke", "kernels")
]
# smoke is killed while it writes its second row; the others write one row
STEPS = r"""#!/usr/bin/env bash
[[ "$*" == *bench.gpu.rows* ]] && exec REAL -S "$@"
[[ "$*" == *"steps table"* ]] && exit 0
printf '{"section": "x", "name": "new", "us": 1.0, "note": "", "step": "%s"}\n' "$STEP" >>"$OUT/rows.jsonl"
[[ "$*" == *"steps smoke"* ]] && printf '{"sec' >>"$OUT/rows.jsonl" && kill -9 $$
exit 0
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EARLIER))
    (folder / "log.txt").write_text("earlier\n")
    return folder


def run(out: Path, *steps: str, **environment: str) -> subprocess.CompletedProcess[str]:
    python = out.parent / "python"
    python.write_text(STEPS.replace("REAL", sys.executable))
    python.chmod(0o755)
    env = (
        os.environ | {"OUT": str(out), "PYTHON": str(python), "REHEARSE": "1", "TMPDIR": str(out.parent)} | environment
    )
    command = [ROOT / "bench/gpu/run.sh", *steps]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


def found(out: Path) -> list[tuple[str, str, Any]]:
    return [(row["step"], row["name"], re.sub(r"after \d+ s", "after N s", row["note"])) for row in rows.read_rows(out)]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--help",), 0, "bench/gpu/run.sh [step ...]"),
        (("smoke", "-h"), 0, "bench/gpu/run.sh [step ...]"),
        (("bogus",), 2, "unknown step 'bogus'; the steps are: packages environment smoke decode-20b profile"),
        (("smoke", "once"), 2, "unknown step 'once'"),
    ],
)
def test_what_is_no_step_is_refused_and_nothing_is_deleted(
    out: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    before = {path: path.read_text() for path in out.iterdir()}
    done = run(out, *arguments)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert {path: path.read_text() for path in out.iterdir()} == before


def test_a_step_replaces_its_own_rows_alone(out: Path) -> None:
    done = run(out, "decode-120b")
    assert done.returncode == 0, done.stderr
    others = [(row["step"], row["name"], "") for row in EARLIER if row["step"] != "decode-120b"]
    end = ("decode-120b", "the step", "done, after N s")
    assert found(out) == [*others, ("decode-120b", "new", ""), end]
    assert (out / "log.txt").read_text().startswith("earlier\n== decode-120b\n")


def test_a_killed_step_is_marked_and_its_half_row_skipped(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(out, "smoke", "kernels").returncode == 1
    left = found(out)[2:]
    note = "FAILED killed by signal 9, after N s (exit code 137): rows may be missing"
    assert left == [
        ("smoke", "new", ""),
        ("smoke", "the step", note),
        ("kernels", "new", ""),
        ("kernels", "the step", "done, after N s"),
    ]
    assert capsys.readouterr().err == "", "the half row is no longer there"


def test_a_step_that_never_ended_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows.begin(tmp_path, "smoke")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"sec')
    rows.append(tmp_path, EARLIER[0])
    assert found(tmp_path) == [
        ("smoke", "the step", "FAILED begun, not ended"),
        ("decode-20b", "earlier decode-20b", ""),
    ]
    assert 'line 2 is damaged and skipped: {"sec' in capsys.readouterr().err


def test_a_rehearsal_keeps_to_the_time_of_all_steps(out: Path) -> None:
    done = run(out, "kernels", SECONDS_FOR_ALL="12")
    assert done.returncode == 1 and "== kernels: no time left" in done.stdout
    assert found(out)[-1] == ("kernels", "the step", "FAILED no time left, after N s")
    done = run(out, "kernels", SECONDS_FOR_ALL="soon")
    assert done.returncode == 2 and "SECONDS_FOR_ALL is 'soon', expected whole seconds" in done.stderr
