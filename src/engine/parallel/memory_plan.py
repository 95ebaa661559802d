"""Plans the layout of the model on the devices, and whether it fits, before anything is loaded.

No torch.

Sizes are those of stored parameters: MXFP4 experts take 17 bytes for 32 weights, with columns padded for the kernels in
a plan, int8 and FP8 matrices one byte per weight and four per row, everything else two bytes per weight (four in
float32). A number of the KV cache takes as many bytes as one of the weights, or one in FP8.
GB are 10^9 bytes, as for cards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gptoss.config.errors import ConfigError
from gptoss.engine.config import SCORED_ROWS, EngineConfig
from gptoss.engine.model.model_config import FULL, SLIDING, ModelConfig
from gptoss.engine.parallel.shards import SCALE_GROUP, Shard, check_tensor_size, make_shard, split_layers

GB = 10**9
KERNEL_COLUMNS = 128  # of a block of words (kernels/triton/mxfp4_layout.py)
SCALE_BYTES = 4  # of a row in int8 or FP8
MXFP4_BYTES = (SCALE_GROUP // 2 + 1) / SCALE_GROUP
RUNTIME_BYTES = 700 * 10**6  # of an empty process on a card: CUDA context, libraries, communication buffers
USEFUL_KV_TOKENS = 65_536  # below this a card is full of weights and cannot batch
# maximum query heads of all sequences with split keys, and maximum splits of each (kernels/triton/attention.py)
ATTENTION_ROWS = 4096
ATTENTION_SPLITS = 92
GRAPH_BYTES = 4 * 10**6  # of a graph of a few hundred launches, in the driver
MEMORY_SLA_BYTES = 15 * GB  # weights of 120b per card, with four or more cards


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank's bytes, and the free bytes of its device."""

    shard: Shard
    weight_bytes: int
    activation_bytes: int  # with what graphs hold
    lora_bytes: int  # set aside for adapters
    head_bytes: int  # of the draft head
    kv_bytes_per_token: int  # of the full-attention cache; sliding layers keep only their window
    free_bytes: int
    usable_bytes: int  # of the free ones, after gpu_memory_utilization

    @property
    def kv_bytes(self) -> int:
        used = RUNTIME_BYTES + self.weight_bytes + self.activation_bytes + self.lora_bytes + self.head_bytes
        return max(0, self.usable_bytes - used)

    @property
    def kv_tokens(self) -> int:
        return self.kv_bytes // self.kv_bytes_per_token


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    gpu_mode: str  # single, pipeline, tensor or tensor+pipeline
    tensor_size: int
    stage_layers: tuple[range, ...]
    ranks: tuple[RankPlan, ...]
    needed_kv_tokens: int

    @property
    def kv_tokens(self) -> int:
        return min(rank.kv_tokens for rank in self.ranks)

    @property
    def fits(self) -> bool:
        return self.kv_tokens >= self.needed_kv_tokens

    def lines(self) -> list[str]:
        """The plan for the log, one line per rank."""
        noun = "rank" if len(self.ranks) == 1 else "ranks"
        shown = [f"{self.gpu_mode}: {len(self.ranks)} {noun}, KV cache for {self.kv_tokens:,} tokens"]
        for rank in self.ranks:
            s = rank.shard
            others = f"adapters {rank.lora_bytes / GB:.2f} GB, " if rank.lora_bytes else ""
            others += f"draft head {rank.head_bytes / GB:.2f} GB, " if rank.head_bytes else ""
            shown.append(
                f"rank {s.rank}: layers {s.layers.start}-{s.layers.stop - 1}, {len(s.query_heads)} heads, "
                f"{len(s.experts)} experts x {len(s.intermediate)} rows, weights {rank.weight_bytes / GB:.2f} GB, "
                f"activations {rank.activation_bytes / GB:.2f} GB, {others}KV {rank.kv_bytes / GB:.2f} GB, "
                f"free {rank.free_bytes / GB:.2f} GB"
            )
        max_bytes = max(rank.weight_bytes for rank in self.ranks)
        if len(self.ranks) >= 4 and max_bytes > MEMORY_SLA_BYTES:
            shown.append(
                f"weights take {max_bytes / GB:.1f} GB a card, above {MEMORY_SLA_BYTES / GB:.0f} GB: the model has "
                f"{sum(r.weight_bytes for r in self.ranks) / GB:.1f} GB of weights; more cards would take less each"
            )
        return shown


