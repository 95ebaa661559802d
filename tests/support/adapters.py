"""Random LoRA adapters: made by PEFT, or written as PEFT writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gptoss.engine.model.model_config import ModelConfig

Q, K, V, OUT = (f"self_attn.{name}_proj" for name in "qkvo")
ROUTER, GATE_UP, DOWN = "mlp.router.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def write_adapter(
    folder: Path, model: ModelConfig, *, rank: int = 4, seed: int = 0, scale: float = 0.05, **config: Any
) -> Path:
    """Writes an adapter of random matrices for `target_modules` and `target_parameters` of each layer."""
    modules = config.setdefault("target_modules", ATTENTION)
    parameters = config.setdefault("target_parameters", None) or []
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "use_rslora": False}
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(model.num_layers):
        for path, count, inputs, outputs in _targets(model, modules, parameters):
            name = f"base_model.model.model.layers.{layer}.{path}"
            tensors[f"{name}.lora_A.weight"] = scale * torch.randn(count * rank, inputs, generator=generator)
            tensors[f"{name}.lora_B.weight"] = scale * torch.randn(outputs, rank * count, generator=generator)
    return save_adapter(folder, settings | config, tensors)


def save_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _targets(c: ModelConfig, modules: list[str], parameters: list[str]) -> list[tuple[str, int, int, int]]:
    """Path, matrices, inputs and outputs of each adapted module of a layer."""
    heads, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    sizes = {"q": (c.hidden_size, heads), "k": (c.hidden_size, groups), "v": (c.hidden_size, groups)}
    sizes["o"] = (heads, c.hidden_size)
    found = [(f"self_attn.{name}", 1, *sizes[name[0]]) for name in modules]
    if ROUTER in parameters:
        found.append(("mlp.router", 1, c.hidden_size, c.num_experts))
    both = GATE_UP in parameters and DOWN in parameters
    if GATE_UP in parameters:
        path = "mlp.experts.base_layer" if both else "mlp.experts"
        found.append((path, c.num_experts, c.hidden_size, 2 * c.intermediate_size))
    if DOWN in parameters:
        found.append(("mlp.experts", c.num_experts, c.intermediate_size, c.hidden_size))
    return found
