"""Checkpoints on disk, as the model locator sees them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from gptoss.config.errors import ConfigError
from gptoss.model_locator import SKIPPED, locate_model
from tests.support.helpers import checkpoint


def test_a_folder_is_recognised_by_its_shape() -> None:
    located = locate_model(str(checkpoint()), None, Path("/nowhere"))
    assert (located.size, located.name, located.folder) == ("nano", "gpt-oss-nano", checkpoint())
    original = locate_model(str(checkpoint(layout="original")), None, Path("/nowhere"))
    assert original.size == "nano"
    assert locate_model(str(checkpoint(experts="bf16")), None, Path("/nowhere")).size == "nano"


def test_a_named_model_is_found_below_model_path(tmp_path: Path) -> None:
    (tmp_path / "gpt-oss-20b").symlink_to(checkpoint())
    assert locate_model("20b", tmp_path, Path("/nowhere")).folder == checkpoint().resolve()


def test_the_command_that_fetches_a_model_leaves_out_what_the_server_does_not_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The command of the error message and the one of docs/quickstart.md, as huggingface_hub's own parser reads them."""
    from huggingface_hub import constants
    from huggingface_hub.cli import download
    from huggingface_hub.cli.hf import main

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as error:
        locate_model("20b", None, Path("/nowhere"))
    page = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text()
    commands = re.findall("hf download openai/gpt-oss-20b.*", f"{error.value}\n{page}")
    assert len(commands) == 2
    asked: list[dict[str, Any]] = []

    def snapshot_download(**options: Any) -> str:
        asked.append(options)
        return "models/gpt-oss-20b"

    monkeypatch.setattr(download, "snapshot_download", snapshot_download)
    for command in commands:
        monkeypatch.setattr("sys.argv", shlex.split(command))
        with pytest.raises(SystemExit, match="^0$"):
            main()
    for options in asked:
        assert (options["repo_id"], options["ignore_patterns"]) == ("openai/gpt-oss-20b", SKIPPED)
        assert options["allow_patterns"] is None
        assert options["local_dir"] == "models/gpt-oss-20b"
    assert len(asked) == 2
