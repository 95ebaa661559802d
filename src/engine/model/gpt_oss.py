"""gpt-oss, top to bottom: gpt-oss model card, section 2, and OpenAI's reference implementation.

Shapes: T tokens of all sequences in the batch one after another, H hidden, V vocabulary, R rows to sample from.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from gptoss.engine.model.forward_batch import ForwardBatch
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.weights import ModelWeights
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import Shard
from gptoss.kernels.backend import KernelBackend
from gptoss.kernels.layers import LayerCache, LayerShape, LayerWeights, RopeScaling
from gptoss.kernels.lora import LoraTable


def layer_shape(c: ModelConfig, shard: Shard, max_positions: int) -> LayerShape:
    """What the kernels must know of the layers of one rank."""
    return LayerShape(
        num_heads=len(shard.query_heads),
        num_kv_heads=len(shard.kv_heads),
        head_dim=c.head_dim,
        windows=(None, c.sliding_window) if c.wide_window is None else (None, c.sliding_window, c.wide_window),
        rope=RopeScaling(c.rope_theta, c.rope_factor, c.rope_beta_fast, c.rope_beta_slow, c.rope_original_max_position),
        max_positions=max_positions,
        rms_norm_eps=c.rms_norm_eps,
        num_experts=c.num_experts,
        local_experts=shard.experts if len(shard.experts) < c.num_experts else None,
        experts_per_token=c.experts_per_token,
        swiglu_limit=c.swiglu_limit,
    )


class GptOss:
    """One rank's layers over its weights. Holds no request state: the cache is the caller's.

    Each rank of a stage computes some heads and some of the experts' rows, and the ranks sum what they add to the
    residual stream. The stream is float32 where the type is float16, whose range it exceeds (65,504).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        comm: Communicator,
        kernels: KernelBackend[Any],
        lora: LoraTable | None = None,
        taps: tuple[int, ...] = (),
    ) -> None:
        """`lora`: the adapters that may be loaded.

        `taps`: boundaries between layers, in order, whose hidden states a draft head takes. Boundary i is before layer
        i, the last one after the last layer.
        """
        if lora is not None:
            pairs = zip(weights.layers, lora.layers, strict=True)
            weights = replace(weights, layers=[replace(layer, lora=own) for layer, own in pairs])
        self.config = config
        self.kernels = kernels
        self.lora = lora
        self.residual_dtype = torch.float32 if kernels.dtype == torch.float16 else kernels.dtype
        self._comm = comm
        self._shard = comm.shard
        if isinstance(weights.lm_head, torch.Tensor) and not weights.head_is_prepared:
            weights = replace(weights, lm_head=kernels.prepare_head(weights.lm_head), head_is_prepared=True)
        self.weights = weights
        self._taps = frozenset(taps)
        self.num_taps = len(self._taps)
        # the parts between taps: one, without them
        cuts = sorted({0, *taps, len(weights.layers)})
        self._parts = [slice(first, end) for first, end in pairwise(cuts)]
        # ranks that share a stage meet between the operations of a layer
        alone = comm.shard.tensor_size == 1
        self._stacks = [kernels.layer_stack(weights.layers[part]) if alone else None for part in self._parts]
        self._cache: list[LayerCache] | None = None
        self._cache_parts: list[list[LayerCache]] = []

    @torch.inference_mode()
    def forward(
        self,
        batch: ForwardBatch,
        cache: list[LayerCache],
        hidden: torch.Tensor | None = None,
        states: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Writes the new keys and values into `cache`. `hidden` [T, H] is what the previous stage returned.

        Returns the logits float32 [R, V] of `batch.sample_rows` on the last stage (this rank's part of V), the hidden
        states [T, H] on the others. `states` gets the hidden states [T, H] at each of the taps.
        """
        x = self._embed(batch.token_ids) if hidden is None else hidden
        for part, stack, own_cache in zip(self._parts, self._stacks, self._parts_of(cache), strict=True):
            if states is not None and part.start in self._taps:
                states.append(x.clone())  # a stack changes it in place
            if stack is not None:
                x = stack(x, own_cache, batch.step)
                continue
            for layer, layer_cache in zip(self.weights.layers[part], own_cache, strict=True):
                x = self.layer(x, layer, layer_cache, batch.step)
        if states is not None and len(self.weights.layers) in self._taps:
            states.append(x)
        if not self._shard.is_last:
            return x
        norm, head = self.weights.final_norm, self.weights.lm_head
        assert norm is not None and head is not None
        return self.kernels.norm_head(x, batch.sample_rows, norm, head, batch.step)

    def _parts_of(self, cache: list[LayerCache]) -> list[list[LayerCache]]:
        """The caches of each part: the same lists while `cache` is the same, as stacks keep tables of them."""
        if cache is not self._cache:
            self._cache, self._cache_parts = cache, [cache[part] for part in self._parts]
        return self._cache_parts

    def layer(self, x: torch.Tensor, layer: LayerWeights, cache: LayerCache, step: Any) -> torch.Tensor:
        """x [T, H] -> [T, H]: attention, then the mixture of experts, each added to the residual stream."""
        kernels, all_reduce = self.kernels, self._comm.all_reduce
        query = kernels.norm_qkv(x, layer, cache, step)
        attended = kernels.attention(query, layer, cache, step)
        x = kernels.linear(attended, layer.out, layer.out_bias, residual=self._on_leader_only(x))
        if step.lora is not None:
            kernels.add_out_lora(x, attended, layer, step)
        x = all_reduce(x)
        return all_reduce(kernels.norm_moe(x, layer, self._on_leader_only(x), step))

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        table = self.weights.embedding
        assert table is not None, "only the first stage embeds"
        vocab = self._shard.vocab
        if len(vocab) == self.config.vocab_size:
            return F.embedding(token_ids, table).to(self.residual_dtype)
        mine = (token_ids >= vocab.start) & (token_ids < vocab.stop)
        rows = F.embedding(torch.where(mine, token_ids - vocab.start, 0), table)
        return self._comm.all_reduce((rows * mine.unsqueeze(-1)).to(self.residual_dtype))

    def _on_leader_only(self, x: torch.Tensor) -> torch.Tensor:
        """The residual on the one rank that adds it, zeros on the others."""
        return x if self._shard.is_tensor_leader else torch.zeros_like(x)
