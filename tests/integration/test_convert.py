"""gptoss convert: every layout to every other, experts bit for bit, and no half-written result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import save_file

from gptoss.cli.conversion import gguf_file, safetensors_folder
from gptoss.cli.convert import main
from gptoss.cli.make_checkpoint import make_checkpoint
from gptoss.cli.remote.errors import CommandError
from gptoss.engine.model.gguf_config import read_gguf_config
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import Size
from gptoss.gguf_header import read_model, read_strings
from gptoss.harmony.vocabulary_files import load_vocabulary
from gptoss.kernels.mxfp4 import quantize_mxfp4
from tests.support.gguf_files import make_small, read_tensors, write_gguf
from tests.support.helpers import checkpoint
from tests.support.tiers import is_nightly

TINY = Size(layers=2, hidden=64, intermediate=64, experts=4, heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def without_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model has few tokens, and the vocabulary takes seconds."""
    monkeypatch.setattr(gguf_file, "_add_vocabulary", lambda writer, model: None)
    monkeypatch.setattr(safetensors_folder, "_write_tokenizer", lambda model, out: None)


def convert(source: Path, out: Path, *options: str) -> Path:
    assert main([str(source), str(out), *options]) == 0
    return out


def assert_same_tensors(found: Path, expected: Path) -> None:
    ours, theirs = read_tensors(found), read_tensors(expected)
    assert ours.keys() == theirs.keys()
    assert all(ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in ours)
    assert ModelConfig.from_folder(found) == ModelConfig.from_folder(expected)


@pytest.mark.usefixtures("without_vocabulary")
def test_every_layout_leads_back_to_the_same_bits(small: Path, tmp_path: Path) -> None:
    """hf -> gguf -> original -> gguf -> hf, and hf -> original -> hf."""
    first = convert(small, tmp_path / "a.gguf")
    original = convert(first, tmp_path / "original", "--to", "original")
    second = convert(original, tmp_path / "b.gguf")
    assert_same_tensors(convert(second, tmp_path / "hf"), small)
    assert_same_tensors(convert(original, tmp_path / "hf2"), small)
    named = zip(GGUFReader(first).tensors, GGUFReader(second).tensors, strict=True)
    assert all(a.name == b.name and np.array_equal(a.data, b.data) for a, b in named)


