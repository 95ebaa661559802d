"""The weights of one rank, from a checkpoint or at random."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from gptoss.engine.model.model_config import SLIDING, WIDE, ModelConfig
from gptoss.engine.model.tensor_source import TensorSource
from gptoss.engine.model.upload import Uploader
from gptoss.engine.parallel.shards import Shard, whole
from gptoss.kernels.fp8 import Fp8Matrix
from gptoss.kernels.int8 import Int8Matrix
from gptoss.kernels.layers import (
    FULL_GROUP,
    SLIDING_GROUP,
    WIDE_GROUP,
    DenseWeight,
    ExpertWeights,
    HeadWeight,
    LayerWeights,
    PackedMxfp4,
    SharedRows,
    StoredExperts,
)
from gptoss.kernels.mxfp4 import (
    GROUP_SIZE,
    AlternatingMxfp4,
    GgufGateUp,
    GgufMxfp4,
    Mxfp4Tensor,
    dequantize_mxfp4,
)

tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a rank that is ended would leak
PrepareLayer = Callable[[LayerWeights], LayerWeights]
PrepareHead = Callable[[torch.Tensor], HeadWeight]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """One rank's part. The embedding is the first stage's alone, norm and head the last one's."""

    embedding: torch.Tensor | None  # [V, H]
    layers: list[LayerWeights]
    final_norm: torch.Tensor | None  # [H]
    lm_head: HeadWeight | None  # [V, H]
    head_is_prepared: bool = False  # whether lm_head is in the backend's form


