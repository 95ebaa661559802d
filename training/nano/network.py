"""gpt-oss as it is trained: the served model's formulas with gradients, and MXFP4 rounding in the forward pass.

Shapes: T tokens of a batch, H hidden, E experts, I intermediate. token_rows.py makes the rows of embedding and head.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gptoss.embedded.token_rows import TokenTable, TokenTraits
from gptoss.engine.model.model_config import SLIDING, ModelConfig
from gptoss.kernels.mxfp4 import GROUP_SIZE
from gptoss.kernels.reference.moe import SWIGLU_ALPHA, clamped_swiglu_ref
from gptoss.kernels.reference.rope import apply_rope_ref, rope_tables, yarn_inverse_frequencies
from training.nano.first_rows import first_meaning, first_rows

QUERIES_AT_ONCE = 128  # of a group's branches; each sees the others' keys only to mask them
GROUP = 1000  # branches of one shared part are numbered from it, a multiple of this
QUERY_PADDING = 8  # the sink is one more key, told apart by one more dimension; 8 aligns rows
# Matrices are multiplied in bfloat16 where the CPU can; where it multiplies in software, in float32. oneDNN compiles a
# bfloat16 product for each shape, which takes longer than the product: rows are filled up, so that shapes come again.
COMPUTE = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
ROWS = 256 if torch.bfloat16 == COMPUTE else 1


_fused: dict[Callable[..., torch.Tensor], Callable[..., torch.Tensor]] = {}


def fuse() -> None:
    """Compiles what is done number by number (torch.compile, with the machine's C++ compiler): a sixth of a step's
    time. The first steps take half a minute more. Without a compiler all stays as it is."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:  # as torch looks for one
        return
    for function in (rounding_error, clamped_swiglu_ref, swiglu_gradient):
        _fused[function] = torch.compile(function, dynamic=True)


def _run(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    return _fused.get(function, function)(*arguments)


def rounding_error(w: torch.Tensor) -> torch.Tensor:
    """w [..., in] -> what kernels.mxfp4.quantize_mxfp4's rounding adds to each number."""
    groups = w.view(*w.shape[:-1], -1, GROUP_SIZE)
    peak = groups.abs().amax(dim=-1, keepdim=True)
    scale = torch.exp2((torch.frexp(peak).exponent - 3).float())
    scaled = groups / scale
    size = scaled.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    rounded = ((scaled / step).round() * step).clamp(-6, 6) * scale
    return rounded.flatten(-2) - w


def fake_quantize(w: torch.Tensor) -> torch.Tensor:
    """Rounds to MXFP4; the gradient passes as if it had not."""
    with torch.no_grad():
        delta = _run(rounding_error, w)
    return w + delta


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [N, in], weight [out, in], bias [out] -> COMPUTE [N, out]."""
    filled = F.pad(x.to(COMPUTE), (0, 0, 0, -len(x) % ROWS))
    added = None if bias is None else bias.to(COMPUTE)
    return F.linear(filled, weight.to(COMPUTE), added)[: len(x)]


def swiglu_gradient(grad: torch.Tensor, gate_up: torch.Tensor, limit: float) -> torch.Tensor:
    """grad [N, I] of kernels.moe.clamped_swiglu_ref's result, gate_up [N, 2 I] -> [N, 2 I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    inside_gate, inside_up = gate <= limit, up.abs() <= limit
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    share = torch.sigmoid(SWIGLU_ALPHA * gate)
    of_gate = grad * (up + 1) * share * (1 + SWIGLU_ALPHA * gate * (1 - share))
    of_up = grad * gate * share
    return torch.cat((of_gate * inside_gate, of_up * inside_up), dim=-1)


class SwiGlu(torch.autograd.Function):
    """kernels.moe.clamped_swiglu_ref with its gradient written out: half the passes that autograd makes of it."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, limit: float) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.limit = limit
        return _run(clamped_swiglu_ref, gate_up, limit)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _run(swiglu_gradient, grad, ctx.saved_tensors[0], ctx.limit), None


class Layer(nn.Module):
    def __init__(self, c: ModelConfig, std: float) -> None:
        super().__init__()
        hidden, inter, experts = c.hidden_size, c.intermediate_size, c.num_experts
        q_dim, kv_dim = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

        def matrix(*shape: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape) * scale * shape[-1] ** -0.5)

        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.q = matrix(q_dim, hidden)
        self.k = matrix(kv_dim, hidden)
        self.v = matrix(kv_dim, hidden)
        self.qkv_bias = nn.Parameter(torch.zeros(q_dim + 2 * kv_dim))
        self.sinks = nn.Parameter(torch.zeros(c.num_attention_heads))
        self.out = matrix(hidden, q_dim, scale=std)
        self.out_bias = nn.Parameter(torch.zeros(hidden))
        self.mlp_norm = nn.Parameter(torch.ones(hidden))
        self.router = nn.Parameter(torch.randn(experts, hidden) * hidden**-0.5)
        self.router_bias = nn.Parameter(torch.zeros(experts))
        self.w1 = nn.ParameterList(matrix(2 * inter, hidden) for _ in range(experts))  # gate rows first
        self.b1 = nn.Parameter(torch.zeros(experts, 2 * inter))
        self.w2 = nn.ParameterList(matrix(hidden, inter, scale=std) for _ in range(experts))
        self.b2 = nn.Parameter(torch.zeros(experts, hidden))


@dataclass(frozen=True, slots=True)
class Keys:
    """What Q queries see: the sink, the last keys of what their group shares, and one another."""

    shared: int  # how many of the group's
    # float32 [Q G, 1 + shared + Q], G query heads a key's: 0 where a key is seen, else -inf
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """Queries that stand behind one another in a batch: what a group shares, or some of its branches."""

    size: int
    shared: int | None  # which part their group shares; None where there is none, or it is this one
    full: Keys
    sliding: Keys


def parts_of(positions: torch.Tensor, branches: torch.Tensor, config: ModelConfig) -> list[Part]:
    """positions, branches int64 [T] -> the parts of a batch, one behind the other.

    A branch sees itself and what its GROUP shares. Keys that no query of a part sees are left out.
    """
    window, heads = config.sliding_window, config.num_attention_heads // config.num_key_value_heads
    parts: list[Part] = []
    of_group = None
    for start, end in _runs(branches.tolist()):
        own, branch = positions[start:end], branches[start:end]
        group, index = divmod(int(branch[0]), GROUP)
        if group != of_group:
            of_group, shared_at, shared = group, None, own[:0]
        same = (branch[:, None] == branch).tril()
        full = _keys(own, shared, same, heads)
        parts.append(Part(len(own), shared_at, full, _keys(own, shared, same, heads, window)))
        if index == 0:
            shared_at, shared = len(parts) - 1, own
    return parts


def _runs(branches: list[int]) -> list[tuple[int, int]]:
    """Where parts begin and end: branches of one group together while they are short."""
    runs: list[tuple[int, int]] = []
    start = 0
    for _, run in groupby(branches):
        end = start + len(list(run))
        first = branches[runs[-1][0]] if runs else 0
        joins = first % GROUP and branches[start] % GROUP and first // GROUP == branches[start] // GROUP
        if joins and end - runs[-1][0] <= QUERIES_AT_ONCE:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
        start = end
    return runs


def _keys(own: torch.Tensor, shared: torch.Tensor, same: torch.Tensor, group: int, window: int | None = None) -> Keys:
    """Positions of the part [Q] and of what its group shares, and which of its own a query may see [Q, Q]."""
    if window is not None:
        shared = shared[shared > own.min() - window]
    seen = torch.cat((torch.ones(len(own), 1 + len(shared), dtype=torch.bool), same), dim=1)
    if window is not None:
        near = own[:, None] - torch.cat((shared, own)) < window
        seen[:, 1:] &= near
    mask = torch.zeros(seen.shape)
    return Keys(len(shared), mask.masked_fill_(~seen, -torch.inf).repeat_interleave(group, dim=0))


class Network(nn.Module):
    def __init__(self, config: ModelConfig, traits: TokenTraits, common: torch.Tensor) -> None:
        super().__init__()
        self.config = config
        self.traits = traits
        self.common = common
        code, feature = first_rows(config.hidden_size)
        meaning = first_meaning(config.hidden_size)
        self.embedding = TokenTable(code, feature, common, meaning=meaning)
        # what a token is read by and what it is written by lie apart, so that none begins by predicting itself
        code, feature = (
            part.roll(config.hidden_size // 2, dims=1) * config.hidden_size**-0.5 for part in (code, feature)
        )
        self.head = TokenTable(code, feature, common, shares_unwritten=True)
        std = (2 * config.num_layers) ** -0.5
        self.layers = nn.ModuleList(Layer(config, std) for _ in range(config.num_layers))
        self.final_norm = nn.Parameter(torch.ones(config.hidden_size))
        self._rope = yarn_inverse_frequencies(
            config.head_dim, config.rope_theta, config.rope_factor, config.rope_beta_fast, config.rope_beta_slow,
            config.rope_original_max_position,
        )  # fmt: skip

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, parts: list[Part], wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """token_ids, positions int64 [T], wanted bool [T] -> normed hidden states float32 [T, H], or of the wanted."""
        distinct, inverse = torch.unique(token_ids, return_inverse=True)
        x = self.embedding.rows(distinct, self.traits)[inverse]
        rope = rope_tables(positions, *self._rope)
        for kind, layer in zip(self.config.layer_types, self.layers, strict=True):
            assert isinstance(layer, Layer)
            keys = [part.sliding if kind == SLIDING else part.full for part in parts]
            x = x + self._attention(x, layer, parts, keys, rope)
            if wanted is not None and layer is self.layers[-1]:
                x = x[wanted]  # nobody looks at the others any more
            x = x + self._mlp(x, layer)
        return self._norm(x, self.final_norm)

    def logits(self, hidden: torch.Tensor, candidates: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [N, H], candidates int64 [C], bias [C] -> float32 [N, C]."""
        return linear(hidden, self.head.rows(candidates, self.traits), bias).float()

    def _norm(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.rms_norm(x, (x.shape[-1],), scale, self.config.rms_norm_eps)

    def _attention(
        self,
        x: torch.Tensor,
        layer: Layer,
        parts: list[Part],
        keys: list[Keys],
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        c = self.config
        heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        weight = torch.cat((layer.q, layer.k, layer.v))
        qkv = linear(self._norm(x, layer.attention_norm), weight, layer.qkv_bias).float()
        q, k, v = qkv.view(len(x), -1, dim).split((heads, kv_heads, kv_heads), dim=1)
        q, k = apply_rope_ref(q, *rope), apply_rope_ref(k, *rope)
        # A key's query heads stand behind one another as queries of one head; the sink is a key that sees a dimension
        # of its own, in which each head's query has its sink.
        group, scale = heads // kv_heads, dim**-0.5
        sinks = (layer.sinks / scale).to(q.dtype).view(-1, 1).expand(len(x), heads, 1)
        q = F.pad(torch.cat((q, sinks), dim=-1), (0, QUERY_PADDING - 1))
        q = q.view(-1, kv_heads, group, q.shape[-1]).transpose(0, 1).flatten(1, 2)
        k, v = (F.pad(a, (0, QUERY_PADDING)).transpose(0, 1).contiguous() for a in (k, v))
        nothing = k.new_zeros(kv_heads, 1, dim + QUERY_PADDING)
        sink = nothing.index_fill(2, torch.tensor(dim), 1)
        sizes = [part.size for part in parts]
        all_q, all_k, all_v = (
            q.split([size * group for size in sizes], dim=1),
            k.split(sizes, dim=1),
            v.split(sizes, dim=1),
        )
        outs = []
        for own_q, own_k, own_v, part, seen in zip(all_q, all_k, all_v, parts, keys, strict=True):
            part_k, part_v = [sink, own_k], [nothing, own_v]
            if part.shared is not None and seen.shared:
                skipped = sizes[part.shared] - seen.shared
                part_k.insert(1, all_k[part.shared][:, skipped:])
                part_v.insert(1, all_v[part.shared][:, skipped:])
            out = F.scaled_dot_product_attention(
                own_q.unsqueeze(0),
                torch.cat(part_k, dim=1).unsqueeze(0),
                torch.cat(part_v, dim=1).unsqueeze(0),
                attn_mask=seen.mask,
                scale=scale,
            )
            outs.append(out[0])
        out = torch.cat(outs, dim=1)[..., :dim].unflatten(1, (-1, group)).transpose(0, 1)
        return linear(out.reshape(len(x), -1), layer.out, layer.out_bias).float()

    def _mlp(self, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        c = self.config
        t = self._norm(x, layer.mlp_norm)
        values, experts = torch.topk(F.linear(t, layer.router, layer.router_bias), c.experts_per_token, dim=-1)
        weights = torch.softmax(values, dim=-1)
        t = t.to(COMPUTE)
        added = torch.zeros_like(x)
        for expert in range(c.num_experts):
            token, slot = torch.where(experts == expert)
            w1, w2 = fake_quantize(layer.w1[expert]), fake_quantize(layer.w2[expert])
            gate_up = linear(t.index_select(0, token), w1, layer.b1[expert])
            part = linear(SwiGlu.apply(gate_up, c.swiglu_limit), w2, layer.b2[expert]).float()
            added = added.index_add(0, token, part * weights[token, slot].unsqueeze(-1))
        return added