@pytest.mark.usefixtures("without_vocabulary")
@pytest.mark.parametrize(("packed", "told", "written"), [(True, "quark", "mxfp4"), (False, "mxfp4", None)])
def test_the_config_says_how_the_experts_are_written(
    tmp_path: Path, packed: bool, told: str, written: str | None
) -> None:
    keys = {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": told}, "own": 1}
    folder = make_small(tmp_path / "model", packed=packed, **keys)
    made = json.loads((convert(folder, tmp_path / "out") / "config.json").read_text())
    assert made["own"] == 1 and made.get("quantization_config", {}).get("quant_method") == written


@pytest.mark.usefixtures("without_vocabulary")
@pytest.mark.parametrize("ollama", [False, True], ids=["llama.cpp", "ollama"])
def test_the_file_has_what_llama_cpps_converter_writes(small: Path, tmp_path: Path, ollama: bool) -> None:
    """Compared, by the gguf package's reader, with a file that tests/support wrote by itself; read in both dialects."""
    reference = GGUFReader(write_gguf(small, tmp_path / "reference.gguf"))
    source = write_gguf(small, tmp_path / "source.gguf", ollama=ollama, fused=ollama)
    found = GGUFReader(convert(source, tmp_path / "out.gguf"))
    expected = {t.name: t for t in reference.tensors}
    assert {t.name for t in found.tensors} == expected.keys()
    for tensor in found.tensors:
        other = expected[tensor.name]
        assert (tensor.tensor_type, tensor.shape.tolist()) == (other.tensor_type, other.shape.tolist()), tensor.name
        assert np.array_equal(tensor.data, other.data), tensor.name
    for key in set(reference.fields) - {"GGUF.kv_count"}:
        assert found.fields[key].contents() == reference.fields[key].contents(), key


def test_a_converted_model_has_its_vocabulary_and_files(tmp_path: Path) -> None:
    source = make_checkpoint(TINY, tmp_path / "source", tokenizer=False)
    (source / "tokenizer.json").symlink_to(checkpoint() / "tokenizer.json")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    file = convert(source, tmp_path / "tiny.gguf")
    assert load_vocabulary(file, tmp_path / "cache").source == str(file)
    keys = read_model(file).keys
    merges = json.loads((source / "tokenizer.json").read_bytes())["model"]["merges"]
    assert read_strings(keys["tokenizer.ggml.merges"])[:9] == [" ".join(pair) for pair in merges[:9]]
    assert keys["tokenizer.ggml.merges"].count == len(merges)
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.chat_template"]) == (200_002, "{{ messages }}")
    if not is_nightly():
        return
    folder = convert(file, tmp_path / "folder")
    assert_same_tensors(folder, source)
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [200_002, 199_999, 200_012]
    assert load_vocabulary(folder, tmp_path / "cache2").source == str(folder / "tokenizer.json")


@pytest.mark.usefixtures("without_vocabulary")
def test_unquantised_experts_are_quantised_only_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_small(tmp_path / "source", packed=False)
    with pytest.raises(CommandError, match="experts in bfloat16, which layout gguf does not hold: add --quantize-exp"):
        main([str(source), str(tmp_path / "x.gguf")])
    folder = convert(source, tmp_path / "packed", "--quantize-experts")
    assert "relative RMS error of 0.1" in capsys.readouterr().out
    name = "model.layers.0.mlp.experts.down_proj"
    expected = quantize_mxfp4(read_tensors(source)[name].transpose(1, 2).contiguous())
    assert torch.equal(read_tensors(folder)[f"{name}_blocks"], expected.blocks)
    assert ModelConfig.from_folder(folder).quantized


@pytest.mark.usefixtures("without_vocabulary")
def test_what_bfloat16_does_not_hold_is_reported(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(write_gguf(small, tmp_path / "exact.gguf"), tmp_path / "exact")
    assert "rounded" not in capsys.readouterr().out
    tensors = read_tensors(small)
    tensors["model.norm.weight"] = torch.full((256,), 1 / 3)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((small / "config.json").read_bytes())
    save_file(tensors, source / "model.safetensors")
    convert(source, tmp_path / "out")
    assert "1 dense tensors were rounded to bfloat16" in capsys.readouterr().out


@pytest.mark.usefixtures("without_vocabulary")
def test_a_failure_leaves_nothing_behind(small: Path, tmp_path: Path) -> None:
    raw = json.loads((small / "config.json").read_text()) | {"layer_types": ["full_attention"] * 2}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(raw))
    save_file(read_tensors(small), source / "model.safetensors")
    with pytest.raises(CommandError, match="cannot hold layer_types"):
        main([str(source), str(tmp_path / "out.gguf")])
    (tmp_path / "link.gguf").symlink_to("nowhere")
    with pytest.raises(CommandError, match="exists: name a new file"):
        main([str(small), str(tmp_path / "link.gguf")])
    existing = convert(small, tmp_path / "existing.gguf").read_bytes()
    with pytest.raises(CommandError, match="exists: name a new file"):
        main([str(source), str(tmp_path / "existing.gguf")])
    with pytest.raises(CommandError, match="needs a name that ends with .gguf"):
        main([str(source), str(tmp_path / "out"), "--to", "gguf"])
    assert (tmp_path / "existing.gguf").read_bytes() == existing
    assert sorted(path.name for path in tmp_path.iterdir()) == ["existing.gguf", "link.gguf", "source"]
    assert read_gguf_config(tmp_path / "existing.gguf") == ModelConfig.from_folder(small)
