"""The shape of a gpt-oss model, from its config.json."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptoss.config.errors import ConfigError

SLIDING, FULL = "sliding_attention", "full_attention"
WIDE = "wide_attention"  # ours: a second, wider window, in models whose layers differ
PUZZLE = "gpt_oss_puzzle"  # NVIDIA's models of layers that differ

COUNTS = (  # keys of config.json that are positive whole numbers
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_local_experts",
    "num_experts_per_tok",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
OTHERS = ("rms_norm_eps", "swiglu_limit")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a gpt-oss model, from its config.json."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    experts_per_token: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int
    layer_types: tuple[str, ...]
    max_position: int
    rope_theta: float
    rope_factor: float
    rope_beta_fast: float
    rope_beta_slow: float
    rope_original_max_position: int
    rms_norm_eps: float
    swiglu_limit: float
    quantized: bool  # experts in MXFP4
    layer_experts: tuple[int, ...] = ()  # of each layer, where they differ; num_experts is the largest
    wide_window: int | None = None  # of layers of type WIDE

    def experts_of(self, layer: int) -> int:
        return self.layer_experts[layer] if self.layer_experts else self.num_experts

    @property
    def cache_kinds(self) -> tuple[str, ...]:
        """FULL or SLIDING for each layer: the group of blocks in which its keys are kept.

        Those of WIDE layers are kept whole.
        """
        return tuple(SLIDING if kind == SLIDING else FULL for kind in self.layer_types)

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> ModelConfig:
        """Reads the config.json of both layouts: Hugging Face's, and `original/`, which states fewer keys.

        Raises:
            ConfigError: a key is missing, or the model is not a gpt-oss.
        """
        if not isinstance(config, dict):
            raise ConfigError("config.json must hold an object")
        if "experts_per_token" in config and "num_experts" in config and "model_type" not in config:
            config = _from_original(config)
        if config.get("model_type") == PUZZLE:
            return _from_puzzle(config)
        if config.get("model_type") != "gpt_oss":
            raise ConfigError(f"model_type is {config.get('model_type')!r}, this server runs only 'gpt_oss'")
        try:
            _check_values(config)
            return _from_hf(config)
        except KeyError as error:
            raise ConfigError(f"config.json lacks {error}") from error

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        return cls.from_json(config)


def _check_values(c: dict[str, Any]) -> None:
    """Raises ConfigError for a value that no model can have."""
    for key in (*COUNTS, "sliding_window"):
        if not _is_count(c[key], False):
            raise ConfigError(f"config.json: {key} is {c[key]!r}, expected a positive whole number")
    if c["num_experts_per_tok"] > c["num_local_experts"]:
        raise ConfigError(
            f"config.json: num_experts_per_tok is {c['num_experts_per_tok']}, above num_local_experts, "
            f"{c['num_local_experts']}"
        )
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(c.get(key) or {}, dict):
            raise ConfigError(f"config.json: {key} is {c[key]!r}, expected an object")
    rope = {**c, **(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    for key in ("rope_theta", "factor", "beta_fast", "beta_slow", "original_max_position_embeddings", *OTHERS):
        if key in rope and not _is_positive(rope[key]):
            raise ConfigError(f"config.json: {key} is {rope[key]!r}, expected a positive number")
    _check_layer_types(c.get("layer_types"), c["num_hidden_layers"])


def _check_layer_types(types: Any, num_layers: int) -> None:
    if not types:
        return
    if not isinstance(types, list) or len(types) != num_layers:
        raise ConfigError(f"config.json: layer_types must be a list with an entry for each of the {num_layers} layers")
    for number, kind in enumerate(types):
        if kind not in (SLIDING, FULL, WIDE):
            raise ConfigError(f"config.json: layer_types[{number}] is {kind!r}, expected {SLIDING!r} or {FULL!r}")


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _from_hf(c: dict[str, Any]) -> ModelConfig:
    # transformers 5 writes rope_parameters, earlier releases rope_theta and rope_scaling
    rope = c.get("rope_parameters") or {"rope_theta": c["rope_theta"], **(c.get("rope_scaling") or {})}
    if rope.get("rope_type", "default") not in ("yarn", "default"):
        raise ConfigError(f"rope_type {rope['rope_type']!r} is not supported; gpt-oss uses 'yarn'")
    num_layers = c["num_hidden_layers"]
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_experts=c["num_local_experts"],
        experts_per_token=c["num_experts_per_tok"],
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        vocab_size=c["vocab_size"],
        sliding_window=c["sliding_window"],
        layer_types=tuple(c.get("layer_types") or ((SLIDING, FULL) * num_layers)[:num_layers]),
        max_position=c["max_position_embeddings"],
        rope_theta=float(rope["rope_theta"]),
        rope_factor=float(rope.get("factor", 1.0)),
        rope_beta_fast=float(rope.get("beta_fast", 32.0)),
        rope_beta_slow=float(rope.get("beta_slow", 1.0)),
        rope_original_max_position=int(rope.get("original_max_position_embeddings", 4096)),
        rms_norm_eps=float(c.get("rms_norm_eps", 1e-5)),
        swiglu_limit=float(c.get("swiglu_limit", 7.0)),
        quantized=bool(c.get("quantization_config")),
    )


def _from_puzzle(c: dict[str, Any]) -> ModelConfig:
    """Reads a config whose `block_configs` has the number of experts and the window of each layer."""
    blocks = c.get("block_configs")
    if not isinstance(blocks, list) or len(blocks) != c.get("num_hidden_layers"):
        raise ConfigError("config.json: block_configs must be a list with an entry for each layer")
    for number, block in enumerate(blocks):
        if not isinstance(block, dict) or not {"num_local_experts", "sliding_window"} <= block.keys():
            raise ConfigError(f"config.json: block_configs[{number}] lacks num_local_experts or sliding_window")
        for key, value in block.items():
            if key in ("num_local_experts", "sliding_window") and not _is_count(value, key == "sliding_window"):
                raise ConfigError(
                    f"config.json: block_configs[{number}].{key} is {value!r}, expected a positive number"
                )
    experts = tuple(block["num_local_experts"] for block in blocks)
    windows = [block["sliding_window"] for block in blocks]
    sizes = sorted({window for window in windows if window is not None})
    if not 1 <= len(sizes) <= 2:
        raise ConfigError(f"config.json: block_configs has {len(sizes)} sizes of windows, 1 or 2 are supported")
    kinds = {None: FULL, sizes[0]: SLIDING} | dict.fromkeys(sizes[1:], WIDE)
    plain = {
        **c,
        "model_type": "gpt_oss",
        "num_local_experts": max(experts),
        "sliding_window": sizes[0],
        "layer_types": [kinds[window] for window in windows],
    }
    config = ModelConfig.from_json(plain)
    return replace(
        config,
        layer_experts=experts if len(set(experts)) > 1 else (),
        wide_window=sizes[1] if len(sizes) > 1 else None,
    )


def _is_count(value: Any, optional: bool) -> bool:
    return (optional and value is None) or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def _from_original(c: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "gpt_oss",
        "num_hidden_layers": c["num_hidden_layers"],
        "hidden_size": c["hidden_size"],
        "intermediate_size": c["intermediate_size"],
        "num_local_experts": c["num_experts"],
        "num_experts_per_tok": c["experts_per_token"],
        "num_attention_heads": c["num_attention_heads"],
        "num_key_value_heads": c["num_key_value_heads"],
        "head_dim": c["head_dim"],
        "vocab_size": c["vocab_size"],
        "sliding_window": c["sliding_window"],
        "max_position_embeddings": int(c["initial_context_length"] * c["rope_scaling_factor"]),
        "swiglu_limit": c.get("swiglu_limit", 7.0),
        "rope_theta": c["rope_theta"],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": c["rope_scaling_factor"],
            "beta_fast": c["rope_ntk_beta"],
            "beta_slow": c["rope_ntk_alpha"],
            "original_max_position_embeddings": c["initial_context_length"],
        },
        "quantization_config": {"quant_method": "mxfp4"},
    }