class WeightLoader:
    """Places one rank's ModelWeights.

    They are mapped where the file has a tensor in the form that the kernels read. Only what is in another type, order
    or place is copied, one tensor at a time. `dequantize` unpacks MXFP4 experts once, at load: four times the memory,
    the fastest form for plain torch. `stored_experts` leaves them in the order of the file, for backends that read
    that, where the ranks do not cut them. Each layer goes through `prepare_layer`, the kernel backend's. Of tensors
    that are cut between ranks only this rank's part is read; biases that must be added once are zero on all but the
    stage's first rank.
    """

    def __init__(
        self,
        source: TensorSource,
        config: ModelConfig,
        dtype: torch.dtype,
        *,
        dequantize: bool,
        device: torch.device | None = None,
        shard: Shard | None = None,
        prepare_layer: PrepareLayer | None = None,
        prepare_head: PrepareHead | None = None,
        uploads: bool | None = None,
        stored_experts: bool = False,
    ) -> None:
        """Without `prepare_head` the model prepares the head.

        `uploads`: whether threads read the files (upload.py); by default on a GPU.
        """
        self._uploads = uploads
        self._uploader: Uploader | None = None
        self._prepare_layer = prepare_layer or _as_loaded
        self._prepare_head = prepare_head or _head_as_loaded
        self._head_is_prepared = prepare_head is not None
        self._device = device or torch.device("cpu")
        self._source = source
        self._config = config
        self._shard = shard or whole(config)
        self._dtype = dtype
        self._dequantize = dequantize
        self._stored_experts = stored_experts

    def load(self) -> ModelWeights:
        """Raises CheckpointError if a file cannot be read, or was changed meanwhile."""
        with contextlib.ExitStack() as stack:
            if self._device.type == "cuda" if self._uploads is None else self._uploads:
                self._uploader = stack.enter_context(Uploader(self._device, self._source.files))
            *layers, embedding, final_norm, lm_head = self.parts()
            self._uploader = None
        self.check_unchanged()
        return ModelWeights(embedding, layers, final_norm, lm_head, head_is_prepared=self._head_is_prepared)

    def parts(self) -> Iterator[Any]:
        """Yields the layers in order, then the embedding, the last norm and the head."""
        s, vocab = self._shard, _cut(self._shard.vocab)
        layers = map(self._layer, s.layers) if self._uploader is None else self._uploader.in_turn(self._layer, s.layers)
        shown = None if s.rank == 0 else True
        for layer in tqdm(layers, desc="loading weights", unit="layer", disable=shown, total=len(s.layers)):
            yield self._prepare_layer(layer)
        yield self._read("model.embed_tokens.weight", vocab) if s.is_first else None
        yield self._read("model.norm.weight") if s.is_last else None
        yield self._prepare_head(self._read("lm_head.weight", vocab)) if s.is_last else None

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file of the checkpoint was changed since it was opened."""
        for file in self._source.files:
            file.check_unchanged()

    def _read(self, name: str, *cut: slice) -> torch.Tensor:
        (part,) = self._brought([self._source.part(name, *cut)])
        return part.to(self._device, self._dtype).contiguous()

    def _brought(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return parts if self._uploader is None else self._uploader.bring(parts)

    def _joined(self, names: list[str], rows: tuple[slice, ...]) -> torch.Tensor:
        """Rows of several tensors as one tensor: a view where they lie one after another."""
        parts = [self._read(name, part) for name, part in zip(names, rows, strict=True)]
        if not _adjacent(parts):
            return torch.cat(parts)
        return parts[0].as_strided((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].stride())

    def _on_leader_only(self, bias: torch.Tensor) -> torch.Tensor:
        """A bias on the one rank that adds it, zeros on the others."""
        return bias if self._shard.is_tensor_leader else torch.zeros_like(bias)

    def _layer(self, n: int) -> LayerWeights:
        layer = f"model.layers.{n}."
        a, m = layer + "self_attn.", layer + "mlp."
        heads = self._head_rows()
        return LayerWeights(
            group=_group(self._config, n),
            attention_norm=self._read(layer + "input_layernorm.weight"),
            qkv=self._joined([f"{a}{x}_proj.weight" for x in "qkv"], heads),
            qkv_bias=self._joined([f"{a}{x}_proj.bias" for x in "qkv"], heads),
            sinks=self._read(a + "sinks", _cut(self._shard.query_heads)),
            out=self._read(a + "o_proj.weight", slice(None), heads[0]),
            out_bias=self._on_leader_only(self._read(a + "o_proj.bias")),
            mlp_norm=self._read(layer + "post_attention_layernorm.weight"),
            router=self._read(m + "router.weight"),
            router_bias=self._read(m + "router.bias"),
            experts=self._experts(n, m + "experts."),
        )

    def _head_rows(self) -> tuple[slice, slice, slice]:
        """This rank's rows of Q, K and V."""
        size, s = self._config.head_dim, self._shard
        q, kv = (slice(h.start * size, h.stop * size) for h in (s.query_heads, s.kv_heads))
        return q, kv, kv

    def _experts(self, layer: int, prefix: str) -> ExpertWeights | StoredExperts:
        s = self._shard
        experts, rows = _cut(s.experts), _cut(s.intermediate)
        everywhere = len(s.intermediate) == self._config.intermediate_size  # then no other rank adds the same bias
        bias2 = self._read(f"{prefix}down_proj_bias", experts)
        halves = [f"{prefix}gate_proj", f"{prefix}up_proj"]
        b1 = torch.cat([self._read(f"{half}_bias", experts, rows) for half in halves], dim=1)
        stored = self._source.stored_experts(layer, experts) if self._stored_experts and everywhere else None
        if stored is not None:
            return StoredExperts(stored[0], b1, stored[1], bias2)
        return ExpertWeights(
            w1=self._expert_matrix(halves, experts, rows, slice(None)),
            b1=b1,
            w2=self._expert_matrix([f"{prefix}down_proj"], experts, slice(None), rows),
            b2=bias2 if everywhere else self._on_leader_only(bias2),
        )

    def _expert_matrix(
        self, names: list[str], experts: slice, rows: slice, columns: slice
    ) -> torch.Tensor | Mxfp4Tensor:
        """The rows of one matrix after those of another, for each expert."""
        if not self._source.packed:
            return self._stacked([self._source.part(name, experts, rows, columns) for name in names], self._dtype)
        groups = slice(*(None if n is None else n // GROUP_SIZE for n in (columns.start, columns.stop)))
        packed = Mxfp4Tensor(
            *(
                self._stacked(
                    [self._source.part(f"{name}_{part}", experts, rows, groups) for name in names], torch.uint8
                )
                for part in ("blocks", "scales")
            )
        )
        return self._unpacked(packed) if self._dequantize else packed

    def _stacked(self, parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Tensors [E, R, ...] as one with all their rows; a single contiguous one as it is."""
        parts = self._brought(parts)
        if len(parts) == 1:
            return parts[0].to(self._device, dtype).contiguous()
        count, rows, *rest = parts[0].shape
        out = torch.empty((count, rows * len(parts), *rest), dtype=dtype, device=self._device)
        for number, part in enumerate(parts):
            out[:, number * rows : (number + 1) * rows].copy_(part)
        return out

    def _unpacked(self, packed: Mxfp4Tensor) -> torch.Tensor:
        count, height, groups = packed.scales.shape
        out = torch.empty((count, height, groups * GROUP_SIZE), dtype=self._dtype, device=self._device)
        for expert in range(count):
            out[expert] = dequantize_mxfp4(packed[expert], self._dtype)
        return out


def _adjacent(parts: list[torch.Tensor]) -> bool:
    """Whether the parts are contiguous and each begins where the one before ends."""
    if len({part.untyped_storage().data_ptr() for part in parts}) > 1 or not all(p.is_contiguous() for p in parts):
        return False
    ends = [part.storage_offset() + part.numel() for part in parts]
    return all(part.storage_offset() == end for part, end in zip(parts[1:], ends, strict=False))


def _group(config: ModelConfig, layer: int) -> int:
    return {SLIDING: SLIDING_GROUP, WIDE: WIDE_GROUP}.get(config.layer_types[layer], FULL_GROUP)


def _as_loaded(layer: LayerWeights) -> LayerWeights:
    return layer


def _head_as_loaded(head: torch.Tensor) -> HeadWeight:
    return head


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

    def packed(experts: int, rows: int, columns: int) -> Mxfp4Tensor:
        shape = (experts, rows, columns // GROUP_SIZE)
        blocks = torch.randint(0, 256, (*shape, GROUP_SIZE // 2), dtype=torch.uint8, device=device, generator=generator)
        return Mxfp4Tensor(blocks, torch.full(shape, 119, dtype=torch.uint8, device=device))

    hidden, inter = c.hidden_size, len(s.intermediate)
    q_dim, kv_dim = len(s.query_heads) * c.head_dim, len(s.kv_heads) * c.head_dim
    ones = torch.ones(hidden, dtype=dtype, device=device)

    def random_layer(n: int) -> LayerWeights:
        experts = min(len(s.experts), c.experts_of(n))
        return LayerWeights(
            group=_group(c, n),
            attention_norm=ones,
            qkv=normal(q_dim + 2 * kv_dim, hidden),
            qkv_bias=normal(q_dim + 2 * kv_dim),
            sinks=normal(len(s.query_heads)),
            out=normal(hidden, q_dim),
            out_bias=normal(hidden),
            mlp_norm=ones,
            router=normal(c.experts_of(n), hidden),
            router_bias=normal(c.experts_of(n)),
            experts=ExpertWeights(
                packed(experts, 2 * inter, hidden),
                normal(experts, 2 * inter),
                packed(experts, hidden, inter),
                normal(experts, hidden),
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
                case Mxfp4Tensor() | AlternatingMxfp4():
                    yield from (w.blocks, w.scales)
                case GgufGateUp():
                    yield from (w.gate, w.up)
                case GgufMxfp4():
                    yield w.blocks
                case PackedMxfp4():
                    yield from (w.words, w.scales)
                case _:
                    yield w


def _parts(w: DenseWeight | Fp8Matrix) -> tuple[torch.Tensor, ...]:
    match w:
        case Int8Matrix():
            return w.values, w.scales
        case Fp8Matrix():
            return w.codes, w.scales
        case _:
            return (w,)
