"""Models in Ollama's store: the manifest leads to the file; a store that is not whole is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptoss.config.errors import ConfigError
from gptoss.ollama_store import ADAPTER_LAYER, MODEL_LAYER, find_blob

DIGEST = "0f" * 32


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    blob = tmp_path / "blobs" / f"sha256-{DIGEST}"
    blob.parent.mkdir()
    blob.write_bytes(b"GGUF")
    return tmp_path


def pull(store: Path, name: str, *layers: dict[str, Any], **changes: Any) -> Path:
    layer = {"mediaType": MODEL_LAYER, "digest": f"sha256:{DIGEST}", "size": 4} | changes
    manifest = store / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    template = {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "1" * 64, "size": 9}
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [template, layer, *layers]}))
    return manifest


@pytest.mark.parametrize(
    ("name", "manifest"),
    [
        ("gpt-oss:20b", "registry.ollama.ai/library/gpt-oss/20b"),
        ("gpt-oss", "registry.ollama.ai/library/gpt-oss/latest"),
        ("me/tuned:v1", "registry.ollama.ai/me/tuned/v1"),
        ("hf.co/unsloth/gpt-oss-20b-GGUF:Q4_K_M", "hf.co/unsloth/gpt-oss-20b-GGUF/Q4_K_M"),
        ("localhost:5000/a/b:c", "localhost:5000/a/b/c"),
    ],
)
def test_a_name_leads_to_its_file(store: Path, name: str, manifest: str) -> None:
    pull(store, manifest)
    assert find_blob(name) == store / "blobs" / f"sha256-{DIGEST}"


def test_the_store_is_in_the_home_folder(store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OLLAMA_MODELS")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".ollama").mkdir(parents=True)
    (tmp_path / "home" / ".ollama" / "models").symlink_to(store)
    pull(store, "registry.ollama.ai/library/gpt-oss/20b")
    assert find_blob("gpt-oss:20b").name == f"sha256-{DIGEST}"
    with pytest.raises(ConfigError, match=r"no model 'ollama:gpt-oss:120b'.*ollama pull gpt-oss:120b"):
        find_blob("gpt-oss:120b")
    monkeypatch.setenv("OLLAMA_MODELS", "~nobody-here/models")
    with pytest.raises(ConfigError, match="looked for ~nobody-here/models/manifests"):
        find_blob("gpt-oss:20b")


@pytest.mark.parametrize("name", ["../../etc:x", "a/../b", "a/b/c/d", "", ":x", "a:..", "a:b/c", ".hidden"])
def test_no_name_leads_out_of_the_store(store: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be part of a name|is not a name|no model"):
        find_blob(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 5}, "has 4 bytes, .* says 5: pull the model again"),
        ({"digest": "sha256:../../x"}, "the digest of the model is"),
        ({"digest": "sha256:" + "2" * 64}, "No such file"),
        ({"mediaType": "other"}, "lists 0 layers of type"),
    ],
)
def test_a_store_that_is_not_whole_is_an_error(store: Path, changes: dict[str, Any], message: str) -> None:
    pull(store, "registry.ollama.ai/library/gpt-oss/20b", **changes)
    with pytest.raises(ConfigError, match=message):
        find_blob("gpt-oss:20b")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"layers": 1}', '{"layers": [1]}'])
def test_a_damaged_manifest_is_named(store: Path, text: str) -> None:
    manifest = pull(store, "registry.ollama.ai/library/gpt-oss/20b")
    manifest.write_text(text)
    with pytest.raises(ConfigError, match="library/gpt-oss/20b is not a manifest"):
        find_blob("gpt-oss:20b")


def test_an_adapter_is_not_left_out_silently(store: Path) -> None:
    pull(store, "registry.ollama.ai/me/tuned/latest", {"mediaType": ADAPTER_LAYER, "digest": "", "size": 0})
    with pytest.raises(ConfigError, match="adapter layer"):
        find_blob("me/tuned")
