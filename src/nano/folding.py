"""The embedded model as a small file, and the checkpoint that unfolds from it.

The file keeps what the rows of embedding and head are made of (token_rows.py) instead of the rows, in eight bits where
that costs nothing, and experts in MXFP4; what words mean lies beside it (word_vectors.py). Unfolding gives a checkpoint
in Hugging Face's layout, the same bytes everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gptoss.engine.config import ModelConfig
from gptoss.engine.shapes import SIZES, hf_config
from gptoss.harmony.tokenizer_files import write_tokenizer
from gptoss.harmony.vocabulary import CALL, ENDOFTEXT, RETURN, STARTOFTEXT, VOCAB_SIZE, Vocabulary, load_vocabulary
from gptoss.kernels.mxfp4 import Mxfp4Tensor, dequantize_mxfp4, quantize_mxfp4
from gptoss.nano.network import Layer, Network
from gptoss.nano.token_rows import NUM_FEATURES, TokenTable, TokenTraits

ASSET = Path(__file__).resolve().parents[2] / "assets" / "nano" / "gpt-oss-nano.safetensors"
INT8_MAX = 127
ROWS_AT_ONCE = 1 << 13
Tensors = dict[str, torch.Tensor]
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


def read_folded(path: Path) -> Tensors:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a handle is no mapping


def restore(network: Network, folded: Mapping[str, torch.Tensor]) -> None:
    """Puts a folded model's weights, as rounded as they are, into a network. Its common tokens may be others."""
    with torch.no_grad():
        network.final_norm.copy_(folded["final_norm"])
        for name, table in (("embedding", network.embedding), ("head", network.head)):
            _restore_table(table, folded, name, network.traits)
        for index, layer in enumerate(network.layers):
            assert isinstance(layer, Layer)
            part = _part(folded, index)
            for name in PLAIN:
                getattr(layer, name).copy_(part[name])
            for name, experts in (("w1", layer.w1), ("w2", layer.w2)):
                packed = Mxfp4Tensor(part[f"{name}.blocks"], part[f"{name}.scales"])
                weights = dequantize_mxfp4(packed, torch.float32)
                for parameter, weight in zip(experts, weights, strict=True):
                    parameter.copy_(weight)


def unfold(path: Path, out: Path) -> Path:
    """Writes the whole checkpoint, which transformers loads too, and returns its folder."""
    raw = hf_config(SIZES["nano"])
    vocabulary = load_vocabulary()
    out.mkdir(parents=True, exist_ok=True)
    generation = {
        "bos_token_id": STARTOFTEXT, "do_sample": True, "eos_token_id": [RETURN, ENDOFTEXT, CALL], "pad_token_id": ENDOFTEXT,
    }  # fmt: skip
    for name, value in (("config.json", raw), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(value, indent=2) + "\n")
    tensors = _tensors(read_folded(path), ModelConfig.from_json(raw), vocabulary)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    write_tokenizer(out, vocabulary.token_bytes)
    return out


def _tensors(folded: Mapping[str, torch.Tensor], config: ModelConfig, vocabulary: Vocabulary) -> Tensors:
    """The checkpoint's, by their names there."""
    traits = TokenTraits.of(vocabulary)
    tensors: Tensors = {
        "model.embed_tokens.weight": _rows(folded, "embedding", traits),
        "lm_head.weight": _rows(folded, "head", traits),
        "model.norm.weight": folded["final_norm"],
    }
    for index in range(config.num_layers):
        part = _part(folded, index)
        tensors |= {f"model.layers.{index}.{name}": value for name, value in _unfold_layer(part, config).items()}
    return {name: value.contiguous() for name, value in tensors.items()}


def _rows(folded: Mapping[str, torch.Tensor], name: str, traits: TokenTraits) -> torch.Tensor:
    """-> bfloat16 [V, H], as TokenTable.rows makes them."""
    common = folded["common"].long()
    shares = f"{name}.unwritten" in folded
    code = torch.zeros(folded[f"{name}.code"].shape)
    feature = torch.zeros(NUM_FEATURES, code.shape[1])
    meaning = folded.get(f"{name}.meaning")
    if meaning is not None:
        meaning = torch.zeros(meaning.shape)
    table = TokenTable(code, feature, common, meaning=meaning, shares_unwritten=shares)
    with torch.no_grad():
        _restore_table(table, folded, name, traits)
        made = torch.empty(VOCAB_SIZE, code.shape[1], dtype=torch.bfloat16)
        for ids in torch.arange(VOCAB_SIZE).split(ROWS_AT_ONCE):
            made[ids[0] : ids[-1] + 1] = table.rows(ids, traits)
        return made


def _restore_table(table: TokenTable, folded: Mapping[str, torch.Tensor], name: str, traits: TokenTraits) -> None:
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


def _part(folded: Mapping[str, torch.Tensor], layer: int) -> Tensors:
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
    """[E, 2 I, ...], gate half first -> gate and up rows in turn, as checkpoints have them."""
    gate, up = rows.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)
