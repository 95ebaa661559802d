"""The tensors of a GGUF file, or of a split one, in the dialects of llama.cpp and of Ollama.

Experts must be MXFP4 and keep their bits; only the order of the nibbles differs. Dense tensors may be in any type that
the `gguf` package dequantises; quantised ones are rounded to bfloat16.

    GGUF         a block is 17 bytes: the scale, then byte k with element k (low nibble) and element k + 16 (high)
    canonical    byte j with elements 2 j (low) and 2 j + 1 (high); scales apart (kernels/mxfp4.py)
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from gptoss.config.errors import ConfigError
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.tensor_source import CheckpointError, MappedFile, Shape, StoredMatrices
from gptoss.gguf_header import GgufError, GgufTensor, read_model
from gptoss.kernels.mxfp4 import GROUP_SIZE, GgufGateUp, GgufMxfp4

logger = logging.getLogger(__name__)

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTISED = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
)
VALUES_AT_ONCE = 1 << 23  # dequantised to float32 at a time: 32 MB
LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F
BLOCK_BYTES = 1 + GROUP_SIZE // 2
OLLAMA_NAMES = {  # as in Ollama's own files -> llama.cpp's
    "attn_out.weight": "attn_output.weight",
    "attn_out.bias": "attn_output.bias",
    "attn_sinks": "attn_sinks.weight",
    "ffn_norm.weight": "post_attention_norm.weight",
}
NAMES = {  # GGUF -> canonical, of the whole model and of a layer
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_sinks.weight": "self_attn.sinks",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    **{
        f"{stored}.{kind}": f"{name}.{kind}"
        for stored, name in {
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate_inp": "mlp.router",
        }.items()
        for kind in ("weight", "bias")
    },
    **{f"ffn_{half}_exps.bias": f"mlp.experts.{half}_proj_bias" for half in ("gate", "up", "down")},
}
EXPERT_NAMES = {f"ffn_{half}_exps.weight": f"mlp.experts.{half}_proj" for half in ("gate", "up", "down")}


class GgufCheckpoint:
    """The tensors of a model in GGUF, memory-mapped. Checked whole when opened; nothing is read before.

    Raises:
        CheckpointError: a tensor is missing, extra, or of another shape or type; or the file is damaged.
        ConfigError: the file has quantised tensors and the package `gguf` is not installed.
    """

    packed = True

    def __init__(self, path: Path, config: ModelConfig) -> None:
        try:
            model = read_model(path)
        except GgufError as error:
            raise CheckpointError(str(error)) from error
        self.files = tuple(MappedFile(part) for part in model.paths)
        self._file_of = {file.path: file for file in self.files}
        self._dense: dict[str, tuple[GgufTensor, slice]] = {}  # canonical -> where, and its rows
        self._experts: dict[str, GgufTensor] = {}
        self._place(path, _by_common_name(model.tensors), config)
        self._report_quantised(path)

    def part(self, name: str, *cut: slice) -> torch.Tensor:
        """The part of a canonical tensor that `cut` selects.

        Dense tensors in F32, F16 or BF16 are views of the mapped file.
        """
        stem, _, kind = name.rpartition("_")
        if kind in ("blocks", "scales"):
            raw = self._blocks(self._experts[stem])[cut]
            return raw[..., 0] if kind == "scales" else _canonical_experts(raw[..., 1:])
        tensor, rows = self._dense[name]
        if tensor.type.name in PLAIN:
            return self._view(tensor, PLAIN[tensor.type.name], tensor.shape)[rows][cut]
        first, *rest = cut or (slice(None),)
        start, stop, _ = first.indices(rows.stop - rows.start)
        return self._dequantised(tensor, slice(rows.start + start, rows.start + stop))[(slice(None), *rest)]

    def stored_experts(self, layer: int, experts: slice) -> StoredMatrices:
        """A layer's matrices as views of the mapped file."""
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (self._blocks(self._experts[f"{prefix}{x}_proj"])[experts] for x in ("gate", "up", "down"))
        return GgufGateUp(gate, up), GgufMxfp4(down)

    def kv_scales(self, layer: int) -> None:
        """GGUF has no scales of keys and values."""
        return None

    def _view(self, tensor: GgufTensor, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
        return self._file_of[tensor.path].view(dtype, shape, tensor.offset)

    def _blocks(self, tensor: GgufTensor) -> torch.Tensor:
        """uint8 [E, R, G, 17]"""
        experts, rows, columns = tensor.shape
        return self._view(tensor, torch.uint8, (experts, rows, columns // GROUP_SIZE, BLOCK_BYTES))

    def _dequantised(self, tensor: GgufTensor, rows: slice) -> torch.Tensor:
        """Rows of a quantised matrix, in bfloat16."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[tensor.type.name]
        row_bytes = tensor.shape[1] // tensor.type.block_values * tensor.type.block_bytes
        raw = self._view(tensor, torch.uint8, (tensor.shape[0], row_bytes))[rows]
        out = torch.empty((len(raw), tensor.shape[1]), dtype=torch.bfloat16)
        step = max(1, VALUES_AT_ONCE // tensor.shape[1])
        for start in range(0, len(raw), step):
            values: np.ndarray = dequantize(raw[start : start + step].numpy(), kind)
            out[start : start + step] = torch.from_numpy(values)
        return out

    def _place(self, path: Path, tensors: dict[str, GgufTensor], c: ModelConfig) -> None:
        """Finds every canonical tensor, and refuses what is left."""
        left = dict(tensors)
        if "output.weight" not in left and "token_embd.weight" in left:
            left["output.weight"] = left["token_embd.weight"]  # llama.cpp's rule for a head that is tied
        sizes = _sizes(c)
        for stored, name in NAMES.items():
            self._dense[name] = (_dense(path, left, stored, sizes[stored]), slice(0, sizes[stored][0]))
        for n in range(c.num_layers):
            block, layer = f"blk.{n}.", f"model.layers.{n}."
            _split_qkv(path, left, block, c, self._dense, layer)
            for stored, name in LAYER_NAMES.items():
                if layer + name not in self._dense:
                    self._dense[layer + name] = (
                        _dense(path, left, block + stored, sizes[stored]),
                        slice(0, sizes[stored][0]),
                    )
            for stored, name in EXPERT_NAMES.items():
                self._experts[layer + name] = _expert(path, left, block + stored, sizes[stored])
        for stored, tensor in left.items():
            raise CheckpointError(f"{tensor.path}: unexpected tensor {stored!r}")

    def _report_quantised(self, path: Path) -> None:
        found = Counter(t.type.name for t, _ in self._dense.values() if t.type.name not in PLAIN)
        if not found:
            return
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"{path} has quantised attention or embedding tensors, whose reading requires gguf; install the "
                "package's extra 'gguf', or run: pip install gguf"
            ) from None
        kinds = ", ".join(f"{count} in {kind}" for kind, count in found.most_common())
        logger.info("%s: dense tensors are dequantised to bfloat16 (%s); experts stay in MXFP4", path.name, kinds)


def _canonical_experts(codes: torch.Tensor) -> torch.Tensor:
    """canonical_codes of [E, R, G, 16], an expert at a time."""
    out = torch.empty(codes.shape, dtype=torch.uint8)
    for expert, stored in enumerate(codes):
        out[expert] = canonical_codes(stored)
    return out


def canonical_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 16], GGUF's order of nibbles -> the canonical order. A copy."""
    pairs = codes.contiguous().view(torch.int16)  # elements 2 j, 2 j + 16, 2 j + 1, 2 j + 17 from the lowest nibble
    low = (pairs & 0xF) | ((pairs >> 4) & 0xF0)
    high = ((pairs >> 4) & 0xF) | ((pairs >> 8) & 0xF0)
    return torch.cat((low.to(torch.uint8), high.to(torch.uint8)), dim=-1)


def gguf_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 16], the canonical order of nibbles -> GGUF's. A copy."""
    low, high = codes.contiguous().view(torch.int64).unbind(-1)  # eight bytes at once
    even = (low & LOW_NIBBLES) | ((high & LOW_NIBBLES) << 4)
    odd = ((low >> 4) & LOW_NIBBLES) | (high & ~LOW_NIBBLES)
    pairs = [half.unsqueeze(-1).view(torch.uint8) for half in (even, odd)]
    return torch.stack(pairs, dim=-1).flatten(-2)


def _common_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    if not name.startswith("blk."):
        return name
    _, number, rest = name.split(".", 2) if name.count(".") > 1 else (*name.split("."), "")
    return f"blk.{number}.{OLLAMA_NAMES.get(rest, rest)}"


def _by_common_name(tensors: dict[str, GgufTensor]) -> dict[str, GgufTensor]:
    """The tensors by llama.cpp's names. Raises CheckpointError if two names stand for one."""
    named: dict[str, tuple[str, GgufTensor]] = {}
    for name, tensor in tensors.items():
        common = _common_name(name)
        if common in named:
            raise CheckpointError(f"{tensor.path}: tensor {name!r} is there twice, as {named[common][0]!r} too")
        named[common] = name, tensor
    return {common: tensor for common, (_, tensor) in named.items()}


def _sizes(c: ModelConfig) -> dict[str, Shape]:
    """Name without the layer -> shape."""
    hidden, inter, experts, vocab = c.hidden_size, c.intermediate_size, c.num_experts, c.vocab_size
    q_dim, kv_dim = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    sizes: dict[str, Shape] = {
        "token_embd.weight": (vocab, hidden),
        "output.weight": (vocab, hidden),
        "attn_output.weight": (hidden, q_dim),
        "attn_output.bias": (hidden,),
        "attn_sinks.weight": (c.num_attention_heads,),
        "ffn_gate_inp.weight": (experts, hidden),
        "ffn_gate_inp.bias": (experts,),
        "ffn_down_exps.weight": (experts, hidden, inter),
        "ffn_down_exps.bias": (experts, hidden),
    }
    sizes |= dict.fromkeys(("output_norm.weight", "attn_norm.weight", "post_attention_norm.weight"), (hidden,))
    for name, rows in {"q": q_dim, "k": kv_dim, "v": kv_dim, "qkv": q_dim + 2 * kv_dim}.items():
        sizes |= {f"attn_{name}.weight": (rows, hidden), f"attn_{name}.bias": (rows,)}
    for half in ("gate", "up"):
        sizes |= {f"ffn_{half}_exps.weight": (experts, inter, hidden), f"ffn_{half}_exps.bias": (experts, inter)}
    return sizes


def _taken(path: Path, left: dict[str, GgufTensor], name: str, shape: Shape) -> GgufTensor:
    """The tensor of that name, which is taken out of `left`."""
    tensor = left.pop(name, None)
    if tensor is None:
        raise CheckpointError(f"{path}: tensor {name!r} is missing")
    if tensor.shape != shape:
        raise CheckpointError(f"{tensor.path}: tensor {name!r} has shape {tensor.shape}, expected {shape}")
    return tensor


def _dense(path: Path, left: dict[str, GgufTensor], name: str, shape: Shape) -> GgufTensor:
    tensor = _taken(path, left, name, shape)
    kind = tensor.type.name
    if kind not in PLAIN and (kind not in QUANTISED or len(shape) != 2):
        allowed = ", ".join([*PLAIN, *(QUANTISED if len(shape) == 2 else ())])
        raise CheckpointError(f"{tensor.path}: tensor {name!r} has type {kind}, expected one of {allowed}")
    return tensor


def _expert(path: Path, left: dict[str, GgufTensor], name: str, shape: Shape) -> GgufTensor:
    tensor = _taken(path, left, name, shape)
    if tensor.type.name != "MXFP4":
        raise CheckpointError(
            f"{tensor.path}: tensor {name!r} has type {tensor.type.name}; experts are served in MXFP4 only, the "
            "form in which gpt-oss is published: choose a file that keeps it"
        )
    return tensor


def _split_qkv(
    path: Path,
    left: dict[str, GgufTensor],
    block: str,
    c: ModelConfig,
    dense: dict[str, tuple[GgufTensor, slice]],
    layer: str,
) -> None:
    """Places Q, K and V of a fused `attn_qkv`, which files made of the original layout have."""
    sizes = _sizes(c)
    for kind in ("weight", "bias"):
        name = f"attn_qkv.{kind}"
        if block + name not in left:
            continue
        tensor, start = _dense(path, left, block + name, sizes[name]), 0
        for x in "qkv":
            rows = sizes[f"attn_{x}.{kind}"][0]
            dense[f"{layer}self_attn.{x}_proj.{kind}"] = (tensor, slice(start, start + rows))
            start += rows
