"""gpt-oss, top to bottom: gpt-oss model card, section 2, and OpenAI's reference implementation.

Shapes: T tokens of all sequences in the batch one after another, H hidden, N query heads, G key-value heads,
D head_dim, V vocabulary, R sequences to sample from.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from gptoss.engine.model.forward_batch import ForwardBatch, LayerCache
from gptoss.engine.model.model_config import SLIDING, ModelConfig
from gptoss.engine.model.native_layers import NativeLayers
from gptoss.engine.model.weights import LayerWeights, ModelWeights
from gptoss.engine.parallel.communicator import Communicator
from gptoss.kernels.attention import AttentionPlan, paged_attention
from gptoss.kernels.cpu import native
from gptoss.kernels.cpu.shared_rows import share_rows
from gptoss.kernels.kv_cache import rope_and_store
from gptoss.kernels.linear import linear
from gptoss.kernels.moe import moe_forward
from gptoss.kernels.reference.moe import ExpertWeights
from gptoss.kernels.reference.rope import rope_tables, yarn_inverse_frequencies
from gptoss.kernels.rms_norm import rms_norm


class GptOss:
    """One rank's layers over its weights. Holds no request state: the cache is the caller's.

    Of the ranks of a stage each computes some heads and some of the experts' rows; what they add to the residual
    stream is summed. The stream is float32 where the type is float16, whose range it leaves (65,504).
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights, comm: Communicator) -> None:
        self.config = config
        self.weights = weights
        dtype = weights.layers[0].qkv.dtype
        self.residual_dtype = torch.float32 if dtype == torch.float16 else dtype
        self._comm = comm
        self._shard = comm.shard
        self._dtype = dtype
        self._scale = config.head_dim**-0.5
        self._inverse_frequencies, self._concentration = yarn_inverse_frequencies(
            config.head_dim,
            config.rope_theta,
            config.rope_factor,
            config.rope_beta_fast,
            config.rope_beta_slow,
            config.rope_original_max_position,
        )
        self._head_places: torch.Tensor | None = None
        if weights.lm_head is not None and native.supports(weights.lm_head):
            shared = share_rows(weights.lm_head)
            if shared is not None:
                self.weights = replace(weights, lm_head=shared[0])
                self._head_places = shared[1]
        first = weights.layers[0]
        self._native: NativeLayers | None = None
        if comm.shard.tensor_size == 1 and native.supports(first.qkv) and isinstance(first.experts, ExpertWeights):
            kinds = [config.layer_types[index] for index in comm.shard.layers]
            self._native = NativeLayers(config, kinds, weights.layers)
        device = weights.layers[0].attention_norm.device
        self._inverse_frequencies = self._inverse_frequencies.to(device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: list[LayerCache], hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Writes the new keys and values into `cache`. `hidden` [T, H] is what the stage before returned.

        -> of the last stage the logits float32 [R, V] of `batch.sample_rows` (this rank's part of V); of others the
        hidden states [T, H].
        """
        x = self._embed(batch.token_ids) if hidden is None else hidden
        rope = self._rotation(batch)
        if self._native is not None:
            x = self._native(x, rope, batch.plans, cache)
        else:
            for index in range(len(self.weights.layers)):
                x = self._layer(x, index, batch, cache[index], rope)
        return x if self.weights.lm_head is None else self._head(x, batch.sample_rows, batch.logits)

    @torch.inference_mode()
    def run_layer(self, x: torch.Tensor, index: int, batch: ForwardBatch, cache: LayerCache) -> torch.Tensor:
        """x [T, H] -> [T, H], through layer `index` of this rank alone."""
        return self._layer(x, index, batch, cache, self._rotation(batch))

    def _layer(
        self,
        x: torch.Tensor,
        index: int,
        batch: ForwardBatch,
        cache: LayerCache,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        layer_type = self.config.layer_types[self._shard.layers[index]]
        layer, plan = self.weights.layers[index], batch.plans[layer_type]
        return self._mlp(self._attention(x, layer, layer_type, plan, cache, rope), layer)

    def _rotation(self, batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of a step's positions, for all its layers."""
        return rope_tables(batch.positions, self._inverse_frequencies, self._concentration)

    def _head(self, x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        norm, head = self.weights.final_norm, self.weights.lm_head
        assert norm is not None and head is not None, "only the last stage has them"
        logits = linear(self._norm(x[rows], norm), head, out_dtype=torch.float32)
        places = self._head_places
        return logits if places is None else logits.gather(1, places.expand(len(logits), -1))

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        table = self.weights.embedding
        assert table is not None, "only the first stage embeds"
        vocab = self._shard.vocab
        if len(vocab) == self.config.vocab_size:
            return F.embedding(token_ids, table).to(self.residual_dtype)
        mine = (token_ids >= vocab.start) & (token_ids < vocab.stop)
        rows = F.embedding(torch.where(mine, token_ids - vocab.start, 0), table)
        return self._comm.all_reduce((rows * mine.unsqueeze(-1)).to(self.residual_dtype))

    def _norm(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, scale, self.config.rms_norm_eps, out_dtype=self._dtype)

    def _attention(
        self,
        x: torch.Tensor,
        layer: LayerWeights,
        layer_type: str,
        plan: AttentionPlan,
        cache: LayerCache,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        c = self.config
        t = self._norm(x, layer.attention_norm)
        qkv = linear(t, layer.qkv, layer.qkv_bias).view(x.shape[0], -1, c.head_dim)
        qkv = rope_and_store(qkv, rope, cache.key, cache.value, plan.slot_mapping, len(self._shard.query_heads))
        window = c.sliding_window if layer_type == SLIDING else None
        t = paged_attention(qkv, cache.key, cache.value, layer.sinks, plan, window, self._scale)
        return self._comm.all_reduce(linear(t, layer.out, layer.out_bias, residual=self._once(x)))

    def _mlp(self, x: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        c = self.config
        assert isinstance(layer.experts, ExpertWeights), "packed experts are for the Triton kernels"
        t = self._norm(x, layer.mlp_norm)
        logits = linear(t, layer.router, layer.router_bias)
        return self._comm.all_reduce(
            moe_forward(
                t, logits, c.experts_per_token, layer.experts, c.swiglu_limit, self._once(x), self._local_experts
            )
        )

    @property
    def _local_experts(self) -> range | None:
        """This rank's experts, where ranks share them out."""
        mine = self._shard.experts
        return mine if len(mine) < self.config.num_experts else None

    def _once(self, x: torch.Tensor) -> torch.Tensor:
        """The residual on the one rank that adds it."""
        return x if self._shard.leads else torch.zeros_like(x)
