"""The command `gptoss`."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from gptoss import __version__
from gptoss.cli import main as cli
from gptoss.cli.main import COMMANDS, main
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from tests.support.draft_heads import write_head


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


def test_the_plan_takes_fp8_and_a_draft_head(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["memory-plan", "--model", "20b", "--gb", "24"]
    tokens = []
    for flags in ([], ["--lm-head-dtype", "fp8"], ["--kv-cache-dtype", "fp8"]):
        assert main([*asked, *flags]) == 0
        tokens.append(int(re.findall(r"KV cache for ([\d,]+) tokens", capsys.readouterr().out)[0].replace(",", "")))
    assert tokens[0] < tokens[1] < 1.2 * tokens[0]
    assert tokens[2] == pytest.approx(2 * tokens[0], abs=1)
    monkeypatch.setitem(SIZES, "20b", dataclasses.replace(SIZES["20b"], hidden=64))  # random numbers take time
    write_head(tmp_path, ModelConfig.from_json(hf_config(SIZES["20b"])), draft_vocab=100)
    assert main([*asked, "--cards", "4", "--speculative-model", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("single: 1 rank") and "draft head 0." in shown
    assert main([*asked, "--speculative-model", str(tmp_path / "none")]) == 2
    assert "speculative_model (--speculative-model): " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*asked, "--kv-cache-dtype", "int4"])
    assert "argument --kv-cache-dtype: invalid choice: 'int4'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["memory-plan", "--table", "--lm-head-dtype", "fp8"])
    assert "--table is printed for the server's defaults" in capsys.readouterr().err


def test_patches_need_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["chat", "--tools", "apply_patch", "--root", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"error: --root: there is no folder '{tmp_path / 'none'}'\n"


def test_labels_that_no_folder_can_have(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "gpqa", "--data", str(tmp_path), "--label", "../../x"])
    assert "argument --label: '../../x' cannot be the name of a folder" in capsys.readouterr().err
