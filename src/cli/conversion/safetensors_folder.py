"""Writes a checkpoint folder in Hugging Face's layout or that of `original/`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from gptoss.cached_files import default_cache_folder
from gptoss.cli.conversion.model_files import Model, full_config, original_config_of
from gptoss.engine.model.stored_views import ORIGINAL_LAYER_NAMES, ORIGINAL_TOP_NAMES
from gptoss.harmony.special_tokens import CALL, ENDOFTEXT, RETURN, STARTOFTEXT
from gptoss.harmony.tokenizer_files import write_tokenizer
from gptoss.harmony.vocabulary_files import load_vocabulary

SHARD_BYTES = 2**30
COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
Named = Iterator[tuple[str, torch.Tensor]]
QKV = tuple(f"self_attn.{x}_proj" for x in "qkv")


def write_folder(model: Model, out: Path, *, original: bool) -> None:
    """Writes the model into the empty folder `out`, one part of at most SHARD_BYTES in memory at a time."""
    tensors = _tensors(model, original=original)
    total = 3 + model.config.num_layers
    _save(out, tqdm(tensors, desc="converting", unit="part", total=total, disable=None))
    if original:
        _write_json(out / "config.json", original_config_of(model.config))
        return
    _write_json(out / "config.json", _config(model))
    _write_tokenizer(model, out)


def _config(model: Model) -> dict[str, Any]:
    """The model's own config.json where it says how the experts are written, else one made of its shape."""
    made = full_config(model.config, packed=model.packed)
    if not model.raw.get("architectures") or model.quantizes:
        return made
    own = dict(model.raw)
    quantization = own.pop("quantization_config", None) or {}
    if "quantization_config" in made:  # another maker's names its own layout
        is_ours = quantization.get("quant_method") == "mxfp4"
        own["quantization_config"] = quantization if is_ours else made["quantization_config"]
    return own


def _tensors(model: Model, *, original: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the tensors of each layer, then each of the others."""
    layer = _original_layer if original else _hf_layer
    for n in range(model.config.num_layers):
        yield dict(layer(model, n))
    for name, theirs in ORIGINAL_TOP_NAMES.items():
        yield {theirs if original else name: model.dense(name)}


def _hf_layer(model: Model, n: int) -> Named:
    layer = f"model.layers.{n}."
    for name in (*ORIGINAL_LAYER_NAMES, *(f"{x}.{kind}" for x in QKV for kind in ("weight", "bias"))):
        yield layer + name, model.dense(layer + name)
    experts = f"{layer}mlp.experts."
    yield from _experts(model, experts, f"{experts}gate_up_proj", f"{experts}down_proj", "_")


def _original_layer(model: Model, n: int) -> Named:
    layer, block = f"model.layers.{n}.", f"block.{n}."
    for name, theirs in ORIGINAL_LAYER_NAMES.items():
        yield block + theirs, model.dense(layer + name)
    for kind in ("weight", "bias"):
        yield f"{block}attn.qkv.{kind}", torch.cat([model.dense(f"{layer}{x}.{kind}") for x in QKV])
    yield from _experts(model, f"{layer}mlp.experts.", f"{block}mlp.mlp1", f"{block}mlp.mlp2", "_weight.")


def _experts(model: Model, experts: str, gate_up: str, down: str, separator: str) -> Named:
    halves = [f"{experts}{half}_proj" for half in ("gate", "up")]
    yield f"{gate_up}_bias", _alternating(*(model.dense(f"{half}_bias") for half in halves))
    yield f"{down}_bias", model.dense(f"{experts}down_proj_bias")
    if not model.packed:  # only Hugging Face's layout has such experts, and has them transposed
        gate, up, last = (model.unpacked_experts(name) for name in (*halves, f"{experts}down_proj"))
        yield gate_up, _alternating(gate, up).transpose(1, 2).contiguous()
        yield down, last.transpose(1, 2).contiguous()
        return
    gate_packed, up_packed = (model.packed_experts(half) for half in halves)
    last_packed = model.packed_experts(f"{experts}down_proj")
    for part in ("blocks", "scales"):
        yield f"{gate_up}{separator}{part}", _alternating(getattr(gate_packed, part), getattr(up_packed, part))
        yield f"{down}{separator}{part}", getattr(last_packed, part)


def _alternating(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[E, I, ...] twice -> [E, 2 I, ...], gate and up rows in turns."""
    return torch.stack((gate, up), dim=2).flatten(1, 2)


def _save(out: Path, groups: Iterator[dict[str, torch.Tensor]]) -> None:
    files: list[list[str]] = []
    total = 0
    pending: dict[str, torch.Tensor] = {}

    def write() -> None:
        save_file(pending, out / f"{len(files)}.safetensors", metadata={"format": "pt"})
        files.append(list(pending))
        pending.clear()

    for group in groups:
        for name, value in group.items():
            if pending and sum(t.nbytes for t in pending.values()) + value.nbytes > SHARD_BYTES:
                write()
            pending[name] = value
            total += value.nbytes
    write()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        shard = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        (out / f"{number}.safetensors").rename(out / shard)
        weight_map |= dict.fromkeys(names, shard)
    if len(files) > 1:
        _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_tokenizer(model: Model, out: Path) -> None:
    for name in COPIED:
        if (model.path / name).is_file():
            shutil.copyfile(model.path / name, out / name)
    if not (out / "tokenizer.json").is_file():
        write_tokenizer(out, load_vocabulary(model.path, default_cache_folder()).token_bytes)
    if not (out / "generation_config.json").is_file():
        ids = {"bos_token_id": STARTOFTEXT, "eos_token_id": [RETURN, ENDOFTEXT, CALL], "pad_token_id": ENDOFTEXT}
        _write_json(out / "generation_config.json", {**ids, "do_sample": True})
    if model.chat_template is not None:
        (out / "chat_template.jinja").write_text(model.chat_template)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
