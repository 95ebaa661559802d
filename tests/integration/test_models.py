"""Checkpoints on disk, as the model locator sees them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from gptoss import model_locator
from gptoss.config.errors import ConfigError
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.harmony.special_tokens import FIRST_SPECIAL, SPECIAL_TEXT
from gptoss.harmony.vocabulary_files import VocabularyError, load_vocabulary
from gptoss.model_locator import SKIPPED, locate_model
from tests.support.gguf_files import make_small, write_gguf
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


@pytest.fixture(scope="module")
def tokens() -> list[str]:
    """The vocabulary as GGUF files have it: GPT-2's characters for bytes."""
    vocab = json.loads((checkpoint() / "tokenizer.json").read_bytes())["model"]["vocab"]
    return [*sorted(vocab, key=vocab.__getitem__)[:FIRST_SPECIAL], *SPECIAL_TEXT.values()]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, tokens: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "Tuned"
    folder.mkdir()
    return write_gguf(checkpoint(), folder / "Tuned-F16.gguf", tokens=tokens)


def test_a_gguf_file_is_found_by_its_path_its_folder_and_in_ollamas_store(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = Path("/nowhere")
    for name, model_path in ((str(gguf), None), (str(gguf.parent), None), ("20b", gguf), ("Tuned", gguf.parents[1])):
        located = locate_model(name, model_path, nowhere)
        assert (located.folder, located.size, located.name) == (gguf, "nano", "gpt-oss-nano")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    layer = {
        "mediaType": "application/vnd.ollama.image.model",
        "digest": f"sha256:{'0' * 64}",
        "size": gguf.stat().st_size,
    }
    manifest = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "gpt-oss" / "20b"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": [layer]}))
    blob = tmp_path / "blobs" / f"sha256-{'0' * 64}"
    blob.parent.mkdir()
    blob.symlink_to(gguf)
    assert locate_model("ollama:gpt-oss:20b", None, nowhere).config == locate_model(str(gguf), None, nowhere).config


def test_of_several_gguf_files_one_must_be_named(gguf: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf"):
        (tmp_path / name).symlink_to(gguf)
    with pytest.raises(ConfigError, match=r"holds 2 GGUF models: name one of a\.gguf, b-00001-of-00002\.gguf"):
        locate_model(str(tmp_path), None, Path("/nowhere"))
    (tmp_path / "text.gguf").write_text("text")
    with pytest.raises(ConfigError, match=r"text\.gguf is not a GGUF file"):
        locate_model(str(tmp_path / "text.gguf"), None, Path("/nowhere"))


def test_the_vocabulary_of_a_gguf_file_is_used_if_it_is_the_right_one(
    gguf: Path, tokens: list[str], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    assert load_vocabulary(gguf, cache).source == str(gguf)
    assert load_vocabulary(gguf, cache).source == f"{gguf} (cached)"
    small, changed = make_small(tmp_path / "small"), [*tokens]
    changed[77], changed[78] = changed[78], changed[77]
    other = write_gguf(small, tmp_path / "other.gguf", tokens=changed)
    with pytest.raises(
        VocabularyError, match=r"other\.gguf: its vocabulary is not o200k_harmony: .* token 77 is another"
    ):
        load_vocabulary(other, cache)
    moved = write_gguf(small, tmp_path / "moved.gguf", tokens=[*tokens[:200_006], *tokens[200_007:]])
    with pytest.raises(VocabularyError, match=r"token 200006 is '<\|end\|>', expected '<\|start\|>'"):
        load_vocabulary(moved, cache)
    without = write_gguf(small, tmp_path / "without.gguf")
    assert "bundled" in load_vocabulary(without, cache).source


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


def test_safeguard_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shape is 20b's, so only the name tells them apart."""
    (tmp_path / "gpt-oss-safeguard-20b").mkdir()
    (tmp_path / "gpt-oss-safeguard-20b" / "config.json").write_text(json.dumps(hf_config(SIZES["20b"])))
    for name in ("safeguard-20b", "openai/gpt-oss-safeguard-20b", "gpt-oss-safeguard:20b"):
        located = locate_model(name, tmp_path, Path("/nowhere"))
        assert (located.name, located.size) == ("gpt-oss-safeguard-20b", "20b")
    assert locate_model(str(tmp_path / "gpt-oss-safeguard-20b"), None, tmp_path).name == "gpt-oss-safeguard-20b"
    monkeypatch.setattr(model_locator, "_hub_reachable", lambda: False)
    with pytest.raises(ConfigError, match="hf download openai/gpt-oss-safeguard-120b"):
        locate_model("safeguard-120b", tmp_path, Path("/nowhere"))
