"""The command `gptoss`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from gptoss import __version__
from gptoss.cli import main as cli
from gptoss.cli.main import COMMANDS, main


def test_every_command_is_a_module_and_every_module_a_command() -> None:
    for name in COMMANDS:
        assert importlib.util.find_spec(f"gptoss.cli.{name.replace('-', '_')}") is not None, name
    modules = {path.stem.replace("_", "-") for path in Path(cli.__file__).parent.glob("*.py")}
    assert modules - {"--init--", "main"} == set(COMMANDS)
    for name in COMMANDS:  # what completion is made from
        text = (Path(cli.__file__).parent / f"{name.replace('-', '_')}.py").read_text()
        assert "\ndef options_parser() -> argparse.ArgumentParser:\n" in text, name


def test_a_command_gets_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory-plan", "--model", "20b", "--cards", "1", "--gb", "80"]) == 0
    assert "single" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["memory-plan", "--help"])
    assert "usage: gptoss memory-plan" in capsys.readouterr().out


def test_what_is_not_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert main(["sevre"]) == 2
    assert "unknown command 'sevre'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--cards=0", "--cards=-1", "--gb=nan", "--gb=1e400", "--gb=-80"])
def test_gpus_that_do_not_exist(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["memory-plan", "--model", "20b", "--gb", "80", option])
    assert f"argument {option.partition('=')[0]}: " in capsys.readouterr().err


def test_patches_need_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["chat", "--tools", "apply_patch", "--root", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"error: --root: there is no folder '{tmp_path / 'none'}'\n"


def test_labels_that_no_folder_can_have(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "gpqa", "--data", str(tmp_path), "--label", "../../x"])
    assert "argument --label: '../../x' cannot be the name of a folder" in capsys.readouterr().err
