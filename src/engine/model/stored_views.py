"""The canonical tensors of a model as views of the tensors that a checkpoint stores, for each layout.

Shapes: E experts, R rows, K columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gptoss.engine.model.expert_modules import Maker, module_names
from gptoss.engine.model.model_config import ModelConfig
from gptoss.kernels.mxfp4 import GROUP_SIZE

ORIGINAL_TOP_NAMES = {  # Hugging Face's name -> that of original/
    "model.embed_tokens.weight": "embedding.weight",
    "lm_head.weight": "unembedding.weight",
    "model.norm.weight": "norm.scale",
}
ORIGINAL_LAYER_NAMES = {
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.sinks": "attn.sinks",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
}
View = Callable[[torch.Tensor], torch.Tensor]
# canonical name -> the tensor of the file, or those of each expert, and the view of it, or of all experts stacked
StoredViews = dict[str, tuple[str | tuple[str, ...], View]]


def as_stored(stored: torch.Tensor) -> torch.Tensor:
    """The tensor itself."""
    return stored


def _transposed(stored: torch.Tensor) -> torch.Tensor:
    return stored.transpose(1, 2)


def _rows(start: int, stop: int) -> View:
    return lambda stored: stored[start:stop]


def _every_other(first: int) -> View:
    """A view of the gate rows (first 0) or the up rows (1), which alternate."""
    return lambda stored: stored[:, first::2]


def original_views(c: ModelConfig) -> StoredViews:
    """The tensors of original/ other than experts: Q, K and V are parts of one."""
    q_dim, kv_dim = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    ends = {"q": (0, q_dim), "k": (q_dim, q_dim + kv_dim), "v": (q_dim + kv_dim, q_dim + 2 * kv_dim)}
    views: StoredViews = {name: (stored, as_stored) for name, stored in ORIGINAL_TOP_NAMES.items()}
    for n in range(c.num_layers):
        layer, block = f"model.layers.{n}.", f"block.{n}."
        views |= {layer + name: (block + stored, as_stored) for name, stored in ORIGINAL_LAYER_NAMES.items()}
        for kind in ("weight", "bias"):
            for x, (start, stop) in ends.items():
                views[f"{layer}self_attn.{x}_proj.{kind}"] = (f"{block}attn.qkv.{kind}", _rows(start, stop))
    return views


def expert_views(c: ModelConfig, *, original: bool, packed: bool) -> StoredViews:
    """Experts that are stacked in one tensor a layer; gate and up rows alternate. `packed`: in MXFP4."""
    separator = "_weight." if original else "_"
    parts = {
        "_bias": "_bias",
        **({f"{separator}{part}": f"_{part}" for part in ("blocks", "scales")} if packed else {}),
    }
    views: StoredViews = {}
    for n in range(c.num_layers):
        experts = f"model.layers.{n}.mlp.experts."
        gate_up, down = (
            (f"block.{n}.mlp.mlp1", f"block.{n}.mlp.mlp2")
            if original
            else (f"{experts}gate_up_proj", f"{experts}down_proj")
        )
        for stored, name in parts.items():
            views[f"{experts}gate_proj{name}"] = (gate_up + stored, _every_other(0))
            views[f"{experts}up_proj{name}"] = (gate_up + stored, _every_other(1))
            views[f"{experts}down_proj{name}"] = (down + stored, as_stored)
        if not packed:
            views[f"{experts}gate_proj"] = (gate_up, lambda stored: _transposed(stored)[:, 0::2])
            views[f"{experts}up_proj"] = (gate_up, lambda stored: _transposed(stored)[:, 1::2])
            views[f"{experts}down_proj"] = (down, _transposed)
    return views


def module_views(c: ModelConfig, maker: Maker, router: str) -> StoredViews:
    """Experts that are modules of their own, and the router, which `maker` names `router`."""
    parts = {"bias": "_bias", "weight": ""} if maker == "unsloth" else {"bias": "_bias", "weight_scale": "_scales"}
    views: StoredViews = {}
    for n in range(c.num_layers):
        layer = f"model.layers.{n}."
        experts = f"{layer}mlp.experts."
        views |= {f"{layer}mlp.router.{kind}": (f"{layer}{router}.{kind}", as_stored) for kind in ("weight", "bias")}
        for part, name in parts.items():
            gate_up, down = (module_names(maker, n, kind, part, c.experts_of(n)) for kind in ("gate_up", "down"))
            views[f"{experts}gate_proj{name}"] = (gate_up, _every_other(0))
            views[f"{experts}up_proj{name}"] = (gate_up, _every_other(1))
            views[f"{experts}down_proj{name}"] = (down, as_stored)
        if maker == "quark":
            gate_up, down = (module_names(maker, n, kind, "weight", c.experts_of(n)) for kind in ("gate_up", "down"))
            views[f"{experts}gate_proj_blocks"] = (gate_up, lambda stored: _in_blocks(stored)[:, 0::2])
            views[f"{experts}up_proj_blocks"] = (gate_up, lambda stored: _in_blocks(stored)[:, 1::2])
            views[f"{experts}down_proj_blocks"] = (down, _in_blocks)
    return views


def _in_blocks(stored: torch.Tensor) -> torch.Tensor:
    """uint8 [E, R, K / 2] -> [E, R, K / 32, 16]"""
    return stored.unflatten(-1, (-1, GROUP_SIZE // 2))
