"""Writes GGUF files of small checkpoints with the `gguf` package alone, in the dialects of llama.cpp and Ollama."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize
from safetensors.torch import load_file, save_file

from gptoss.engine.model.checkpoint import expected_tensors
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import Size, hf_config

DENSE = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.sinks": "attn_sinks.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.router": "ffn_gate_inp",
}
OLLAMA = {
    "attn_output.weight": "attn_out.weight",
    "attn_output.bias": "attn_out.bias",
    "attn_sinks.weight": "attn_sinks",
    "post_attention_norm.weight": "ffn_norm.weight",
}
SMALL = Size(layers=2, hidden=256, intermediate=64, experts=4, heads=4, kv_heads=2)
TypeOf = Callable[[str], str]  # GGUF's name -> the type of a dense tensor


def llama_cpp_types(name: str) -> str:
    """What llama.cpp's converter makes of a checkpoint in bfloat16."""
    is_matrix = name.endswith(".weight") and "norm" not in name and "sinks" not in name and "ffn_gate_inp" not in name
    return "BF16" if is_matrix else "F32"


def make_small(folder: Path, size: Size = SMALL, vocab: int = 288, *, packed: bool = True, **keys: Any) -> Path:
    """A checkpoint with few tokens and rows of 256, the block of the K-quants."""
    raw = hf_config(size, quantized=packed) | {"vocab_size": vocab} | keys
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (shape, _) in expected_tensors(ModelConfig.from_json(raw), original=False, packed=packed).items():
        if name.endswith("_blocks"):
            tensors[name] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        elif name.endswith("_scales"):
            tensors[name] = torch.randint(118, 122, shape, dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = torch.randn(shape, generator=generator).mul(0.1).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def mxfp4_blocks(blocks: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    """The bytes of GGUF's MXFP4, code by code: [E, R, G, 16] and [E, R, G] -> uint8 [E, R, 17 G]."""
    packed = blocks.numpy()
    codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], 32)
    out = np.empty((*packed.shape[:-1], 17), np.uint8)
    out[..., 0] = scales.numpy()
    out[..., 1:] = codes[..., :16] | (codes[..., 16:] << 4)
    return out.reshape(*packed.shape[:-2], -1)


def gguf_name(name: str) -> tuple[str, str]:
    """The block of a checkpoint's tensor, `blk.N.` or nothing, and its name there; the same name if it has no other."""
    rest, block = name.removeprefix("model."), ""
    if rest.startswith("layers."):
        _, number, rest = rest.split(".", 2)
        block = f"blk.{number}."
    stem, _, kind = rest.rpartition(".")
    return block, DENSE.get(rest) or (f"{DENSE[stem]}.{kind}" if stem in DENSE else rest)


def gguf_tensors(folder: Path, *, fused: bool = False) -> dict[str, Any]:
    """llama.cpp's name -> a dense tensor, or the bytes of experts in MXFP4."""
    source = read_tensors(folder)
    out: dict[str, Any] = {}
    for name, value in source.items():
        block, rest = gguf_name(name)
        if rest.endswith("gate_up_proj_bias"):
            out[block + "ffn_gate_exps.bias"], out[block + "ffn_up_exps.bias"] = value[:, 0::2], value[:, 1::2]
        elif rest.endswith("down_proj_bias"):
            out[block + "ffn_down_exps.bias"] = value
        elif rest.endswith("gate_up_proj_blocks"):
            scales = source[name.replace("_blocks", "_scales")]
            for half, first in (("gate", 0), ("up", 1)):
                out[f"{block}ffn_{half}_exps.weight"] = mxfp4_blocks(value[:, first::2], scales[:, first::2])
        elif rest.endswith("down_proj_blocks"):
            out[block + "ffn_down_exps.weight"] = mxfp4_blocks(value, source[name.replace("_blocks", "_scales")])
        elif not rest.endswith("_scales"):
            out[block + rest] = value
    return _fused(out) if fused else out


def _fused(tensors: dict[str, Any]) -> dict[str, Any]:
    for name in [name for name in tensors if ".attn_q." in name]:
        parts = [tensors.pop(name.replace("attn_q.", f"attn_{x}.")) for x in "qkv"]
        tensors[name.replace("attn_q.", "attn_qkv.")] = torch.cat(parts)
    return tensors


def write_gguf(
    folder: Path,
    out: Path,
    *,
    ollama: bool = False,
    fused: bool = False,
    type_of: TypeOf = llama_cpp_types,
    tokens: list[str] | None = None,
    files: int = 1,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Writes the checkpoint in `folder`, and returns the first file. `change` edits its tensors before."""
    tensors = gguf_tensors(folder, fused=fused)
    if change is not None:
        change(tensors)
    writer = GGUFWriter(
        out, "gptoss" if ollama else "gpt-oss", split_max_tensors=-(-len(tensors) // files) if files > 1 else 0
    )
    write_keys(writer, json.loads((folder / "config.json").read_text()), ollama=ollama)
    if tokens is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-4o")
        writer.add_token_list(tokens)
    for name, value in tensors.items():
        _add(writer, _ollama_name(name) if ollama else name, value, type_of(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out if files == 1 else sorted(out.parent.glob(f"{out.stem}-*.gguf"))[0]


def _ollama_name(name: str) -> str:
    for theirs, ours in OLLAMA.items():
        if name.startswith("blk.") and name.endswith("." + theirs):
            return name.removesuffix(theirs) + ours
    return name


def write_keys(writer: GGUFWriter, c: dict[str, Any], *, ollama: bool) -> None:
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_expert_count(c["num_local_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_sliding_window(c["sliding_window"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_rope_scaling_factor(c["rope_scaling"]["factor"])
    writer.add_rope_scaling_orig_ctx_len(c["rope_scaling"]["original_max_position_embeddings"])
    if not ollama:
        writer.add_expert_feed_forward_length(c["intermediate_size"])
        writer.add_rope_scaling_type(RopeScalingType.YARN)


def _add(writer: GGUFWriter, name: str, value: torch.Tensor | np.ndarray, kind: str) -> None:
    if isinstance(value, np.ndarray):
        writer.add_tensor(name, value, raw_dtype=GGMLQuantizationType.MXFP4)
    else:
        writer.add_tensor(name, stored(value, kind), raw_dtype=GGMLQuantizationType[kind])


def stored(value: torch.Tensor, kind: str) -> np.ndarray:
    """A dense tensor in a type of GGUF; random numbers where the package cannot quantise to it."""
    values = value.float().numpy()
    if kind in ("F32", "F16"):
        return values.astype({"F32": np.float32, "F16": np.float16}[kind])
    return random_blocks(values.shape, kind) if kind in SCALES else quantize(values, GGMLQuantizationType[kind])


# of the K-quants and IQ4_NL, which the package cannot write: where a block has its float16 scales
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}


def random_blocks(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Random bytes of a quantised matrix, with small scales."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // values, size), np.uint8)
    for at in SCALES[kind]:
        blocks[..., at : at + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    return blocks.reshape(*shape[:-1], -1)
