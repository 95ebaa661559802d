"""A checkpoint of a named size with random weights, and the same weights as a GGUF file, made for speed measurements.

Numbers are drawn as bytes, not from a normal distribution: 20b takes minutes, and activations stay near 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quant_shape_to_byte_shape, quantize
from safetensors import safe_open
from safetensors.torch import save_file

from gptoss.engine.model.checkpoint import PACKED_TYPES, expected_tensors
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.harmony.special_tokens import CALL, ENDOFTEXT, RETURN, STARTOFTEXT
from gptoss.harmony.tokenizer_files import write_tokenizer
from gptoss.harmony.vocabulary_files import load_vocabulary
from tests.support.gguf_files import gguf_name, llama_cpp_types, write_keys

SHARD_BYTES = 900 * 2**20
RMS_OF_CODES = 2.93  # of MXFP4's sixteen, all as likely
DONE = "complete"


def write_checkpoint(size: str, out: Path) -> Path:
    """Writes the checkpoint in Hugging Face's layout, unless it is there, and returns its folder."""
    if (out / DONE).exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    raw = hf_config(SIZES[size])
    (out / "config.json").write_text(json.dumps(raw, indent=2))
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [RETURN, ENDOFTEXT, CALL]}))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(ModelConfig.from_json(raw))):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_tokenizer(out, load_vocabulary().token_bytes)
    (out / DONE).touch()
    return out


def _shards(config: ModelConfig) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    for name, (shape, types) in expected_tensors(config, original=False, packed=True).items():
        value = _packed(name, shape, generator) if types is PACKED_TYPES else _dense(name, shape, generator)
        if shard and sum(v.nbytes for v in shard.values()) + value.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = value
    yield shard


def _packed(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("blocks"):
        return torch.empty(shape, dtype=torch.uint8).random_(256, generator=generator)
    exponent = math.log2((32 * shape[-1]) ** -0.5 / RMS_OF_CODES)
    return torch.empty(shape, dtype=torch.uint8).random_(2, generator=generator).add_(127 + math.floor(exponent))


def _dense(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random signs and digits under one exponent; norms' weights are 1 to 2."""
    rms = 1.0 if len(shape) == 1 or "embed" in name else shape[-1] ** -0.5
    rms *= 0.1 if name.endswith("bias") else 4.0 if "lm_head" in name else 1.0
    bits = torch.empty(shape, dtype=torch.int16).random_(-(2**15), 2**15, generator=generator)
    exponent = 127 if "norm" in name else 127 + math.floor(math.log2(rms / 1.5))
    kept = 0x7F if "norm" in name else 0x7F - 0x8000
    return bits.bitwise_and_(kept).bitwise_or_(exponent << 7).view(torch.bfloat16)


class _Tensors:
    """The tensors of a checkpoint, one at a time."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self.files = {name: folder / file for name, file in index["weight_map"].items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        with safe_open(self.files[name], framework="pt") as file:
            shape: list[int] = file.get_slice(name).get_shape()
            return shape


def write_gguf(folder: Path, out: Path, dense: str = "BF16") -> Path:
    """Writes the checkpoint's weights as llama.cpp's converter does, one tensor at a time, unless the file is there.

    `dense`: BF16, or Q8_0 for the matrices that are not experts.
    """
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    writer = GGUFWriter(part, "gpt-oss")
    write_keys(writer, json.loads((folder / "config.json").read_text()), ollama=False)
    _write_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()))
    tensors = _Tensors(folder)
    parts = [part for name in tensors.files for part in _parts(name, tensors.shape(name), dense)]
    for name, kind, shape, _ in parts:
        stored = quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, kind, _, (source, rows) in parts:
        writer.write_tensor_data(_stored(tensors, source, rows, kind))
    writer.close()
    part.rename(out)
    return out


Part = tuple[
    str, GGMLQuantizationType, list[int], tuple[str, slice | None]
]  # the last: a tensor, and which of its rows


def _parts(name: str, shape: list[int], dense: str) -> list[Part]:
    """What becomes of a checkpoint's tensor: experts' gates and ups are apart."""
    block, rest = gguf_name(name)
    kinds = GGMLQuantizationType
    gates, ups = slice(0, None, 2), slice(1, None, 2)
    if rest.endswith("_scales"):
        return []
    if rest.endswith("_blocks"):
        experts, rows, groups, _ = shape
        kept = [experts, rows, groups * 32]
        if "down_proj" in rest:
            return [(block + "ffn_down_exps.weight", kinds.MXFP4, kept, (name, None))]
        kept[1] //= 2
        halves = (("gate", gates), ("up", ups))
        return [(f"{block}ffn_{half}_exps.weight", kinds.MXFP4, kept, (name, rows)) for half, rows in halves]
    if rest.endswith("gate_up_proj_bias"):
        kept = [shape[0], shape[1] // 2]
        return [
            (f"{block}ffn_{half}_exps.bias", kinds.F32, kept, (name, rows))
            for half, rows in (("gate", gates), ("up", ups))
        ]
    if rest.endswith("down_proj_bias"):
        return [(block + "ffn_down_exps.bias", kinds.F32, shape, (name, None))]
    kind = llama_cpp_types(rest)
    return [(block + rest, kinds[dense if kind == "BF16" else kind], shape, (name, None))]


def _stored(tensors: _Tensors, name: str, rows: slice | None, kind: GGMLQuantizationType) -> np.ndarray:
    """The bytes of a tensor, or of some of its rows: those of MXFP4 have a scale before each 16 bytes of codes."""
    value = tensors[name] if rows is None else tensors[name][:, rows]
    if kind == GGMLQuantizationType.MXFP4:
        scales = tensors[name.replace("_blocks", "_scales")]
        return _mxfp4_bytes(value, scales if rows is None else scales[:, rows])
    if kind == GGMLQuantizationType.BF16:
        return value.contiguous().view(torch.uint8).numpy()
    found = value.float().contiguous().numpy()
    return found.view(np.uint8) if kind == GGMLQuantizationType.F32 else quantize(found, kind)


def _mxfp4_bytes(blocks: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    """uint8 [E, R, G, 16] and [E, R, G] -> [E, R, 17 G]: code n of a group next to code n + 16."""
    out = torch.empty((*scales.shape, 17), dtype=torch.uint8)
    out[..., 0] = scales
    first, second = blocks[..., :8], blocks[..., 8:]
    out[..., 1::2] = (first & 15) | (second << 4)
    out[..., 2::2] = (first >> 4) | (second & 0xF0)
    return out.flatten(2).numpy()


def _write_tokenizer(writer: GGUFWriter, tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    special = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    tokens = {token_id: text for text, token_id in vocabulary.items()} | special
    count = hf_config(SIZES["nano"])["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list([tokens.get(n, f"[PAD{n}]") for n in range(count)])
    writer.add_token_types(
        [
            TokenType.CONTROL if n in special else TokenType.NORMAL if n in tokens else TokenType.UNUSED
            for n in range(count)
        ]
    )
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(STARTOFTEXT)
    writer.add_eos_token_id(RETURN)
    writer.add_add_bos_token(False)
