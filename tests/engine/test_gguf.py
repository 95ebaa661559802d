"""GGUF files: the same bits as the checkpoint that they were made of; what cannot be served is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import save_file

from gptoss.engine.model.gguf import canonical_codes, gguf_codes
from gptoss.engine.model.gguf_config import read_gguf_config
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.sources import open_source
from gptoss.engine.model.tensor_source import CheckpointError
from gptoss.engine.model.weights import ModelWeights, WeightLoader, iterate_tensors
from gptoss.engine.parallel.shards import make_shard
from gptoss.kernels.mxfp4 import Mxfp4Tensor, dequantize_mxfp4
from tests.support.gguf_files import (
    OLLAMA,
    gguf_name,
    gguf_tensors,
    llama_cpp_types,
    make_small,
    read_tensors,
    stored,
    write_gguf,
)
from tests.support.helpers import checkpoint, model_logits, one_rank
from tests.support.tiers import nightly_except

IDS = list(range(3, 90))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("small") / "model")


def config_of(path: Path) -> ModelConfig:
    return read_gguf_config(path) if path.is_file() else ModelConfig.from_folder(path)


def load(path: Path, dtype: torch.dtype = torch.bfloat16, *, dequantize: bool = False, **options: Any) -> ModelWeights:
    config = config_of(path)
    return WeightLoader(open_source(path, config), config, dtype, dequantize=dequantize, **options).load()


def assert_same(found: ModelWeights, expected: ModelWeights) -> None:
    pairs = list(zip(iterate_tensors(found), iterate_tensors(expected), strict=True))
    assert len(pairs) > 20
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_the_nibbles_are_those_that_ggufs_own_dequantiser_reads() -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (3, 5, 17), dtype=torch.uint8, generator=generator)
    raw[..., 0] = torch.randint(60, 190, (3, 5), generator=generator)
    values = dequantize(raw.flatten(1).numpy(), GGMLQuantizationType.MXFP4)
    canonical = canonical_codes(raw[..., 1:])
    ours = dequantize_mxfp4(Mxfp4Tensor(canonical, raw[..., 0]), torch.float32)
    assert np.array_equal(values, ours.numpy())
    assert torch.equal(gguf_codes(canonical), raw[..., 1:])


FORMS = [(False, False, 3), (True, True, 1), *((o, f, n) for o in (False, True) for f in (False, True) for n in (1, 2))]


@pytest.mark.parametrize("form", nightly_except(*FORMS[:2], of=FORMS), ids=str)
def test_a_lossless_file_has_the_checkpoints_bits(small: Path, tmp_path: Path, form: tuple[bool, bool, int]) -> None:
    ollama, fused, files = form
    path = write_gguf(small, tmp_path / "model.gguf", ollama=ollama, fused=fused, files=files)
    assert config_of(path) == config_of(small)
    assert_same(load(path), load(small))


@torch.inference_mode()
@pytest.mark.parametrize("size", nightly_except("nano", of=["nano", "mini"]))
def test_the_logits_are_those_of_the_checkpoint(size: str, tmp_path: Path) -> None:
    folder = checkpoint(size)
    path = write_gguf(folder, tmp_path / "model.gguf")
    config = config_of(path)
    assert config == config_of(folder)
    found, expected = (model_logits(one_rank(config, load(p)), IDS, last=4) for p in (path, folder))
    assert torch.equal(found, expected)


KINDS = ["F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("kind", nightly_except("F16", "Q8_0", "Q4_K", of=KINDS))
@torch.inference_mode()
def test_dense_types_are_a_checkpoint_of_what_gguf_dequantises(small: Path, tmp_path: Path, kind: str) -> None:
    """The reference is a safetensors checkpoint of the package's own values, rounded to bfloat16."""

    def type_of(name: str) -> str:
        return kind if llama_cpp_types(name) == "BF16" else "F32"

    path = write_gguf(small, tmp_path / "model.gguf", type_of=type_of)
    reference = rounded_copy(small, tmp_path / "reference", type_of)
    assert_same(load(path), load(reference))
    logits = [model_logits(one_rank(config_of(p), load(p)), IDS, last=2) for p in (path, reference)]
    assert torch.equal(*logits) and logits[0].isfinite().all()


