"""`gptoss unfold` and `gptoss make-checkpoint`: paths that cannot be used. They load torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptoss.cli.main import main


@pytest.mark.parametrize("command", [["unfold"], ["make-checkpoint", "--size", "nano"]])
def test_folders_that_cannot_be_written(command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert main([*command, "--out", str(tmp_path / "file" / "folder")]) == 2
    assert capsys.readouterr().err == f"error: cannot use {tmp_path / 'file' / 'folder'}: Not a directory\n"


def test_an_embedded_model_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "none"
    assert main(["unfold", "--out", str(tmp_path / "out"), "--asset", str(missing)]) == 2
    assert capsys.readouterr().err == f"error: --asset: there is no file '{missing}'\n"
