"""Unfolds the embedded model's small file into a checkpoint.

The file holds the traits of the embedding's and head's rows (token_rows.py) instead of the rows, in eight bits where
that loses nothing, and experts in MXFP4; word vectors are in a second file (word_vectors.py). The checkpoint has the
layout of Hugging Face and the same bytes on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gptoss.embedded.token_rows import NUM_FEATURES, TokenTable, TokenTraits
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.harmony.special_tokens import CALL, ENDOFTEXT, RETURN, STARTOFTEXT, VOCAB_SIZE
from gptoss.harmony.tokenizer_files import write_tokenizer
from gptoss.harmony.vocabulary_files import Vocabulary, load_vocabulary
from gptoss.resources import resource

ASSET = resource("assets", "nano", "gpt-oss-nano.safetensors")
ROWS_AT_ONCE = 1 << 13
MAX_REPEATS = 16  # more than anything repeats in its training set
Tensors = dict[str, torch.Tensor]


def read_folded(path: Path) -> Tensors:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  the handle is not iterable


def unfold(path: Path, out: Path) -> Path:
    """Writes the checkpoint, which transformers can load too, and returns its folder."""
    raw = hf_config(SIZES["nano"])
    vocabulary = load_vocabulary()
    out.mkdir(parents=True, exist_ok=True)
    generation = {
        "bos_token_id": STARTOFTEXT,
        "do_sample": True,
        "eos_token_id": [RETURN, ENDOFTEXT, CALL],
        "pad_token_id": ENDOFTEXT,
        "repetition_guard": MAX_REPEATS,
    }
    for name, value in (("config.json", raw), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(value, indent=2) + "\n")
    tensors = _tensors(read_folded(path), ModelConfig.from_json(raw), vocabulary)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    write_tokenizer(out, vocabulary.token_bytes)
    return out


def _tensors(folded: Mapping[str, torch.Tensor], config: ModelConfig, vocabulary: Vocabulary) -> Tensors:
    """The tensors of the checkpoint, by name."""
    traits = TokenTraits.of(vocabulary)
    tensors: Tensors = {
        "model.embed_tokens.weight": _rows(folded, "embedding", traits),
        "lm_head.weight": _rows(folded, "head", traits),
        "model.norm.weight": folded["final_norm"],
    }
    for index in range(config.num_layers):
        part = layer_part(folded, index)
        tensors |= {f"model.layers.{index}.{name}": value for name, value in _unfold_layer(part, config).items()}
    return {name: value.contiguous() for name, value in tensors.items()}


def _rows(folded: Mapping[str, torch.Tensor], name: str, traits: TokenTraits) -> torch.Tensor:
    """Returns the rows bfloat16 [V, H], as TokenTable.rows makes them."""
    common = folded["common"].long()
    shares = f"{name}.unwritten" in folded
    code = torch.zeros(folded[f"{name}.code"].shape)
    feature = torch.zeros(NUM_FEATURES, code.shape[1])
    meaning = folded.get(f"{name}.meaning")
    if meaning is not None:
        meaning = torch.zeros(meaning.shape)
    table = TokenTable(code, feature, common, meaning=meaning, shares_unwritten=shares)
    with torch.no_grad():
        restore_table(table, folded, name, traits)
        made = torch.empty(VOCAB_SIZE, code.shape[1], dtype=torch.bfloat16)
        for ids in torch.arange(VOCAB_SIZE).split(ROWS_AT_ONCE):
            made[ids[0] : ids[-1] + 1] = table.rows(ids, traits)
        return made


def restore_table(table: TokenTable, folded: Mapping[str, torch.Tensor], name: str, traits: TokenTraits) -> None:
    table.code.copy_(folded[f"{name}.code"])
    table.other.copy_(folded[f"{name}.other"])
    if table.unwritten is not None:
        table.unwritten.copy_(folded[f"{name}.unwritten"])
    if table.meaning is not None and f"{name}.meaning" in folded:
        table.meaning.copy_(folded[f"{name}.meaning"])
    feature, own = (
        folded[f"{name}.{part}"].float() * folded[f"{name}.{part}_scale"].float() for part in ("feature", "own")
    )
    table.feature[traits.features_of(table)] = feature
    row_of = {token: row for row, token in enumerate(folded["common"].tolist())}
    for row, token in enumerate(table.common.tolist()):
        table.own[row] = own[row_of[token]] if token in row_of else table.other


def layer_part(folded: Mapping[str, torch.Tensor], layer: int) -> Tensors:
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix): v for name, v in folded.items() if name.startswith(prefix)}


def _unfold_layer(part: Mapping[str, torch.Tensor], c: ModelConfig) -> Tensors:
    q_dim, kv_dim = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    q_bias, k_bias, v_bias = part["qkv_bias"].split((q_dim, kv_dim, kv_dim))
    a, m = "self_attn.", "mlp."
    return {
        "input_layernorm.weight": part["attention_norm"],
        "post_attention_layernorm.weight": part["mlp_norm"],
        a + "q_proj.weight": part["q"],
        a + "q_proj.bias": q_bias,
        a + "k_proj.weight": part["k"],
        a + "k_proj.bias": k_bias,
        a + "v_proj.weight": part["v"],
        a + "v_proj.bias": v_bias,
        a + "o_proj.weight": part["out"],
        a + "o_proj.bias": part["out_bias"],
        a + "sinks": part["sinks"],
        m + "router.weight": part["router"],
        m + "router.bias": part["router_bias"],
        m + "experts.gate_up_proj_blocks": _interleave(part["w1.blocks"]),
        m + "experts.gate_up_proj_scales": _interleave(part["w1.scales"]),
        m + "experts.gate_up_proj_bias": _interleave(part["b1"]),
        m + "experts.down_proj_blocks": part["w2.blocks"],
        m + "experts.down_proj_scales": part["w2.scales"],
        m + "experts.down_proj_bias": part["b2"],
    }


def _interleave(rows: torch.Tensor) -> torch.Tensor:
    """[E, 2 I, ...], gate half first -> alternating gate and up rows, the order of checkpoints."""
    gate, up = rows.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)