def weight_bytes(
    c: ModelConfig, shard: Shard, element: int, dense_dtype: str = "auto", lm_head_dtype: str = "auto"
) -> int:
    """Bytes of the parameters that a shard holds. `element`: bytes of an unquantised one."""

    def matrix(rows: int, columns: int, dtype: str = dense_dtype) -> int:
        return rows * columns * element if dtype == "auto" else rows * (columns + SCALE_BYTES)

    hidden, inter = c.hidden_size, len(shard.intermediate)
    q_dim, kv_dim = len(shard.query_heads) * c.head_dim, len(shard.kv_heads) * c.head_dim
    attention = q_dim + 2 * kv_dim + hidden + len(shard.query_heads)
    matrices = 3 * hidden * inter * (MXFP4_BYTES if c.quantized else element)
    num_routed = sum(c.experts_of(n) for n in shard.layers)
    experts = num_experts(c, shard) * (matrices + (2 * inter + hidden) * element) + num_routed * (hidden + 1) * element
    dense = matrix(q_dim + 2 * kv_dim, hidden) + matrix(hidden, q_dim)
    layers = len(shard.layers) * ((attention + 2 * hidden) * element + dense) + experts
    embedding = len(shard.vocab) * hidden * element if shard.is_first else 0
    head_dtype = dense_dtype if lm_head_dtype == "auto" else lm_head_dtype
    head = matrix(len(shard.vocab), hidden, head_dtype) + hidden * element if shard.is_last else 0
    return int(layers) + embedding + head


def num_experts(c: ModelConfig, shard: Shard) -> int:
    """The experts of all layers of a shard, whole or in part."""
    return sum(min(len(shard.experts), c.experts_of(n)) for n in shard.layers)


def lora_bytes(config: EngineConfig, shard: Shard) -> int:
    """Bytes that a rank sets aside for LoRA adapters: those of its layers, as if it held all of each."""
    return config.lora_budget_bytes * len(shard.layers) // config.model.num_layers


def padding_bytes(c: ModelConfig, shard: Shard) -> int:
    """Bytes of padding of MXFP4 experts in the layout of the GPU kernels.

    Its blocks have 128 columns: 2880 columns take the space of 2944.
    """
    if not c.quantized:
        return 0
    hidden, inter = c.hidden_size, len(shard.intermediate)
    columns = 2 * inter * (-hidden % KERNEL_COLUMNS) + hidden * (-inter % KERNEL_COLUMNS)
    return int(num_experts(c, shard) * columns * MXFP4_BYTES)


def step_bytes(config: EngineConfig, shard: Shard, element: int) -> int:
    """An upper bound of a step's temporaries, with what graphs hold and what a draft head takes."""
    plain = activation_bytes(config.model, shard, element, config.max_num_batched_tokens, config.max_num_seqs)
    return plain + graph_bytes(config, shard, element) + eager_tap_bytes(config, shard, element)


def activation_bytes(c: ModelConfig, shard: Shard, element: int, max_tokens: int, max_seqs: int) -> int:
    """An upper bound of a step's temporaries.

    They are the widest layer's, and the logits with the sampler's copies.
    """
    # prompt logprobs need one copy of their rows, before the sampler makes its own; decode graphs keep a copy too
    rows = SCORED_ROWS + max(5 * max_seqs, 2 * max_seqs + SCORED_ROWS) if shard.is_last else 0
    return layer_bytes(c, shard, element, max_tokens, max_seqs) + rows * c.vocab_size * 4


def layer_bytes(c: ModelConfig, shard: Shard, element: int, max_tokens: int, max_seqs: int) -> int:
    """An upper bound of the widest layer's temporaries, with the parts that attention adds."""
    q_dim = (len(shard.query_heads) + 2 * len(shard.kv_heads)) * c.head_dim
    expert_rows = c.experts_per_token * (3 * len(shard.intermediate) + 2 * c.hidden_size)
    step = max_tokens * (4 * c.hidden_size + 2 * q_dim + expert_rows) * element
    parts = min(max_seqs * len(shard.query_heads), ATTENTION_ROWS) * ATTENTION_SPLITS
    return step + parts * (c.head_dim + 2) * 4