def rounded_copy(folder: Path, out: Path, type_of: Callable[[str], str]) -> Path:
    """The checkpoint with each dense tensor quantised, dequantised by the gguf package, and rounded to bfloat16."""
    tensors = read_tensors(folder)
    for name, value in tensors.items():
        block, rest = gguf_name(name)
        if value.dtype != torch.uint8 and rest != name:
            kind = type_of(block + rest)
            tensors[name] = torch.from_numpy(dequantize(stored(value, kind), GGMLQuantizationType[kind])).bfloat16()
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, out / "model.safetensors")
    return out


def test_each_rank_reads_its_part(small: Path, tmp_path: Path) -> None:
    path = write_gguf(
        small, tmp_path / "model.gguf", fused=True, type_of=lambda n: "Q8_0" if llama_cpp_types(n) == "BF16" else "F32"
    )
    lossless = write_gguf(small, tmp_path / "lossless.gguf")
    config = config_of(path)
    for rank in range(2):
        shard = make_shard(config, rank, tensor_size=2, stage_layers=[range(2)], expert_parallel=False)
        assert_same(load(lossless, shard=shard), load(small, shard=shard))
        whole, part = load(path), load(path, shard=shard)
        rows = slice(shard.vocab.start, shard.vocab.stop)
        assert whole.embedding is not None and part.embedding is not None
        assert torch.equal(whole.embedding[rows], part.embedding)
        heads = slice(shard.query_heads.start * 64, shard.query_heads.stop * 64)
        assert torch.equal(whole.layers[1].out[:, heads], part.layers[1].out)  # type: ignore[index]


def test_unpacked_experts_are_the_same(small: Path, tmp_path: Path) -> None:
    path = write_gguf(small, tmp_path / "model.gguf")
    assert_same(load(path, torch.float32, dequantize=True), load(small, torch.float32, dequantize=True))


def test_lossless_tensors_are_mapped_and_not_copied(small: Path, tmp_path: Path) -> None:
    path = write_gguf(small, tmp_path / "model.gguf", fused=True)
    weights = load(path)
    mapped = weights.embedding.untyped_storage().data_ptr()  # type: ignore[union-attr]
    for tensor in (weights.lm_head, weights.layers[1].qkv, weights.layers[0].out):
        assert isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() == mapped


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[new] = tensors.pop(old)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.attn_sinks.weight"), r"tensor 'blk\.1\.attn_sinks\.weight' is missing"),
        (lambda t: t.update({"rope_freqs.weight": torch.ones(32)}), r"unexpected tensor 'rope_freqs\.weight'"),
        (renamed("blk.0.attn_k.bias", "blk.7.attn_k.bias"), r"tensor 'blk\.0\.attn_k\.bias' is missing"),
        (
            lambda t: t.update({"blk.0.ffn_up_exps.bias": torch.ones(4, 65)}),
            r"'blk\.0\.ffn_up_exps\.bias' has shape \(4, 65\), expected \(4, 64\)",
        ),
        (
            lambda t: t.update({"blk.1.ffn_up_exps.weight": torch.ones(4, 64, 256)}),
            r"'blk\.1\.ffn_up_exps\.weight' has type BF16; experts are served in MXFP4 only",
        ),
        (
            lambda t: t.update({"blk.1.attn_q.weight": np.zeros((256, 136), np.uint8)}),
            r"'blk\.1\.attn_q\.weight' has type MXFP4, expected one of F32",
        ),
        (
            lambda t: t.update({"blk.0.attn_out.weight": torch.ones(256, 256)}),
            r"'blk\.0\.attn_out\.weight' is there twice, as 'blk\.0\.attn_output\.weight' too",
        ),
    ],
)
def test_what_cannot_be_served_is_named(
    small: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = write_gguf(small, tmp_path / "model.gguf", change=change)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_a_file_that_changes_while_it_is_read_is_an_error(small: Path, tmp_path: Path) -> None:
    path = write_gguf(small, tmp_path / "model.gguf")
    config = config_of(path)
    source = open_source(path, config)
    path.touch()
    with pytest.raises(CheckpointError, match=r"model\.gguf was changed while it was read"):
        WeightLoader(source, config, torch.bfloat16, dequantize=False).load()


def test_every_name_of_ollama_is_exercised(small: Path) -> None:
    endings = {name.partition(".")[2].partition(".")[2] for name in gguf_tensors(small)}
    assert endings >= OLLAMA.keys()
