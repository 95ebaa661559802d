"""Defines the part of the model that each rank holds. No torch: the memory plan uses it too.

Ranks are numbered by stage: rank = stage * tensor_parallel_size + position in the stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptoss.config.errors import ConfigError
from gptoss.engine.model.model_config import ModelConfig

SCALE_GROUP = 32  # intermediate rows that share an MXFP4 scale in w2, so that no scale is cut


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of one rank. Ranges index the whole model's layers, heads, rows, experts and tokens."""

    rank: int
    tensor_rank: int
    tensor_size: int
    stage: int
    num_stages: int
    layers: range
    query_heads: range
    kv_heads: range
    intermediate: range
    experts: range
    vocab: range

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def is_tensor_leader(self) -> bool:
        """Whether this rank adds what the ranks of a stage must add once: biases and the residual."""
        return self.tensor_rank == 0


def whole(c: ModelConfig) -> Shard:
    """The shard of a single rank."""
    return make_shard(c, 0, tensor_size=1, stage_layers=[range(c.num_layers)], expert_parallel=False)


def make_shard(
    c: ModelConfig, rank: int, *, tensor_size: int, stage_layers: Sequence[range], expert_parallel: bool
) -> Shard:
    """Returns the shard of a rank.

    Raises ConfigError, naming the key, if the model cannot be split that way.
    """
    check_tensor_size(c, tensor_size, expert_parallel=expert_parallel)
    stage, position = divmod(rank, tensor_size)
    group = c.num_attention_heads // c.num_key_value_heads
    heads = split(c.num_attention_heads, tensor_size)[position]
    blocks = split(c.intermediate_size // SCALE_GROUP, tensor_size)[position]
    rows = range(blocks.start * SCALE_GROUP, blocks.stop * SCALE_GROUP)
    return Shard(
        rank=rank,
        tensor_rank=position,
        tensor_size=tensor_size,
        stage=stage,
        num_stages=len(stage_layers),
        layers=stage_layers[stage],
        query_heads=heads,
        kv_heads=range(heads.start // group, (heads.stop - 1) // group + 1),
        intermediate=range(c.intermediate_size) if expert_parallel else rows,
        experts=split(c.num_experts, tensor_size)[position] if expert_parallel else range(c.num_experts),
        vocab=split(c.vocab_size, tensor_size)[position],
    )


def check_tensor_size(c: ModelConfig, size: int, *, expert_parallel: bool) -> None:
    if c.num_attention_heads % size:
        raise ConfigError(
            f"tensor_parallel_size ({size}) does not divide the model's {c.num_attention_heads} query heads"
        )
    heads, group = c.num_attention_heads // size, c.num_attention_heads // c.num_key_value_heads
    if heads % group and group % heads:
        raise ConfigError(
            f"tensor_parallel_size ({size}) cuts a group of {group} query heads that share keys; use a divisor of "
            f"{c.num_key_value_heads} or a multiple of it"
        )
    if expert_parallel and c.layer_experts:
        raise ConfigError("enable_expert_parallel: this model's layers differ in their number of experts; drop it")
    cut = c.num_experts if expert_parallel else c.intermediate_size // SCALE_GROUP
    if cut < size:
        what = "experts" if expert_parallel else f"blocks of {SCALE_GROUP} intermediate rows"
        raise ConfigError(f"tensor_parallel_size ({size}) is more than the model's {cut} {what}")


def split(count: int, parts: int) -> list[range]:
    """Consecutive ranges whose lengths differ by at most one, the longer first: 90 in 4 is 23, 23, 22, 22."""
    small, extra = divmod(count, parts)
    starts = [i * small + min(i, extra) for i in range(parts + 1)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def split_layers(costs: Sequence[int], first_cost: int, last_cost: int, stages: int) -> list[range]:
    """Splits layers into consecutive stages so that the most expensive stage is as cheap as possible.

    `costs` is one number a layer (bytes); `first_cost` and `last_cost` lie on the first and last stage as well.

    Raises:
        ConfigError: more stages than layers.
    """
    if stages > len(costs):
        raise ConfigError(f"pipeline_parallel_size ({stages}) is more than the model's {len(costs)} layers")
    before = [0]
    for cost in costs:
        before.append(before[-1] + cost)

    def stage_cost(stage: int, start: int, stop: int) -> int:
        ends = (first_cost if stage == 0 else 0) + (last_cost if stage == stages - 1 else 0)
        return before[stop] - before[start] + ends

    count = len(costs)
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]  # stage -> stop -> (worst so far, start of this stage)
    for stage in range(stages):
        row: dict[int, tuple[int, int]] = {}
        for stop in range(stage + 1, count - (stages - stage - 1) + 1):
            row[stop] = min(
                (max(worst, stage_cost(stage, start, stop)), start)
                for start, (worst, _) in best[stage].items()
                if start < stop
            )
        best.append(row)
    stops = [count]
    for stage in range(stages, 0, -1):
        stops.append(best[stage][stops[-1]][1])
    stops.reverse()
    return [range(a, b) for a, b in zip(stops, stops[1:], strict=False)]
