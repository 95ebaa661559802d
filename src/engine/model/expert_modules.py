"""Checkpoints whose experts are modules of their own: of Unsloth (bfloat16) and of AMD Quark (MXFP4).

    Unsloth   mlp.experts.gate_up_projs.E.{weight,bias}, mlp.experts.down_projs.E..., mlp.router.linear.{weight,bias}
    Quark     mlp.experts.E.gate_up_proj.{weight,weight_scale,bias}, mlp.experts.E.down_proj...

Rows of gate and up alternate in both, as in Hugging Face's layout.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.tensor_source import Shape
from gptoss.kernels.mxfp4 import GROUP_SIZE

Maker = Literal["unsloth", "quark"]
UNSLOTH = re.compile(r"\.mlp\.experts\.gate_up_projs\.\d+\.weight$")
QUARK = re.compile(r"\.mlp\.experts\.\d+\.gate_up_proj\.weight$")
# of quantised activations, which stay in bfloat16 here, and of KV caches
IGNORED = re.compile(r"\.(input_scale|output_scale|[qkv]_scale)$")
MODULES = {"unsloth": {"gate_up": "gate_up_projs.{e}", "down": "down_projs.{e}"}}
MODULES["quark"] = {"gate_up": "{e}.gate_up_proj", "down": "{e}.down_proj"}


def maker_of(names: Collection[str]) -> Maker | None:
    """Whose modules the tensors of that name are; None if experts are stacked."""
    if any(UNSLOTH.search(name) for name in names):
        return "unsloth"
    return "quark" if any(QUARK.search(name) for name in names) else None


def kv_scale_names(kind: str, layer: int) -> tuple[str, ...]:
    """The names of the scale of a layer's keys ("k") or values ("v").

    They are those of ModelOpt, compressed-tensors and AMD Quark.
    """
    attention = f"model.layers.{layer}.self_attn."
    names = (f"{kind}_proj.{kind}_scale", f"{kind}_scale", f"{kind}_proj.output_scale")
    return tuple(attention + name for name in names)


def module_names(maker: Maker, layer: int, kind: Literal["gate_up", "down"], part: str, count: int) -> tuple[str, ...]:
    """The tensors of all experts of a layer, in order. `part`: weight, weight_scale or bias."""
    pattern = f"model.layers.{layer}.mlp.experts.{MODULES[maker][kind]}.{part}"
    return tuple(pattern.format(e=number) for number in range(count))


def module_shapes(maker: Maker, c: ModelConfig, layer: int) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Name -> shape of a layer's experts: of dense tensors, and of bytes."""
    dense: dict[str, Shape] = {}
    packed: dict[str, Shape] = {}
    sizes: dict[Literal["gate_up", "down"], tuple[int, int]] = {
        "gate_up": (2 * c.intermediate_size, c.hidden_size),
        "down": (c.hidden_size, c.intermediate_size),
    }
    for kind, (rows, columns) in sizes.items():
        for part, shape, stored in (
            ("bias", (rows,), dense),
            ("weight", (rows, columns), dense) if maker == "unsloth" else ("weight", (rows, columns // 2), packed),
            ("weight_scale", (rows, columns // GROUP_SIZE), packed),
        ):
            if part != "weight_scale" or maker == "quark":
                stored |= dict.fromkeys(module_names(maker, layer, kind, part, c.experts_of(layer)), shape)
    return dense, packed
