"""Checkpoints on disk, as the model locator sees them."""

from __future__ import annotations

from pathlib import Path

from gptoss.model_locator import locate_model
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
