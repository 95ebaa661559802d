"""An EAGLE-3 head in float64 and without a cache, from the tensors of its file: the oracle of tests."""

from __future__ import annotations

import functools

import numpy as np
import torch
from safetensors import safe_open

from gptoss.engine.model.draft_head import DraftHead
from gptoss.engine.model.gpt_oss import GptOss
from tests.support.helpers import checkpoint, load_model


@functools.cache
def model_of(dtype: torch.dtype) -> GptOss:
    """The small checkpoint's model in that type."""
    return load_model(
        checkpoint(), dtype, dequantize=dtype == torch.float32, kernels="torch" if dtype != torch.bfloat16 else "auto"
    )


def plain_guesses(
    head: DraftHead, model: GptOss, states: list[torch.Tensor], ids: list[int], num_more: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits and states of each guess, in float64 and without a cache, from the tensors of the file."""
    read = {name: stored_tensor(head, name) for name in head.tensors if name != "d2t"}
    hidden_size, eps = model.config.hidden_size, head.rms_norm_eps

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * read[f"{name}.weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ read[f"{name}.weight"].T + read.get(f"{name}.bias", 0)

    given = [state.double() for state in states]
    if head.fc_norm:
        given = [norm(state, f"fc_norm.{i}") for i, state in enumerate(given)]
    if head.taps:
        joined = torch.cat(given, dim=1)
        fused = linear(norm(joined, "input_norm") if head.norm_before_fc else joined, "fc")
    else:
        assert model.weights.final_norm is not None
        x = given[0]
        fused = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * model.weights.final_norm.double()
    frequencies, scale = _frequencies(head)
    logits, kept = [], []
    assert model.weights.embedding is not None
    lm_head = read["lm_head.weight"] if "lm_head.weight" in read else torch.as_tensor(model.weights.lm_head).double()
    for _ in range(1 + num_more):
        embedded = model.weights.embedding[ids].double()
        both = torch.cat((norm(embedded, "layers.0.input_layernorm"), norm(fused, "layers.0.hidden_norm")), dim=1)
        q, k, v = (
            linear(both, f"layers.0.self_attn.{x}_proj").view(len(ids), -1, head.head_dim).transpose(0, 1)
            for x in "qkv"
        )
        angles = torch.arange(len(ids)).double()[:, None] * frequencies
        q, k = (_rotated(x, angles.cos() * scale, angles.sin() * scale) for x in (q, k))
        repeat = head.num_heads // head.num_kv_heads
        scores = q @ k.repeat_interleave(repeat, 0).transpose(1, 2) * head.head_dim**-0.5
        distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
        seen = (distance >= 0) & (distance < (head.window or 1 << 30))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        attended = (weights @ v.repeat_interleave(repeat, 0)).transpose(0, 1).flatten(1)
        x = norm(fused, "layers.0.hidden_norm") if head.norm_before_residual else fused
        x = x + linear(attended, "layers.0.self_attn.o_proj")
        y = norm(x, "layers.0.post_attention_layernorm")
        y = torch.nn.functional.silu(linear(y, "layers.0.mlp.gate_proj")) * linear(y, "layers.0.mlp.up_proj")
        x = x + linear(y, "layers.0.mlp.down_proj")
        normed = norm(x, "norm")
        logits.append(normed[-1] @ lm_head.T)
        kept.append((normed if head.norm_output else x)[-1])
        best = int(logits[-1].argmax())
        if "d2t" in head.tensors:
            best += int(stored_tensor(head, "d2t")[best])
        ids, fused = [*ids, best], torch.cat((fused, kept[-1][None]))
        assert fused.shape == (len(ids), hidden_size)
    return logits, kept


def stored_tensor(head: DraftHead, name: str) -> torch.Tensor:
    tensor = head.tensors[name]
    with safe_open(tensor.file, framework="pt") as file:
        found: torch.Tensor = file.get_tensor(tensor.name)
    return found.double() if found.is_floating_point() else found


def _frequencies(head: DraftHead) -> tuple[torch.Tensor, float]:
    """As transformers 5.0 computes them (modeling_rope_utils.py), written out here."""
    dim, rope = head.head_dim, head.rope
    plain = rope.theta ** -(torch.arange(0, dim, 2).double() / dim)
    if rope.type == "llama3":
        turns = rope.original_max_position * plain / (2 * torch.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        mixed = (1 - smooth) * plain / rope.factor + smooth * plain
        high, low = turns > rope.high_freq_factor, turns < rope.low_freq_factor
        return torch.where(high, plain, torch.where(low, plain / rope.factor, mixed)), 1.0
    if rope.type == "yarn":
        bounds = [
            dim * np.log(rope.original_max_position / (turns * 2 * np.pi)) / (2 * np.log(rope.theta))
            for turns in (rope.beta_fast, rope.beta_slow)
        ]
        ramp = ((torch.arange(dim // 2).double() - bounds[0]) / (bounds[1] - bounds[0])).clamp(0, 1)
        return plain / rope.factor * ramp + plain * (1 - ramp), float(0.1 * np.log(rope.factor) + 1)
    return plain, 1.0


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
