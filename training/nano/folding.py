"""A trained network as the small file that travels with the server, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from gptoss.embedded.unfold import Tensors, layer_part, restore_table
from gptoss.kernels.mxfp4 import Mxfp4Tensor, dequantize_mxfp4, quantize_mxfp4
from training.nano.network import Layer, Network

INT8_MAX = 127
PLAIN = (
    "attention_norm", "q", "k", "v", "qkv_bias", "sinks", "out", "out_bias", "mlp_norm", "router", "router_bias",
    "b1", "b2",
)  # fmt: skip


def fold(network: Network, path: Path) -> None:
    tensors: Tensors = {"common": network.common.int(), "final_norm": network.final_norm.bfloat16()}
    for name, table in (("embedding", network.embedding), ("head", network.head)):
        tensors[f"{name}.code"] = table.code.bfloat16()
        tensors[f"{name}.other"] = table.other.bfloat16()
        if table.unwritten is not None:
            tensors[f"{name}.unwritten"] = table.unwritten.bfloat16()
        if table.meaning is not None:
            tensors[f"{name}.meaning"] = table.meaning.bfloat16()
        used = table.feature[network.traits.features_of(table)]
        for part, rows in (("feature", used), ("own", table.own)):
            scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-9).half() / INT8_MAX
            tensors[f"{name}.{part}"] = (rows / scale).round().clamp(-INT8_MAX, INT8_MAX).char()
            tensors[f"{name}.{part}_scale"] = scale.half()
    for index, layer in enumerate(network.layers):
        assert isinstance(layer, Layer)
        tensors |= {f"layers.{index}.{name}": value for name, value in _fold_layer(layer).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)


def _fold_layer(layer: Layer) -> Tensors:
    tensors = {name: getattr(layer, name).bfloat16() for name in PLAIN}
    for name, experts in (("w1", layer.w1), ("w2", layer.w2)):
        packed = quantize_mxfp4(torch.stack([w.detach() for w in experts]))
        tensors |= {f"{name}.blocks": packed.blocks, f"{name}.scales": packed.scales}
    return tensors


def restore(network: Network, folded: Mapping[str, torch.Tensor]) -> None:
    """Puts a folded model's weights, as rounded as they are, into a network. Its common tokens may be others."""
    with torch.no_grad():
        network.final_norm.copy_(folded["final_norm"])
        for name, table in (("embedding", network.embedding), ("head", network.head)):
            restore_table(table, folded, name, network.traits)
        for index, layer in enumerate(network.layers):
            assert isinstance(layer, Layer)
            part = layer_part(folded, index)
            for name in PLAIN:
                getattr(layer, name).copy_(part[name])
            for name, experts in (("w1", layer.w1), ("w2", layer.w2)):
                packed = Mxfp4Tensor(part[f"{name}.blocks"], part[f"{name}.scales"])
                weights = dequantize_mxfp4(packed, torch.float32)
                for parameter, weight in zip(experts, weights, strict=True):
                    parameter.copy_(weight)
