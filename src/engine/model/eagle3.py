"""An EAGLE-3 draft head on one device: its weights, and how it guesses.

Li et al. 2025, arXiv 2503.01840. At position i the head takes the model's states there, fused into one, and the
embedding of token i + 1, and guesses token i + 2. For the guess after that it takes its own state in place of the
model's. Its layer goes through the operations of a kernel backend that is made for the head's sizes.

Shapes: T tokens, H hidden, V vocabulary of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from gptoss.engine.model.draft_head import LAYER, DraftHead
from gptoss.engine.model.draft_head_config import DraftHeadError
from gptoss.engine.model.gpt_oss import GptOss
from gptoss.kernels.backend import KernelBackend
from gptoss.kernels.layers import (
    FULL_GROUP,
    ExpertWeights,
    HeadWeight,
    LayerCache,
    LayerShape,
    LayerWeights,
    RopeScaling,
)
from gptoss.kernels.reference.backend import ReferenceBackend
from gptoss.kernels.reference.rms_norm import rms_norm_ref

KERNEL_HEAD_DIM = 64  # of the compiled kernels; heads of another size run on plain torch
NO_SINK = -1e30  # a sink of weight 0: Llama layers have none


@dataclass(frozen=True, slots=True)
class Eagle3Weights:
    """The tensors of a head. None: the model's is used, or the head has none."""

    fc: torch.Tensor | None  # [H, taps H]
    input_norm: torch.Tensor | None  # [taps H]
    fc_norms: tuple[torch.Tensor, ...]  # [H] for each tap
    embed_norm: torch.Tensor  # [H]
    hidden_norm: torch.Tensor  # [H]
    layer: LayerWeights  # its norm is that of both halves of the input
    gate_up: torch.Tensor  # [2 I, H]
    down: torch.Tensor  # [H, I]
    norm: torch.Tensor  # [H]
    embedding: torch.Tensor | None  # [vocabulary of the model, H]
    lm_head: HeadWeight | None  # [V, H]
    target_ids: torch.Tensor | None  # int64 [V], the model's token of each of the head's

    def tensors(self) -> Iterator[torch.Tensor]:
        layer = self.layer
        found = [self.fc, self.input_norm, *self.fc_norms, self.embed_norm, self.hidden_norm, layer.qkv, layer.qkv_bias]
        found += [layer.out, layer.out_bias, layer.mlp_norm, self.gate_up, self.down, self.norm, self.embedding]
        for tensor in [*found, self.lm_head, self.target_ids]:
            if isinstance(tensor, torch.Tensor):
                yield tensor


class _AnyStep:
    """What an output head reads of a step: no buffer for the logits."""

    logits = None


