"""The config.json that the keys of a GGUF file stand for. No torch: the API process reads it too."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptoss.config.errors import ConfigError
from gptoss.engine.model.model_config import FULL, SLIDING, ModelConfig
from gptoss.gguf_header import GgufError, GgufModel, read_model

ARCHITECTURES = ("gpt-oss", "gptoss")  # llama.cpp's name, Ollama's
EMBEDDING = "token_embd.weight"
GATE = "blk.0.ffn_gate_exps.weight"
# What llama.cpp assumes where a file has no such key: it is the same in all published models.
DEFAULTS = {
    "attention.key_length": 64,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.factor": 1.0,
    "rope.scaling.original_context_length": 4096,
}


def read_gguf_config(path: Path) -> ModelConfig:
    """The shape of the model in a GGUF file. Raises ConfigError, naming the file and the key."""
    try:
        return ModelConfig.from_json(gguf_config(read_model(path)))
    except GgufError as error:
        raise ConfigError(str(error)) from error


def gguf_config(model: GgufModel) -> dict[str, Any]:
    """The config.json, in Hugging Face's layout, of a model in GGUF.

    Raises:
        ConfigError: it is another architecture, or a key is missing or not a positive number.
    """
    path, keys, tensors = model.paths[0], model.keys, model.tensors
    architecture = keys.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"{path}: general.architecture is {architecture!r}, this server runs only 'gpt-oss'")
    for name in (EMBEDDING, GATE):
        if name not in tensors:
            raise ConfigError(f"{path}: tensor {name!r} is missing")

    def number(key: str) -> float:
        value = keys.get(f"{architecture}.{key}", DEFAULTS.get(key))
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            found = "missing" if value is None else f"{value!r}, expected a positive number"
            raise ConfigError(f"{path}: key {architecture}.{key} is {found}")
        return value

    def whole(key: str) -> int:
        value = number(key)
        if value != int(value):
            raise ConfigError(f"{path}: key {architecture}.{key} is {value!r}, expected a whole number")
        return int(value)

    layers = whole("block_count")
    if layers > len(tensors):
        raise ConfigError(f"{path}: key {architecture}.block_count is {layers}, but it has {len(tensors)} tensors")
    _check_kind(path, keys, architecture)
    return {
        "model_type": "gpt_oss",
        "num_hidden_layers": layers,
        "hidden_size": whole("embedding_length"),
        "intermediate_size": tensors[GATE].shape[-2],  # Ollama's files have no key for it
        "num_local_experts": whole("expert_count"),
        "num_experts_per_tok": whole("expert_used_count"),
        "num_attention_heads": whole("attention.head_count"),
        "num_key_value_heads": whole("attention.head_count_kv"),
        "head_dim": whole("attention.key_length"),
        "vocab_size": tensors[EMBEDDING].shape[0],
        "sliding_window": whole("attention.sliding_window"),
        "layer_types": [(SLIDING, FULL)[n % 2] for n in range(layers)],
        "max_position_embeddings": whole("context_length"),
        "rms_norm_eps": _decimal(number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(number("rope.freq_base")),
        "rope_scaling": _rope(number, whole),
        "swiglu_limit": 7.0,
        # experts in anything else are refused when the tensors are read
        "quantization_config": {"quant_method": "mxfp4"},
    }


def _check_kind(path: Path, keys: dict[str, Any], architecture: str) -> None:
    """Raises ConfigError for a model that computes something else than gpt-oss."""
    rope, width = (keys.get(f"{architecture}.{name}") for name in ("rope.scaling.type", "attention.value_length"))
    if rope not in (None, "yarn"):
        raise ConfigError(f"{path}: key {architecture}.rope.scaling.type is {rope!r}; gpt-oss uses 'yarn'")
    expected = keys.get(f"{architecture}.attention.key_length", DEFAULTS["attention.key_length"])
    if width not in (None, expected):
        raise ConfigError(
            f"{path}: key {architecture}.attention.value_length is {width!r}, expected key_length, {expected!r}"
        )


def _rope(number: Callable[[str], float], whole: Callable[[str], int]) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": _decimal(number("rope.scaling.factor")),
        "beta_fast": _decimal(number("rope.scaling.yarn_beta_fast")),
        "beta_slow": _decimal(number("rope.scaling.yarn_beta_slow")),
        "original_max_position_embeddings": whole("rope.scaling.original_context_length"),
        "truncate": False,
    }


def _decimal(value: float) -> float:
    """The number that was meant: 1e-05 for the float32 nearest to it."""
    return float(f"{value:.7g}")
