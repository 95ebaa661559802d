"""Checks the Triton kernels before a GPU serves, and compiles every one.

They are compared with plain torch on the model's own first layers.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

import dataclasses
import logging
import time

import numpy as np
import torch

from gptoss.engine.config import SCORED_ROWS, EngineConfig
from gptoss.engine.model.forward_batch import ForwardBatch
from gptoss.engine.model.gpt_oss import GptOss
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import Shard
from gptoss.engine.worker.draft_runner import DraftRunner
from gptoss.kernels.device_copy import to_device
from gptoss.kernels.layers import ExpertWeights, LayerCache, PackedExperts, PackedMxfp4, StoredExperts
from gptoss.kernels.lora import LayerAdapter, LoraMatrices
from gptoss.kernels.mxfp4 import Mxfp4Tensor
from gptoss.kernels.reference.backend import ReferenceBackend
from gptoss.kernels.step_layout import StepLayout
from gptoss.kernels.triton import support
from gptoss.kernels.triton.configs import step_sizes
from gptoss.kernels.triton.mxfp4_layout import gate_up_order, unpack_experts

logger = logging.getLogger(__name__)

CHECK_TOKENS = 9  # more than the kernels that find their experts themselves take, fewer than a block
TOLERANCE = 0.05  # of what a layer adds, root mean square: bfloat16 rounds each of a few products to 0.4 %


class Unpacking:
    """Packed experts, given back one at a time in the checkpoint's order."""

    def __init__(self, packed: PackedMxfp4, order: torch.Tensor | None) -> None:
        self._packed = packed
        self._order = order

    def __getitem__(self, expert: int) -> Mxfp4Tensor:
        p, one = self._packed, slice(expert, expert + 1)
        return unpack_experts(PackedMxfp4(p.words[one], p.scales[one], p.num_columns), self._order)[0]


@torch.inference_mode()
def check_layers(model: GptOss, cache: list[LayerCache], comm: Communicator, block_size: int) -> float:
    """The larger relative error of one sliding and one full layer, given random hidden states.

    Of each the median over tokens counts, because a token whose fourth and fifth expert are nearly alike may take
    either.
    """
    kernels = model.kernels
    generator = torch.Generator(device=kernels.device).manual_seed(0)
    shape = (CHECK_TOKENS, model.config.hidden_size)
    # small compared to what a layer adds to it, so that rounding their sum does not hide the difference
    x = torch.randn(shape, generator=generator, device=kernels.device) / 32
    x = x.to(model.residual_dtype)
    plain = GptOss(model.config, model.weights, comm, ReferenceBackend(kernels.shape, kernels.dtype, kernels.device))
    layout = _layout([CHECK_TOKENS], block_size)
    errors = []
    for layer, pair in zip(model.weights.layers[:2], cache[:2], strict=True):
        unpacked = dataclasses.replace(layer, experts=_unpacked(layer.experts))
        ours = model.layer(x, layer, pair, kernels.prepare_step(layout))
        theirs = plain.layer(x, unpacked, pair, plain.kernels.prepare_step(layout))
        added = theirs.float() - x.float()
        errors.append(((ours.float() - theirs.float()).norm(dim=1) / added.norm(dim=1)).median())
    return float(torch.stack(errors).max())


def warm_up(model: GptOss, cache: list[LayerCache], config: EngineConfig, comm: Communicator) -> None:
    """Compiles every kernel that an eager step may need; triton keeps them on disk for the next start.

    There is a step for each row of the launch table, of that many tokens and rows to sample: a sequence that decodes
    next to a prompt. Where adapters may be loaded, it runs with one too. All ranks must call this, as they meet in
    collective operations.
    """
    started = time.monotonic()
    device = model.kernels.device
    max_rows = min(config.max_num_batched_tokens, config.max_num_seqs + SCORED_ROWS)
    if model.lora is not None:
        model.lora.put(0, [_empty_adapter(model, comm.shard)] * len(model.weights.layers))
    for tokens in _warm_up_sizes(config, device):
        for slot in (None,) if model.lora is None else (0, None):
            logits = model.forward(
                _mixed(model, tokens, min(tokens, max_rows), config.block_size, slot),
                cache,
                None if comm.shard.is_first else _hidden(model, tokens, device),
            )
    if model.lora is not None:
        model.lora.clear(0)
    if comm.shard.is_last and comm.shard.is_tensor_leader and support.samples(device):
        launch_sampler(logits.new_zeros(2, model.config.vocab_size))
    torch.cuda.synchronize(device)
    logger.info("kernels ready in %.1f s", time.monotonic() - started)


