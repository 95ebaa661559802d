"""What the fitting of a draft head refuses before it loads the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.eagle3 import fit


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--steps", "0"), ("--steps", "-3"), ("--steps", "x"), ("--minutes", "0"), ("--minutes", "nan")]
    + [("--minutes", "inf"), ("--seed", "-1"), ("--seed", str(2**63)), ("--out", __file__), ("--out", "/proc/none")],
)
def test_an_argument_is_refused_by_its_name(
    flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        fit.options_parser().parse_args(["--out", str(tmp_path), f"{flag}={value}"])
    assert f"argument {flag}: " in capsys.readouterr().err


def test_what_is_right_is_taken(tmp_path: Path) -> None:
    args = fit.options_parser().parse_args(["--out", str(tmp_path / "a" / "b"), "--steps=1", "--minutes=0.5"])
    assert (args.steps, args.minutes, args.seed) == (1, 0.5, 0)
    assert (tmp_path / "a" / "b").is_dir()
