"""Writes a GGUF file as llama.cpp's converter does.

Experts are in MXFP4, other matrices in BF16, the rest in F32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gptoss.cli.conversion.model_files import Model
from gptoss.engine.model.gguf import EXPERT_NAMES, LAYER_NAMES, NAMES, gguf_codes
from gptoss.engine.model.model_config import ModelConfig
from gptoss.harmony.special_tokens import ENDOFTEXT, RETURN, STARTOFTEXT
from gptoss.kernels.mxfp4 import Mxfp4Tensor

ARCHITECTURE = "gpt-oss"
FILE_TYPE = 38  # llama.h: LLAMA_FTYPE_MOSTLY_MXFP4_MOE
QUANTIZATION_VERSION = 2
ROUTER = "ffn_gate_inp.weight"  # a matrix that llama.cpp keeps in F32
# name, shape, type, and what makes the bytes
Entry = tuple[str, tuple[int, ...], str, Callable[[], np.ndarray]]


def write_gguf(model: Model, out: Path) -> None:
    """Writes the model to `out`, a tensor at a time."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(None, ARCHITECTURE)
    _add_keys(writer, model)
    _add_vocabulary(writer, model)
    entries = list(_entries(model))
    for name, shape, kind, _ in entries:
        dtype = GGMLQuantizationType[kind]
        if kind == "F32":
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        else:
            stored = _byte_shape(shape, kind)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=dtype)
    writer.write_header_to_file(path=out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, _, make in tqdm(entries, desc="converting", unit="tensor", disable=None):
        writer.write_tensor_data(make())
    writer.close()


def _byte_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    *rows, columns = shape
    return (*rows, 2 * columns if kind == "BF16" else columns // 32 * 17)


def _entries(model: Model) -> Iterator[Entry]:
    for stored, name in NAMES.items():
        yield _dense(model, stored, name)
    for n in range(model.config.num_layers):
        block, layer = f"blk.{n}.", f"model.layers.{n}."
        for stored, name in LAYER_NAMES.items():
            yield _dense(model, block + stored, layer + name)
        for stored, name in EXPERT_NAMES.items():
            yield _experts(model, block + stored, layer + name)


def _dense(model: Model, stored: str, name: str) -> Entry:
    shape = tuple(model.source.part(name, slice(0, 1)).shape)
    rows = _rows_of(model.config, name)
    is_matrix = len(shape) == 2 and name.endswith(".weight") and not stored.endswith(ROUTER)

    def make() -> np.ndarray:
        value = model.dense(name)
        return value.view(torch.uint8).numpy() if is_matrix else value.float().numpy()

    return stored, (rows, *shape[1:]), "BF16" if is_matrix else "F32", make


def _rows_of(c: ModelConfig, name: str) -> int:
    """The first dimension of a canonical dense tensor."""
    kv_dim = c.num_key_value_heads * c.head_dim
    rows = {
        "embed_tokens": c.vocab_size,
        "lm_head": c.vocab_size,
        "q_proj": c.num_attention_heads * c.head_dim,
        "k_proj": kv_dim,
        "v_proj": kv_dim,
        "sinks": c.num_attention_heads,
        "router": c.num_experts,
        "experts": c.num_experts,
    }
    return next((count for part, count in rows.items() if part in name), c.hidden_size)


def _experts(model: Model, stored: str, name: str) -> Entry:
    c = model.config
    rows, columns = (
        (c.hidden_size, c.intermediate_size) if name.endswith("down_proj") else (c.intermediate_size, c.hidden_size)
    )

    def make() -> np.ndarray:
        out = torch.empty((c.num_experts, rows, columns // 32 * 17), dtype=torch.uint8)
        for number, one in enumerate(model.experts(name)):
            out[number] = gguf_blocks(one)
        return out.numpy()

    return stored, (c.num_experts, rows, columns), "MXFP4", make


def gguf_blocks(matrix: Mxfp4Tensor) -> torch.Tensor:
    """A matrix [R, K] as GGUF stores it: uint8 [R, K / 32 * 17]."""
    return torch.cat((matrix.scales.unsqueeze(-1), gguf_codes(matrix.blocks)), dim=-1).flatten(-2)


def _add_keys(writer: Any, model: Model) -> None:
    from gguf import RopeScalingType

    c = model.config
    writer.add_name(model.path.stem if model.path.is_file() else model.path.name)
    writer.add_file_type(FILE_TYPE)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_block_count(c.num_layers)
    writer.add_context_length(c.max_position)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_expert_feed_forward_length(c.intermediate_size)
    writer.add_expert_count(c.num_experts)
    writer.add_expert_used_count(c.experts_per_token)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_sliding_window(c.sliding_window)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(c.rope_factor)
    writer.add_rope_scaling_orig_ctx_len(c.rope_original_max_position)
    writer.add_rope_scaling_yarn_beta_fast(c.rope_beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(c.rope_beta_slow)


def _add_vocabulary(writer: Any, model: Model) -> None:
    tokens = model.tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens.texts)
    writer.add_token_types(tokens.types)
    writer.add_token_merges(tokens.merges)
    writer.add_bos_token_id(STARTOFTEXT)
    writer.add_eos_token_id(RETURN)
    writer.add_pad_token_id(ENDOFTEXT)
    writer.add_add_bos_token(False)
    if model.chat_template is not None:
        writer.add_chat_template(model.chat_template)
