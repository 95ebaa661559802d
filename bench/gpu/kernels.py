"""Measures each Triton kernel at the model's shapes: time, and share of the card's memory or matrix throughput."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from bench.gpu.timing import Row, time_us
from gptoss.engine.model.gpt_oss import layer_shape
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.engine.model.weights import dummy_weights
from gptoss.engine.parallel.shards import whole
from gptoss.kernels.layers import LayerCache, LayerWeights, PackedExperts
from gptoss.kernels.step_layout import StepLayout
from gptoss.kernels.triton import attention, dense, experts, fused_layers, routing, support
from gptoss.kernels.triton.backend import TritonBackend
from gptoss.kernels.triton.configs import TileConfig, config_for
from gptoss.kernels.triton.metadata import attention_metadata

EPS = 1e-5
BLOCK_SIZE = 64
DEVICE = torch.device("cuda")
Launch = Callable[[TileConfig], object]


@dataclass(frozen=True)
class Bench:
    """One kernel at one size, ready to be launched in any configuration."""

    kernel: str  # of the launch table
    name: str
    tokens: int
    launch: Launch
    moved_bytes: int
    flops: int = 0

    def config(self) -> TileConfig:
        return config_for(support.architecture(DEVICE), self.kernel, self.tokens)

    def row(self, section: str, config: TileConfig | None = None) -> Row:
        config = config or self.config()
        shape = f"{config.block_n}x{config.block_m} w{config.warps} s{config.stages}"
        us = time_us(lambda: self.launch(config))
        return Row(section, self.name, us, self.moved_bytes, self.flops, shape)


class Layer:
    """One layer of a model with random weights, and a cache."""

    def __init__(self, model: str) -> None:
        self.c = dataclasses.replace(
            ModelConfig.from_json(hf_config(SIZES[model])),
            num_layers=2,
            layer_types=("sliding_attention", "full_attention"),
        )
        small = dataclasses.replace(self.c, num_layers=1, layer_types=("full_attention",))
        backend = TritonBackend(layer_shape(small, whole(small), 1), torch.bfloat16, DEVICE)
        weights = dummy_weights(small, torch.bfloat16, DEVICE, 0, prepare_layer=backend.prepare_layer)
        self.model = model
        self.weights: LayerWeights = weights.layers[0]
        self.head = weights.lm_head
        self.norm = weights.final_norm
        assert isinstance(self.weights.experts, PackedExperts)
        self.experts: PackedExperts = self.weights.experts

    def benches(self, tokens: int, context: int = 1024) -> Iterator[Bench]:
        yield from self._dense(tokens)
        yield from self._moe(tokens)
        yield from self._attention(tokens, context)

    def _x(self, tokens: int) -> torch.Tensor:
        return torch.randn(tokens, self.c.hidden_size, device=DEVICE, dtype=torch.bfloat16)

    def _dense(self, tokens: int) -> Iterator[Bench]:
        c, w, x = self.c, self.weights, self._x(tokens)
        heads, groups, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        key = torch.zeros(
            max(1, tokens // BLOCK_SIZE) + 1, BLOCK_SIZE, groups, dim, device=DEVICE, dtype=torch.bfloat16
        )
        cache, positions = LayerCache(key, torch.zeros_like(key)), torch.arange(tokens, device=DEVICE)
        rope = torch.ones(max(tokens, 2), 2, dim // 2, device=DEVICE)
        apart = tokens > fused_layers.FUSED_TOKENS
        scaled, r = dense.norm_tokens(x, w.attention_norm, EPS)
        norm = {"r": r} if apart else {"norm": w.attention_norm}
        given = scaled if apart else x
        yield self._bench(
            "qkv",
            tokens,
            w.qkv,
            lambda config: dense.qkv(
                given, w.qkv, w.qkv_bias, positions, rope, positions, cache, heads, config, eps=EPS, **norm
            ),
        )
        t = torch.randn(tokens, heads * dim, device=DEVICE, dtype=torch.bfloat16)
        yield self._bench(
            "out", tokens, w.out, lambda config: dense.linear(t, w.out, config, bias=w.out_bias, residual=x)
        )
        count = torch.tensor([tokens], dtype=torch.int32, device=DEVICE)
        many = tokens > routing.FEW_TOKENS
        block_m = None if tokens <= fused_layers.DIRECT_TOKENS else self._tile_rows(tokens)
        yield self._bench(
            "router",
            tokens,
            w.router,
            lambda config: (routing.route_many if many else routing.route_few)(
                x, w.mlp_norm, w.router, w.router_bias, EPS, config, count, c.experts_per_token, block_m
            ),
        )
        head, final = self.head, self.norm
        if head is None or final is None or tokens > 256:
            return
        if apart:
            launch = partial(dense.linear, given, head, r=r, out_dtype=torch.float32)
        else:
            rows = torch.arange(tokens, device=DEVICE)
            launch = partial(dense.linear, x, head, rows=rows, norm=final, eps=EPS, out_dtype=torch.float32)
        yield self._bench("lm_head", tokens, head, launch)
        name = f"{self.model} lm_head by cuBLAS, {tokens} tokens"
        yield Bench("lm_head", name, tokens, lambda _: x @ head.t(), head.nbytes)

    def _tile_rows(self, tokens: int) -> int:
        return config_for(support.architecture(DEVICE), "moe_w1", tokens).block_m

    def _bench(self, kernel: str, tokens: int, weight: torch.Tensor, launch: Launch) -> Bench:
        flops = 2 * tokens * weight.numel() if tokens >= 512 else 0
        return Bench(kernel, f"{self.model} {kernel}, {tokens} tokens", tokens, launch, weight.nbytes, flops)

    def _moe(self, tokens: int) -> Iterator[Bench]:
        c, e, x = self.c, self.experts, self._x(tokens)
        k = c.experts_per_token
        count = torch.tensor([tokens], dtype=torch.int32, device=DEVICE)
        direct, w = tokens <= fused_layers.DIRECT_TOKENS, self.weights

        def routed(block_m: int | None) -> routing.Routed:
            few = tokens <= routing.FEW_TOKENS
            config = config_for(support.architecture(DEVICE), "router", tokens)
            return (routing.route_few if few else routing.route_many)(
                x, w.mlp_norm, w.router, w.router_bias, EPS, config, count, k, block_m
            )

        first = routed(None)
        r = first.r
        used = int(first.logits.topk(k).indices.unique().numel())
        act = torch.randn(tokens * k, c.intermediate_size, device=DEVICE, dtype=torch.bfloat16)

        def tiles(config: TileConfig) -> experts.Tiles:
            return experts.Tiles.of(routed(None if direct else config.block_m), count, k, config.block_m)

        made: dict[TileConfig, experts.Tiles] = {}

        def tiles_of(config: TileConfig) -> experts.Tiles:
            if config not in made:
                made[config] = tiles(config)
            return made[config]

        for name, packed, launch in (
            ("moe_w1", e.w1, lambda config: experts.moe_w1(x, r, e.w1, e.b1, c.swiglu_limit, tiles_of(config), config)),
            ("moe_w2", e.w2, lambda config: experts.moe_w2(act, e.w2, e.b2, x, tiles_of(config), config)),
        ):
            # of the checkpoint's bytes, not of the padded ones: what had to be read
            one = packed.num_rows * packed.num_columns * 17 // 32
            flops = 2 * tokens * k * packed.num_rows * packed.num_columns if tokens >= 512 else 0
            yield Bench(name, f"{self.model} {name}, {tokens} tokens", tokens, launch, one * used, flops)

    def _attention(self, tokens: int, context: int) -> Iterator[Bench]:
        c = self.c
        heads, groups, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        prefill = tokens >= 512
        seqs, before = (1, 0) if prefill else (tokens, context - 1)
        counts = [tokens] if prefill else [1] * tokens
        length = before + counts[0]
        width = -(-length // BLOCK_SIZE)
        blocks_needed = width * seqs
        key = torch.randn(blocks_needed, BLOCK_SIZE, groups, dim, device=DEVICE, dtype=torch.bfloat16)
        cache = LayerCache(key, torch.randn_like(key))
        order = torch.randperm(blocks_needed).view(seqs, width).numpy()
        layout = StepLayout.of([before] * seqs, counts, (list(order),) * 2, BLOCK_SIZE)
        metadata = attention_metadata(layout, 0, DEVICE)
        query = torch.randn(tokens, heads, dim, device=DEVICE, dtype=torch.bfloat16)
        sinks = torch.randn(heads, device=DEVICE, dtype=torch.bfloat16)
        for window in (None, c.sliding_window):
            seen = sum(min(before + i + 1, window or length) for i in range(counts[0]))
            reach = min(length, window or length)
            yield Bench(
                "attention",
                f"{self.model} attention {'sliding' if window else 'full'}, {tokens} tokens, context {length}",
                1 << 16 if prefill else 1,
                lambda config, window=window: attention.paged_attention(
                    query, cache, sinks, metadata, window, dim**-0.5, config, config, fixed=False
                ),
                0 if prefill else seqs * reach * groups * dim * 4,
                4 * seen * heads * dim if prefill else 0,
            )
