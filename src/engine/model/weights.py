"""The weights of one rank, from a checkpoint or at random."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from gptoss.engine.model.checkpoint import Checkpoint
from gptoss.engine.model.model_config import SLIDING, ModelConfig
from gptoss.engine.parallel.shards import Shard, whole
from gptoss.kernels.int8 import Int8Matrix
from gptoss.kernels.layers import (
    FULL_GROUP,
    SLIDING_GROUP,
    DenseWeight,
    ExpertWeights,
    HeadWeight,
    LayerWeights,
    PackedMxfp4,
    SharedRows,
)
from gptoss.kernels.mxfp4 import GROUP_SIZE, Mxfp4Tensor, dequantize_mxfp4

tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a rank that is ended would leak
PrepareLayer = Callable[[LayerWeights], LayerWeights]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """One rank's part. The embedding is the first stage's alone, norm and head the last one's."""

    embedding: torch.Tensor | None  # [V, H]
    layers: list[LayerWeights]
    final_norm: torch.Tensor | None  # [H]
    lm_head: HeadWeight | None  # [V, H]


class WeightLoader:
    """Reads one rank's ModelWeights from a checkpoint, in the compute type, one tensor at a time.

    `dequantize` unpacks MXFP4 experts once, at load: four times the memory, the fastest form for plain torch. Each
    layer goes through `prepare_layer`, the kernel backend's. Of tensors that are cut between ranks only this rank's
    part is read; biases that must be added once are zero on all but the stage's first rank.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        dtype: torch.dtype,
        *,
        dequantize: bool,
        device: torch.device | None = None,
        shard: Shard | None = None,
        prepare_layer: PrepareLayer | None = None,
    ) -> None:
        self._prepare_layer = prepare_layer or _as_loaded
        self._device = device or torch.device("cpu")
        self._checkpoint = checkpoint
        self._config = config
        self._shard = shard or whole(config)
        self._dtype = dtype
        self._dequantize = dequantize
        # [g0 u0 g1 u1 ...] -> [g0 g1 ... u0 u1 ...]
        rows = torch.arange(2 * len(self._shard.intermediate))
        self._gate_then_up = torch.cat((rows[0::2], rows[1::2]))

    def load(self) -> ModelWeights:
        original = self._checkpoint.original
        embedding, head, norm = (
            ("embedding.weight", "unembedding.weight", "norm.scale")
            if original
            else ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
        )
        read_layer = self._original_layer if original else self._hf_layer
        s = self._shard
        steps = tqdm(s.layers, desc="loading weights", unit="layer", disable=None if s.rank == 0 else True)
        layers = [self._prepare_layer(read_layer(n)) for n in steps]
        return ModelWeights(
            self._read(embedding, _cut(s.vocab)) if s.is_first else None,
            layers,
            self._read(norm) if s.is_last else None,
            self._read(head, _cut(s.vocab)) if s.is_last else None,
        )

    def _read(self, name: str, *cut: slice) -> torch.Tensor:
        return self._checkpoint.part(name, cut or (slice(None),)).to(self._device, self._dtype, copy=True)

    def _on_leader_only(self, bias: torch.Tensor) -> torch.Tensor:
        """A bias on the one rank that adds it, zeros on the others."""
        return bias if self._shard.is_tensor_leader else torch.zeros_like(bias)

    def _hf_layer(self, n: int) -> LayerWeights:
        layer = f"model.layers.{n}."
        a, m = layer + "self_attn.", layer + "mlp."
        heads = self._head_rows()
        return LayerWeights(
            group=_group(self._config, n),
            attention_norm=self._read(layer + "input_layernorm.weight"),
            qkv=torch.cat([self._read(f"{a}{x}_proj.weight", rows) for x, rows in zip("qkv", heads, strict=True)]),
            qkv_bias=torch.cat([self._read(f"{a}{x}_proj.bias", rows) for x, rows in zip("qkv", heads, strict=True)]),
            sinks=self._read(a + "sinks", _cut(self._shard.query_heads)),
            out=self._read(a + "o_proj.weight", slice(None), heads[0]).contiguous(),
            out_bias=self._on_leader_only(self._read(a + "o_proj.bias")),
            mlp_norm=self._read(layer + "post_attention_layernorm.weight"),
            router=self._read(m + "router.weight"),
            router_bias=self._read(m + "router.bias"),
            experts=self._experts(
                m + "experts.gate_up_proj",
                m + "experts.gate_up_proj_bias",
                m + "experts.down_proj",
                m + "experts.down_proj_bias",
            ),
        )

    def _original_layer(self, n: int) -> LayerWeights:
        a, m = f"block.{n}.attn.", f"block.{n}.mlp."
        c, heads = self._config, self._head_rows()
        q_dim, kv_dim = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        rows = [
            slice(base + part.start, base + part.stop)
            for base, part in zip((0, q_dim, q_dim + kv_dim), heads, strict=True)
        ]
        return LayerWeights(
            group=_group(self._config, n),
            attention_norm=self._read(a + "norm.scale"),
            qkv=torch.cat([self._read(a + "qkv.weight", part) for part in rows]),
            qkv_bias=torch.cat([self._read(a + "qkv.bias", part) for part in rows]),
            sinks=self._read(a + "sinks", _cut(self._shard.query_heads)),
            out=self._read(a + "out.weight", slice(None), heads[0]).contiguous(),
            out_bias=self._on_leader_only(self._read(a + "out.bias")),
            mlp_norm=self._read(m + "norm.scale"),
            router=self._read(m + "gate.weight"),
            router_bias=self._read(m + "gate.bias"),
            experts=self._experts(m + "mlp1_weight", m + "mlp1_bias", m + "mlp2_weight", m + "mlp2_bias"),
        )

    def _head_rows(self) -> tuple[slice, slice, slice]:
        """This rank's rows of Q, K and V."""
        size, s = self._config.head_dim, self._shard
        q, kv = (slice(h.start * size, h.stop * size) for h in (s.query_heads, s.kv_heads))
        return q, kv, kv

    def _experts(self, w1: str, b1: str, w2: str, b2: str) -> ExpertWeights:
        s = self._shard
        experts, inter = _cut(s.experts), s.intermediate
        gate_up = slice(2 * inter.start, 2 * inter.stop)
        everywhere = len(inter) == self._config.intermediate_size  # then no other rank adds the same bias
        bias2 = self._read(b2, experts)
        return ExpertWeights(
            w1=self._expert_matrix(w1, experts, gate_up, slice(None), self._gate_then_up),
            b1=self._read(b1, experts, gate_up)[:, self._gate_then_up.to(self._device)],
            w2=self._expert_matrix(w2, experts, slice(None), _cut(inter), None),
            b2=bias2 if everywhere else self._on_leader_only(bias2),
        )

    def _expert_matrix(
        self, name: str, experts: slice, rows: slice, columns: slice, row_order: torch.Tensor | None
    ) -> torch.Tensor | Mxfp4Tensor:
        def ordered(t: torch.Tensor) -> torch.Tensor:
            return t if row_order is None else t[:, row_order.to(t.device)]

        def packed_part(part: str) -> torch.Tensor:
            separator = "." if self._checkpoint.original else "_"
            groups = slice(*(None if n is None else n // GROUP_SIZE for n in (columns.start, columns.stop)))
            tensor = self._checkpoint.part(f"{name}{separator}{part}", (experts, rows, groups))
            return ordered(tensor.to(self._device, copy=True)).contiguous()

        if not self._checkpoint.packed:
            return ordered(self._read(name, experts, columns, rows).transpose(1, 2)).contiguous()
        packed = Mxfp4Tensor(packed_part("blocks"), packed_part("scales"))
        if not self._dequantize:
            return packed
        count, height, groups = packed.scales.shape
        out = torch.empty((count, height, groups * GROUP_SIZE), dtype=self._dtype, device=self._device)
        for expert in range(count):
            out[expert] = dequantize_mxfp4(packed[expert], self._dtype)
        return out


def _group(config: ModelConfig, layer: int) -> int:
    return SLIDING_GROUP if config.layer_types[layer] == SLIDING else FULL_GROUP


def _as_loaded(layer: LayerWeights) -> LayerWeights:
    return layer


def _cut(part: range) -> slice:
    return slice(part.start, part.stop)


def dummy_weights(
    c: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    shard: Shard | None = None,
    prepare_layer: PrepareLayer = _as_loaded,
) -> ModelWeights:
    """Random weights of one rank's true shapes and types, without a file: for benchmarks.

    Experts are MXFP4.
    """
    s = shard or whole(c)
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, std: float = 0.02) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=generator)

    def packed(rows: int, columns: int) -> Mxfp4Tensor:
        shape = (len(s.experts), rows, columns // GROUP_SIZE)
        blocks = torch.randint(0, 256, (*shape, GROUP_SIZE // 2), dtype=torch.uint8, device=device, generator=generator)
        return Mxfp4Tensor(blocks, torch.full(shape, 119, dtype=torch.uint8, device=device))

    hidden, inter = c.hidden_size, len(s.intermediate)
    q_dim, kv_dim = len(s.query_heads) * c.head_dim, len(s.kv_heads) * c.head_dim
    ones = torch.ones(hidden, dtype=dtype, device=device)

    def random_layer(n: int) -> LayerWeights:
        return LayerWeights(
            group=_group(c, n),
            attention_norm=ones,
            qkv=normal(q_dim + 2 * kv_dim, hidden),
            qkv_bias=normal(q_dim + 2 * kv_dim),
            sinks=normal(len(s.query_heads)),
            out=normal(hidden, q_dim),
            out_bias=normal(hidden),
            mlp_norm=ones,
            router=normal(c.num_experts, hidden),
            router_bias=normal(c.num_experts),
            experts=ExpertWeights(
                packed(2 * inter, hidden),
                normal(len(s.experts), 2 * inter),
                packed(hidden, inter),
                normal(len(s.experts), hidden),
            ),
        )

    steps = tqdm(s.layers, desc="random weights", unit="layer", disable=None if s.rank == 0 else True)
    layers = [prepare_layer(random_layer(n)) for n in steps]
    return ModelWeights(
        normal(len(s.vocab), hidden) if s.is_first else None,
        layers,
        ones if s.is_last else None,
        normal(len(s.vocab), hidden) if s.is_last else None,
    )


def iterate_tensors(weights: ModelWeights) -> Iterator[torch.Tensor]:
    """Every stored tensor, packed ones included: for byte counts."""
    head = weights.lm_head
    yield from (t for t in (weights.embedding, weights.final_norm) if t is not None)
    if isinstance(head, SharedRows):
        yield head.row_of
        head = head.rows
    if head is not None:
        yield from _parts(head)
    for layer in weights.layers:
        yield from (layer.attention_norm, *_parts(layer.qkv), layer.qkv_bias, layer.sinks)
        yield from (*_parts(layer.out), layer.out_bias)
        yield from (layer.mlp_norm, layer.router, layer.router_bias, layer.experts.b1, layer.experts.b2)
        for w in (layer.experts.w1, layer.experts.w2):
            match w:
                case Mxfp4Tensor():
                    yield from (w.blocks, w.scales)
                case PackedMxfp4():
                    yield from (w.words, w.scales)
                case _:
                    yield w


def _parts(w: DenseWeight) -> tuple[torch.Tensor, ...]:
    return (w.values, w.scales) if isinstance(w, Int8Matrix) else (w,)
