"""Reads one rank's part of a LoRA adapter, cut as its heads, experts and layers are.

Shapes: r rank, K inputs, N outputs, E experts, I intermediate.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable

import torch
from safetensors import SafetensorError, safe_open

from gptoss.engine.model.lora_file import WEIGHTS_FILE, AdaptedMatrix, AdapterError, AdapterFile
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.parallel.shards import Shard, whole
from gptoss.kernels.lora import LayerAdapter, LoraMatrices, Module

ReadTensor = Callable[[str], torch.Tensor]


def load_adapter(
    adapter: AdapterFile, model: ModelConfig, shard: Shard, dtype: torch.dtype, device: torch.device
) -> list[LayerAdapter]:
    """Returns a part for each layer of the rank.

    Raises AdapterError if a tensor cannot be read or is not finite.
    """
    by_module: dict[tuple[int, Module], list[AdaptedMatrix]] = defaultdict(list)
    for matrix in adapter.matrices:
        if matrix.layer in shard.layers:
            by_module[matrix.layer, matrix.module].append(matrix)
    path = adapter.folder / WEIGHTS_FILE
    loaded: dict[int, dict[Module, LoraMatrices]] = defaultdict(dict)
    try:
        with safe_open(path, framework="pt") as file:
            for (layer, module), matrices in by_module.items():
                a, b = _factors(matrices, file.get_tensor)
                a, b = _shard(module, a, b, model, shard)
                loaded[layer][module] = LoraMatrices(a.to(device, dtype).contiguous(), b.to(device, dtype).contiguous())
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    return [LayerAdapter(**loaded[layer]) for layer in shard.layers]


def load_layer(adapter: AdapterFile, model: ModelConfig, layer: int) -> LayerAdapter:
    """Returns one layer's part, whole and in float32, on the CPU.

    Raises AdapterError as load_adapter does.
    """
    shard = dataclasses.replace(whole(model), layers=range(layer, layer + 1))
    (part,) = load_adapter(adapter, model, shard, torch.float32, torch.device("cpu"))
    return part


def _factors(matrices: list[AdaptedMatrix], read: ReadTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, K] and the scaled B [r, N] in float32; of experts [E, r, K] and [E, r, N]."""

    def finite(name: str) -> torch.Tensor:
        tensor = read(name).float()
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"tensor {name!r} holds values that are not finite")
        return tensor

    first = matrices[0]
    if first.expert is not None:
        a = torch.stack([finite(m.a) for m in matrices])
        b = torch.stack([finite(m.b).t() for m in matrices])
    elif first.count > 1 or first.module in ("w1", "w2"):
        a = finite(first.a).view(first.count, first.rank, first.inputs)
        b = finite(first.b).view(first.outputs, first.rank, first.count).permute(2, 1, 0)
    else:
        a, b = finite(first.a), finite(first.b).t()
    return a, b * first.scale


def _shard(
    module: Module, a: torch.Tensor, b: torch.Tensor, model: ModelConfig, s: Shard
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part: the columns of B where ranks split the outputs, of A where they split the inputs."""
    match module:
        case "q":
            return a, b[:, _heads(s.query_heads, model)]
        case "k" | "v":
            return a, b[:, _heads(s.kv_heads, model)]
        case "out":
            return a[:, _heads(s.query_heads, model)], b
        case "router":
            return a, b
    experts, inter = slice(s.experts.start, s.experts.stop), s.intermediate
    a, b = a[experts], b[experts]
    if module == "w2":
        return a[:, :, inter.start : inter.stop], b
    gates = b[:, :, 2 * inter.start : 2 * inter.stop : 2]
    ups = b[:, :, 2 * inter.start + 1 : 2 * inter.stop : 2]
    return a, torch.cat((gates, ups), dim=2)


def _heads(heads: range, model: ModelConfig) -> slice:
    return slice(heads.start * model.head_dim, heads.stop * model.head_dim)