def graph_bytes(config: EngineConfig, shard: Shard, element: int) -> int:
    """An upper bound of what graphs hold: own temporaries, their inputs, the logits of prompts, states."""
    if config.enforce_eager:
        return 0
    c, rows = config.model, config.max_graph_rows
    columns = -(-config.max_model_len // config.block_size)
    tokens = max(rows, *config.prompt_graph_sizes)
    inputs = 8 * rows * columns * 4  # block tables of both groups, and as many as are copied, of both kinds of graphs
    logits = rows * c.vocab_size * 4 if shard.is_last else 0  # of prompts: those of decode graphs are counted already
    count = len(config.decode_graph_sizes) + len(config.prompt_graph_sizes)
    held = layer_bytes(c, shard, element, tokens, rows) + inputs + logits + count * GRAPH_BYTES
    return held + tap_bytes(config, rows, tokens)


def tap_bytes(config: EngineConfig, rows: int, tokens: int) -> int:
    """Bytes of the states for a draft head: buffers of both kinds of graphs, and a pass's own copies."""
    head, c = config.draft_head, config.model
    num_taps = 0 if head is None else len(head.boundaries(c.num_layers))
    return num_taps * (rows + 2 * tokens) * c.hidden_size * 4  # float32 at most


def eager_tap_bytes(config: EngineConfig, shard: Shard, element: int) -> int:
    """An upper bound of what a step without a graph holds for a draft head beside the layers' temporaries.

    That is the states at the taps from their layers on. What follows (states in the order of the requests, fused, and
    the head's own layer) finds the layers' temporaries free again, so only what exceeds those counts.
    """
    head, c, tokens = config.draft_head, config.model, config.max_num_batched_tokens
    if head is None:
        return 0
    state = tokens * c.hidden_size * 4  # float32 at most
    num_taps = len(head.boundaries(c.num_layers))
    ordered = 2 * num_taps * state  # joined from the step's parts, then in order
    width = max(num_taps, 2)  # the layer's input is as wide as two states
    normed = 3 * width * state + 2 * width * tokens * c.hidden_size * element  # a norm computes in float32
    projected = tokens * (c.hidden_size + 2 * (head.num_heads + 2 * head.num_kv_heads) * head.head_dim) * element
    layer = layer_bytes(c, shard, element, tokens, config.max_num_seqs)
    return num_taps * state + max(0, max(ordered, normed + projected) - layer)


def kv_bytes_per_token(c: ModelConfig, shard: Shard, element: int) -> int:
    """Bytes per token of the cache. `element`: bytes of one of its numbers.

    Full and sliding layers share one pool, so the more numerous kind counts.
    """
    kinds = [c.cache_kinds[i] for i in shard.layers]
    layers = max(kinds.count(FULL), kinds.count(SLIDING))
    return layers * 2 * len(shard.kv_heads) * c.head_dim * element


def stage_layers(c: ModelConfig, stages: int, tensor_size: int, element: int = 2) -> tuple[range, ...]:
    """The layers of each stage, balanced by bytes, including embedding and head."""
    one = make_shard(
        c, 0, tensor_size=tensor_size, stage_layers=[range(1), range(1, 2), range(2, 3)], expert_parallel=False
    )
    layer = weight_bytes(c, _middle(one), element)
    end = len(one.vocab) * c.hidden_size * element
    return tuple(split_layers([layer] * c.num_layers, end, end, stages))


def _middle(shard: Shard) -> Shard:
    """The shard moved to a stage that is neither first nor last."""
    return Shard(
        shard.rank,
        shard.tensor_rank,
        shard.tensor_size,
        1,
        3,
        shard.layers,
        shard.query_heads,
        shard.kv_heads,
        shard.intermediate,
        shard.experts,
        shard.vocab,
    )


def make_plan(
    config: EngineConfig, free: Sequence[int], total: Sequence[int], *, tensor_size: int, stages: int, element: int
) -> MemoryPlan:
    """Plans one layout. `free` and `total`: bytes of each usable device, in order.

    Raises ConfigError if there are too few devices, or the model cannot be split that way.
    """
    c = config.model
    world = tensor_size * stages
    if world > len(free):
        raise ConfigError(
            f"tensor_parallel_size ({tensor_size}) x pipeline_parallel_size ({stages}) needs {world} devices, "
            f"there are {len(free)}"
        )
    layers, head = stage_layers(c, stages, tensor_size), config.draft_head
    head_bytes, head_kv = (0, 0) if head is None else (head.weight_bytes(element), head.kv_bytes_per_token(element))
    ranks = []
    for rank in range(world):
        shard = make_shard(
            c, rank, tensor_size=tensor_size, stage_layers=layers, expert_parallel=config.enable_expert_parallel
        )
        ranks.append(
            RankPlan(
                shard,
                weight_bytes(c, shard, element, config.dense_dtype, config.lm_head_dtype) + padding_bytes(c, shard),
                step_bytes(config, shard, element),
                lora_bytes(config, shard),
                head_bytes,
                kv_bytes_per_token(c, shard, 1 if config.has_fp8_cache else element) + head_kv,
                free[rank],
                max(0, int(free[rank] - (1 - config.gpu_memory_utilization) * total[rank])),
            )
        )
    mode = {(False, False): "single", (True, False): "tensor", (False, True): "pipeline"}
    return MemoryPlan(
        mode.get((tensor_size > 1, stages > 1), "tensor+pipeline"),
        tensor_size,
        layers,
        tuple(ranks),
        min(USEFUL_KV_TOKENS, config.max_model_len),
    )


def choose_plan(config: EngineConfig, free: Sequence[int], total: Sequence[int], *, element: int) -> MemoryPlan:
    """Chooses the layout for these devices, within `gpu_mode` and the configured sizes.

    auto: one card if weights and a useful KV cache fit; else a pipeline for models up to 32 experts, tensor parallel
    for larger ones, over as few cards as do.

    Raises:
        ConfigError: nothing fits; the message has the numbers and the nearest choice that would.
    """
    tensor_sizes, stage_counts = _wanted_sizes(config, len(free))
    tried: list[MemoryPlan] = []
    refused: list[str] = []
    for tensor_size, stages in sorted(
        ((t, s) for t in tensor_sizes for s in stage_counts), key=lambda pair: _preference(config, *pair)
    ):
        try:
            plan = make_plan(config, free, total, tensor_size=tensor_size, stages=stages, element=element)
        except ConfigError as error:
            refused.append(str(error))
            continue
        if plan.fits:
            return plan
        tried.append(plan)
    if not tried:
        raise ConfigError(refused[0])
    raise ConfigError(_does_not_fit(config, tried, element))


def _wanted_sizes(config: EngineConfig, devices: int) -> tuple[list[int], list[int]]:
    """The tensor and pipeline sizes that `gpu_mode` allows."""
    tensor, stages = config.tensor_parallel_size, config.pipeline_parallel_size
    everything = list(range(1, devices + 1)) or [1]
    more = [n for n in everything if n > 1]
    match config.gpu_mode:
        case "single":
            return [1], [1]
        case "tensor":
            return [tensor] if tensor else (_powers_of_two(more) or [2]), [stages or 1]
        case "pipeline":
            return [tensor or 1], [stages] if stages else (more or [2])
        case _:
            if tensor or stages:
                return [tensor or 1], [stages or 1]
            return [1, *_powers_of_two(more)], everything


def _powers_of_two(sizes: list[int]) -> list[int]:
    return [n for n in sizes if n & (n - 1) == 0]


def _preference(config: EngineConfig, tensor_size: int, stages: int) -> tuple[int, int]:
    world = tensor_size * stages
    mixed = tensor_size > 1 and stages > 1
    wrong_kind = stages > 1 if config.model.num_experts > 32 else tensor_size > 1
    return world, 2 * mixed + wrong_kind


def _does_not_fit(config: EngineConfig, tried: list[MemoryPlan], element: int) -> str:
    plan = max(tried, key=lambda p: min(r.usable_bytes - r.weight_bytes for r in p.ranks))
    tight = min(plan.ranks, key=lambda r: r.kv_tokens)
    needed = RUNTIME_BYTES + tight.weight_bytes + tight.activation_bytes + tight.lora_bytes + tight.head_bytes
    kv = plan.needed_kv_tokens * tight.kv_bytes_per_token
    others = f"{tight.lora_bytes / GB:.1f} GB of adapters, " if tight.lora_bytes else ""
    others += f"{tight.head_bytes / GB:.1f} GB of draft head, " if tight.head_bytes else ""
    text = (
        f"the model does not fit: in mode {plan.gpu_mode} rank {tight.shard.rank} needs "
        f"{tight.weight_bytes / GB:.1f} GB of weights, {tight.activation_bytes / GB:.1f} GB of activations, "
        f"{others}{RUNTIME_BYTES / GB:.1f} GB of runtime and {kv / GB:.1f} GB of KV cache for "
        f"{plan.needed_kv_tokens:,} tokens; "
        f"{tight.usable_bytes / GB:.1f} GB of {tight.free_bytes / GB:.1f} GB free may be used "
        f"(gpu_memory_utilization {config.gpu_memory_utilization:g})"
    )
    smaller = "; --model 20b needs a fifth of the memory" if config.model.num_experts > 32 else ""
    count = _cards_needed(config, tight, element)
    more = f"; {count} such devices are enough" if count else ""
    if needed < tight.usable_bytes:
        tokens = (tight.usable_bytes - needed) // tight.kv_bytes_per_token
        return f"{text}; --max-model-len {max(64, tokens)} fits{more}{smaller}"
    return f"{text}{more}{smaller}"


def _cards_needed(config: EngineConfig, like: RankPlan, element: int) -> int | None:
    """The lowest number of devices like this one, up to 16, that can hold the model."""
    for count in (2, 4, 8, 16):
        try:
            check_tensor_size(config.model, count, expert_parallel=config.enable_expert_parallel)
        except ConfigError:
            continue
        free = [like.free_bytes] * count
        total = [
            math.ceil((like.free_bytes - like.usable_bytes) / max(1e-9, 1 - config.gpu_memory_utilization))
        ] * count
        if make_plan(config, free, total, tensor_size=count, stages=1, element=element).fits:
            return count
    return None
