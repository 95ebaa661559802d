"""EAGLE-3 heads for tests, in both dialects. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from gptoss.engine.model.model_config import ModelConfig

LAYER_KEYS = {
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "model_type": "llama",
}


def write_head(
    folder: Path,
    model: ModelConfig,
    dialect: str = "sglang",
    *,
    inter: int = 96,
    taps: Sequence[int] | None = (1, 3, 5),
    draft_vocab: int | None = 500,
    embedding: bool = False,
    biases: bool = False,
    tensors: dict[str, np.ndarray | None] | None = None,
    seed: int = 0,
    **keys: Any,
) -> Path:
    """A random head. `taps` None: the default ones; (): the final state. `draft_vocab` None: the model's head.

    `tensors` replaces some by the names of the speculators dialect; None leaves one out. `keys`: of config.json.
    """
    layer = LAYER_KEYS | {"intermediate_size": inter, "hidden_size": model.hidden_size, "vocab_size": model.vocab_size}
    top: dict[str, Any] = {"draft_vocab_size": draft_vocab}
    if taps is not None:
        top |= {"eagle_aux_hidden_state_layer_ids": list(taps)} if taps else {"use_aux_hidden_state": False}
    for key, value in keys.items():
        (layer if key in layer or key in ("layer_types", "sliding_window", "rope_scaling") else top)[key] = value
    if dialect == "speculators":
        found = {"architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3"}
        config = found | top | {"transformer_layer_config": layer}
    else:
        nested = ("eagle_aux_hidden_state_layer_ids", "use_aux_hidden_state", "norm_before_fc")
        eagle = {key: top.pop(key) for key in nested if key in top}
        config = {"architectures": ["LlamaForCausalLMEagle3"], "eagle_config": eagle} | layer | top
    num_taps = 3 if taps is None else len(taps)
    made = random_tensors(model, layer, num_taps, draft_vocab, embedding, biases, keys, np.random.default_rng(seed))
    for name, tensor in (tensors or {}).items():
        made.pop(name, None)
        made |= {} if tensor is None else {name: tensor}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({_stored(name, dialect): tensor for name, tensor in made.items()}, folder / "model.safetensors")
    return folder


def _stored(name: str, dialect: str) -> str:
    return name if dialect == "speculators" else name.replace("layers.0.", "midlayer.")


def random_tensors(
    model: ModelConfig,
    layer: dict[str, Any],
    num_taps: int,
    draft_vocab: int | None,
    embedding: bool,
    biases: bool,
    keys: dict[str, Any],
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    def normal(*shape: int, around: float = 0.0) -> np.ndarray:
        return (around + rng.normal(size=shape) * (0.1 if around else shape[-1] ** -0.5)).astype(np.float32)

    hidden, inter, dim = model.hidden_size, layer["intermediate_size"], layer["head_dim"]
    rows = {"q": layer["num_attention_heads"] * dim, "o": hidden}
    rows |= dict.fromkeys("kv", layer["num_key_value_heads"] * dim)
    a = "layers.0.self_attn."
    made = {f"{a}{x}_proj.weight": normal(rows[x], 2 * hidden if x != "o" else rows["q"]) for x in "qkvo"}
    if biases:
        made |= {f"{a}{x}_proj.bias": normal(rows[x]) for x in "qkvo"}
    made |= {f"layers.0.mlp.{x}_proj.weight": normal(inter, hidden) for x in ("gate", "up")}
    made["layers.0.mlp.down_proj.weight"] = normal(hidden, inter)
    norms = ("layers.0.hidden_norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    made |= {f"{name}.weight": normal(hidden, around=1.0) for name in norms}
    if num_taps:
        made["fc.weight"] = normal(hidden, num_taps * hidden)
    if keys.get("norm_before_fc"):
        made["input_norm.weight"] = normal(num_taps * hidden, around=1.0)
    if keys.get("fc_norm"):
        made |= {f"fc_norm.{i}.weight": normal(hidden, around=1.0) for i in range(num_taps)}
    if embedding:
        made["embed_tokens.weight"] = normal(model.vocab_size, hidden)
    if draft_vocab is not None:
        made["lm_head.weight"] = normal(draft_vocab, hidden)
        if draft_vocab != model.vocab_size:
            ids = np.sort(rng.permutation(model.vocab_size)[:draft_vocab])
            made["d2t"] = ids - np.arange(draft_vocab)
            made["t2d"] = np.isin(np.arange(model.vocab_size), ids)
    return made


def write_bigram_head(folder: Path, model: ModelConfig, embedding: np.ndarray, tokens: Sequence[int]) -> Path:
    """A head that knows which token follows each of `tokens`, which are all different.

    Its layer sees one position alone: the values are codes of the tokens, which the output projection takes to the
    successors' rows of the head. `embedding` float [V, H] is the model's.
    """
    known, successors = list(tokens[:-1]), list(tokens[1:])
    assert len(set(tokens)) == len(tokens) and len(tokens) <= 64
    hidden, count = model.hidden_size, len(known)
    rows = embedding[known].astype(np.float64)
    rows /= np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5)
    codes = np.eye(count, 64)
    value = np.zeros((128, 2 * hidden))
    value[:64, :hidden] = np.linalg.lstsq(rows, codes, rcond=None)[0].T
    out = np.zeros((hidden, 256))
    out[:count, :count] = np.eye(count)
    ids = np.array(sorted(successors))
    head = np.zeros((count, hidden))
    for number, token in enumerate(successors):
        head[np.searchsorted(ids, token), number] = 1.0
    ones, a = np.ones(hidden), "layers.0.self_attn."
    tensors = {
        f"{a}v_proj.weight": value,
        f"{a}o_proj.weight": out,
        "layers.0.mlp.down_proj.weight": np.zeros((hidden, 96)),
        "fc.weight": np.zeros((hidden, 3 * hidden)),
        "lm_head.weight": head,
        "norm.weight": ones,
        "layers.0.input_layernorm.weight": ones,
        "layers.0.hidden_norm.weight": 0 * ones,  # with norm_before_residual: nothing of the state counts
    }
    d2t: dict[str, np.ndarray | None] = {"d2t": ids - np.arange(count)}
    return write_head(
        folder,
        model,
        draft_vocab=count,
        tensors={name: tensor.astype(np.float32) for name, tensor in tensors.items()} | d2t,
        layer_types=["sliding_attention"],
        sliding_window=1,
        norm_before_residual=True,
    )