class Eagle3Head:
    """Guesses the model's next tokens. Holds no request state: the cache is the caller's."""

    def __init__(self, head: DraftHead, model: GptOss, max_positions: int) -> None:
        """Loads the weights to the model's device, in its type.

        Raises:
            DraftHeadError: a file cannot be read.
        """
        self.description = head
        self.kernels = _kernels(head, model, max_positions)
        self._model = model
        self._eps = head.rms_norm_eps
        self.weights = _load(head, model, self.kernels)
        self.weight_bytes = sum(tensor.nbytes for tensor in self.weights.tensors())
        self._ones = torch.ones_like(self.weights.norm)

    @torch.inference_mode()
    def fuse(self, states: list[torch.Tensor]) -> torch.Tensor:
        """The model's states [T, H] at the taps -> [T, H]."""
        w = self.weights
        states = [state.to(self.kernels.dtype) for state in states]
        if w.fc is None:
            final_norm = self._model.weights.final_norm
            assert final_norm is not None, "the head is on the rank of the last stage"
            return rms_norm_ref(states[0], final_norm, self._model.config.rms_norm_eps)
        if w.fc_norms:
            states = [self._norm(state, scale) for state, scale in zip(states, w.fc_norms, strict=True)]
        x = torch.cat(states, dim=1)
        return self.kernels.linear(x if w.input_norm is None else self._norm(x, w.input_norm), w.fc, None, None)

    def zero_states(self, num_tokens: int) -> list[torch.Tensor]:
        """Zeros in place of the model's states [T, H] at the taps."""
        c, kernels = self._model.config, self.kernels
        zeros = torch.zeros(num_tokens, c.hidden_size, dtype=kernels.dtype, device=kernels.device)
        return [zeros for _ in self.description.boundaries(c.num_layers)]

    @torch.inference_mode()
    def store(self, next_ids: torch.Tensor, hidden: torch.Tensor, cache: LayerCache, step: Any) -> None:
        """Writes the keys and values of positions; next_ids int64 [T] follow them, hidden [T, H] is fused."""
        self.kernels.norm_qkv(self._joined(next_ids, hidden), self.weights.layer, cache, step)

    @torch.inference_mode()
    def guess(
        self, next_ids: torch.Tensor, hidden: torch.Tensor, cache: LayerCache, step: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `store`; returns the tokens guessed after next_ids, int64 [T], and the head's states [T, H]."""
        w, kernels = self.weights, self.kernels
        query = kernels.norm_qkv(self._joined(next_ids, hidden), w.layer, cache, step)
        attended = kernels.attention(query, w.layer, cache, step)
        residual = self._norm(hidden, w.hidden_norm) if self.description.norm_before_residual else hidden
        x = kernels.linear(attended, w.layer.out, w.layer.out_bias, residual)
        gate, up = kernels.linear(self._norm(x, w.layer.mlp_norm), w.gate_up, None, None).chunk(2, dim=1)
        x = kernels.linear(F.silu(gate) * up, w.down, None, x)
        best = self._logits(x).argmax(dim=1)
        ids = best if w.target_ids is None else w.target_ids[best]
        return ids, self._norm(x, w.norm) if self.description.norm_output else x

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] -> float32 [T, V]."""
        rows, norm = torch.arange(len(x), device=x.device), self.weights.norm
        if self.weights.lm_head is not None:
            return self.kernels.norm_head(x, rows, norm, self.weights.lm_head, _AnyStep())
        lm_head = self._model.weights.lm_head
        assert lm_head is not None, "the head is on the rank of the last stage"
        return self._model.kernels.norm_head(x, rows, norm, lm_head, _AnyStep())

    def _joined(self, next_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's input [T, 2 H], both halves normed without their scales.

        The norm of the whole, which the operation `norm_qkv` begins with, is then one, and applies the scales.
        """
        table = self._model.weights.embedding if self.weights.embedding is None else self.weights.embedding
        assert table is not None, "the head is on the rank of the first stage"
        embedded = F.embedding(next_ids, table)
        return torch.cat((self._norm(embedded, self._ones), self._norm(hidden, self._ones)), dim=1)

    def _norm(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return rms_norm_ref(x, scale, self._eps)


def _kernels(head: DraftHead, model: GptOss, max_positions: int) -> KernelBackend[Any]:
    """The model's kind of kernels, for the head's sizes."""
    rope = head.rope
    shape = LayerShape(
        num_heads=head.num_heads,
        num_kv_heads=head.num_kv_heads,
        head_dim=head.head_dim,
        windows=(head.window,),
        rope=RopeScaling(
            rope.theta,
            rope.factor if rope.type != "default" else 1.0,
            rope.beta_fast,
            rope.beta_slow,
            rope.original_max_position,
            rope.truncate,
            rope.attention_factor if rope.type == "yarn" else None,
            rope.low_freq_factor if rope.type == "llama3" else None,
            rope.high_freq_factor,
        ),
        max_positions=max_positions,
        rms_norm_eps=head.rms_norm_eps,
        num_experts=0,
        local_experts=None,
        experts_per_token=0,
        swiglu_limit=0.0,
    )
    like = model.kernels
    if head.head_dim != KERNEL_HEAD_DIM:
        return ReferenceBackend(shape, like.dtype, like.device)
    return like.for_shape(shape)


def _load(head: DraftHead, model: GptOss, kernels: KernelBackend[Any]) -> Eagle3Weights:
    read = _Reader(head, kernels.dtype, kernels.device)
    a, m = LAYER + "self_attn.", LAYER + "mlp."
    embed_norm, hidden_norm = read(f"{LAYER}input_layernorm.weight"), read(f"{LAYER}hidden_norm.weight")
    qkv = torch.cat([read(f"{a}{x}_proj.weight") for x in "qkv"])
    biases = [read.optional(f"{a}{x}_proj.bias", head.tensors[f"{a}{x}_proj.weight"].shape[0]) for x in "qkv"]
    hidden, empty = model.config.hidden_size, torch.empty(0, dtype=kernels.dtype, device=kernels.device)
    layer = LayerWeights(
        group=FULL_GROUP,
        attention_norm=torch.cat((embed_norm, hidden_norm)),
        qkv=qkv,
        qkv_bias=torch.cat(biases),
        sinks=torch.full((head.num_heads,), NO_SINK, dtype=kernels.dtype, device=kernels.device),
        out=read(a + "o_proj.weight"),
        out_bias=read.optional(a + "o_proj.bias", hidden),
        mlp_norm=read(f"{LAYER}post_attention_layernorm.weight"),
        router=empty,
        router_bias=empty,
        experts=ExpertWeights(empty, empty, empty, empty),
    )
    own = "lm_head.weight" in head.tensors
    return Eagle3Weights(
        fc=read("fc.weight") if head.taps else None,
        input_norm=read("input_norm.weight") if head.norm_before_fc else None,
        fc_norms=tuple(read(f"fc_norm.{i}.weight") for i in range(len(head.taps))) if head.fc_norm else (),
        embed_norm=embed_norm,
        hidden_norm=hidden_norm,
        layer=layer,
        gate_up=torch.cat([read(f"{m}{x}_proj.weight") for x in ("gate", "up")]),
        down=read(m + "down_proj.weight"),
        norm=read("norm.weight"),
        embedding=read("embed_tokens.weight") if "embed_tokens.weight" in head.tensors else None,
        lm_head=kernels.prepare_head(read("lm_head.weight")) if own else None,
        target_ids=_target_ids(read) if "d2t" in head.tensors else None,
    )


class _Reader:
    """Reads the tensors of a head by their names in the speculators dialect."""

    def __init__(self, head: DraftHead, dtype: torch.dtype, device: torch.device) -> None:
        self.head = head
        self.dtype, self.device = dtype, device

    def __call__(self, name: str) -> torch.Tensor:
        return self.stored(name).to(self.device, self.dtype).contiguous()

    def optional(self, name: str, size: int) -> torch.Tensor:
        """A bias [size]; zeros if the head has none."""
        if name in self.head.tensors:
            return self(name)
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def stored(self, name: str) -> torch.Tensor:
        """The tensor as it is in the file. Raises DraftHeadError if it cannot be read."""
        tensor = self.head.tensors[name]
        try:
            with safe_open(tensor.file, framework="pt") as file:
                found: torch.Tensor = file.get_tensor(tensor.name)
                return found
        except (SafetensorError, OSError) as error:
            raise DraftHeadError(f"{tensor.file} is truncated or damaged: {error}") from None


def _target_ids(read: _Reader) -> torch.Tensor:
    """The model's token of each of the head's, which d2t has as differences (checked in draft_head.py)."""
    differences = read.stored("d2t").to(torch.int64)
    ids = differences + torch.arange(len(differences))
    return ids.to(read.device)