def warm_up_head(runner: DraftRunner, config: EngineConfig, device: torch.device) -> None:
    """Compiles the kernels of a draft head, for each row of the launch table."""
    for tokens in _warm_up_sizes(config, device):
        runner.warm_up(tokens)


def _warm_up_sizes(config: EngineConfig, device: torch.device) -> list[int]:
    """A number of tokens for each row of the launch table that a step can use."""
    limit = config.max_num_batched_tokens
    return sorted({n for n in step_sizes(support.architecture(device)) if n < limit} | {limit})


def launch_sampler(logits: torch.Tensor) -> None:
    """Launches the kernels that pick tokens, for one row and for all of `logits` [R, V]."""
    from gptoss.kernels.triton import sampling, truncated

    rows, vocab = logits.shape
    for count in {1, rows}:
        ones = torch.ones(count, device=logits.device)
        words = torch.zeros(1, -(-vocab // 32), dtype=torch.int32, device=logits.device)
        allowed = torch.zeros(count, dtype=torch.int32, device=logits.device), words
        picked = sampling.pick(logits[:count], ones, ones / 2, *allowed)
        index = torch.arange(count, device=logits.device)
        numbers = torch.full((4, count), 0.5, dtype=torch.float64, device=logits.device)
        truncated.pick(logits[:count], ones, *allowed, index, numbers, picked)


def _hidden(model: GptOss, tokens: int, device: torch.device) -> torch.Tensor:
    """What a later stage would receive."""
    shape = (tokens, model.config.hidden_size)
    return torch.zeros(shape, dtype=model.residual_dtype, device=device)


def _empty_adapter(model: GptOss, shard: Shard) -> LayerAdapter:
    """An adapter of rank 1 that adds nothing to any matrix of a layer."""
    c, kernels = model.config, model.kernels
    heads, groups = len(shard.query_heads) * c.head_dim, len(shard.kv_heads) * c.head_dim
    experts, inter = len(shard.experts), len(shard.intermediate)

    def zeros(inputs: int, outputs: int, *count: int) -> LoraMatrices:
        a, b = (torch.zeros(*count, 1, n, dtype=kernels.dtype, device=kernels.device) for n in (inputs, outputs))
        return LoraMatrices(a, b)

    return LayerAdapter(
        zeros(c.hidden_size, heads),
        zeros(c.hidden_size, groups),
        zeros(c.hidden_size, groups),
        zeros(heads, c.hidden_size),
        zeros(c.hidden_size, c.num_experts),
        zeros(c.hidden_size, 2 * inter, experts),
        zeros(inter, c.hidden_size, experts),
    )


def _mixed(model: GptOss, tokens: int, rows: int, block_size: int, slot: int | None = None) -> ForwardBatch:
    """A sequence that decodes next to a prompt of the other tokens. `slot`: the adapter of both."""
    layout = _layout([1, tokens - 1] if tokens > 1 else [1], block_size)
    if slot is not None:
        layout = dataclasses.replace(layout, adapters=[slot] * len(layout.counts))
    device = model.kernels.device
    token_ids = to_device(layout.positions % 64, torch.int64, device)
    return ForwardBatch(token_ids, torch.arange(rows, device=device), model.kernels.prepare_step(layout))


def _layout(counts: list[int], block_size: int) -> StepLayout:
    """Prompts whose keys all go to the null block, which no request reads."""
    tables = [np.zeros(-(-n // block_size), np.int64) for n in counts]
    return StepLayout.of([0] * len(counts), counts, (tables, tables), block_size)


def _unpacked(experts: ExpertWeights | StoredExperts | PackedExperts) -> ExpertWeights:
    if isinstance(experts, ExpertWeights):
        return experts
    assert isinstance(experts, PackedExperts), "the Triton kernels do not read the order of a file"
    order = gate_up_order(experts.w1.num_rows // 2, experts.w1.words.device)
    w1, w2 = Unpacking(experts.w1, order), Unpacking(experts.w2, None)
    return ExpertWeights(w1, experts.b1, w2, experts.b2)  # type: ignore[arg-type]
