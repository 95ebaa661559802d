"""The shapes of the models that have a name, as their config.json states them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gptoss.engine.model.model_config import FULL, SLIDING


@dataclass(frozen=True, slots=True)
class Size:
    layers: int
    hidden: int
    intermediate: int
    experts: int
    heads: int
    kv_heads: int


# 20b and 120b: config.json of openai/gpt-oss-20b and openai/gpt-oss-120b.
# nano and mini are ours, for machines without a GPU.
SIZES: dict[str, Size] = {
    "nano": Size(layers=6, hidden=192, intermediate=160, experts=8, heads=4, kv_heads=2),
    "mini": Size(layers=24, hidden=576, intermediate=576, experts=32, heads=16, kv_heads=2),
    "20b": Size(layers=24, hidden=2880, intermediate=2880, experts=32, heads=64, kv_heads=8),
    "120b": Size(layers=36, hidden=2880, intermediate=2880, experts=128, heads=64, kv_heads=8),
}
VOCAB_SIZE = 201_088
EOS, PAD = 200_002, 199_999


def hf_config(size: Size, *, quantized: bool = True) -> dict[str, Any]:
    """config.json in Hugging Face's layout."""
    config: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": EOS,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": size.intermediate,
        "layer_types": [SLIDING, FULL] * (size.layers // 2),
        "max_position_embeddings": 131_072,
        "model_type": "gpt_oss",
        "num_attention_heads": size.heads,
        "num_experts_per_tok": 4,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "num_local_experts": size.experts,
        "output_router_logits": False,
        "pad_token_id": PAD,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150_000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }
    if quantized:
        config["quantization_config"] = {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        }
    return config


def original_config(size: Size) -> dict[str, Any]:
    """config.json in the layout of the `original/` folder."""
    return {
        "num_hidden_layers": size.layers,
        "num_experts": size.experts,
        "experts_per_token": 4,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "swiglu_limit": 7.0,
        "head_dim": 64,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "sliding_window": 128,
        "initial_context_length": 4096,
        "rope_theta": 150_000,
        "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1,
        "rope_ntk_beta": 32,
    }
