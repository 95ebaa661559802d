"""Measures decode steps and prefill of a model with random weights, through the engine's batches and graphs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator

import torch

from bench.gpu.timing import Row, graph_us
from bench.kernels.batches import random_sizes, step_rows
from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import NewRequest, SchedulerOutput
from gptoss.engine.model.gpt_oss import GptOss, layer_shape
from gptoss.engine.model.model_config import FULL, SLIDING, ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.engine.model.weights import dummy_weights, iterate_tensors
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import whole
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker import kernel_check, precompile
from gptoss.engine.worker.batch import RequestTable, StepRows, build_batch
from gptoss.engine.worker.cuda_graphs import GraphRunner
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.triton.backend import TritonBackend

BLOCK_SIZE = 64
REPEATS = 20
PREFILL_REPEATS = 3
DEVICE = torch.device("cuda")


class Loaded:
    def __init__(self, name: str, *, max_tokens: int, invariant: bool = False, layers: int | None = None) -> None:
        """`max_tokens`: cached tokens of all sequences together. `layers`: so many of the model's alone."""
        self.name = name
        self.c = ModelConfig.from_json(hf_config(SIZES[name]))
        if layers:
            kinds = self.c.layer_types[:layers]
            self.c = dataclasses.replace(self.c, num_layers=layers, layer_types=kinds)
        shape = layer_shape(self.c, whole(self.c), 131_072)
        kernels = TritonBackend(shape, torch.bfloat16, DEVICE, batch_invariant=invariant)
        weights = dummy_weights(self.c, torch.bfloat16, DEVICE, 0, prepare_layer=kernels.prepare_layer)
        self.bytes = sum(t.nbytes for t in iterate_tensors(weights))
        self.comm = Communicator(whole(self.c), DEVICE)
        self.model = GptOss(self.c, weights, self.comm, kernels)
        self.num_blocks = max_tokens // BLOCK_SIZE + 2
        shape = (self.num_blocks, BLOCK_SIZE, self.c.num_key_value_heads, self.c.head_dim)
        pairs = [
            LayerCache(*(torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE) for _ in "kv"))
            for _ in range(self.c.num_layers // 2)
        ]
        self.cache = [pairs[i // 2] for i in range(self.c.num_layers)]

    def check(self) -> Row:
        error = kernel_check.check_layers(self.model, self.cache, self.comm, BLOCK_SIZE)
        return Row(
            "model",
            f"{self.name} layers against plain torch",
            0.0,
            note=f"relative error {error:.2e}",
            extra={"error": error},
        )

    def prepared(self, batch: int, context: int) -> tuple[GraphRunner, StepRows]:
        """A captured decode step, and the requests that it is for."""
        graphs = GraphRunner(self._engine(batch), self.model, self.cache, DEVICE)
        graphs.capture_sizes([batch])
        table, width = RequestTable(), math.ceil((context + 64) / BLOCK_SIZE)
        new = []
        for i in range(batch):
            ids = [(i + j) % self.c.vocab_size for j in range(context)]
            blocks = [1 + (i * width + j) % (self.num_blocks - 1) for j in range(width)]
            new.append(
                NewRequest(str(i), ids, context, SamplingParams(max_tokens=9, seed=0), (blocks, blocks), context - 1)
            )
        rows = table.apply(SchedulerOutput(new, {}, {r.request_id: 1 for r in new}, []))
        return graphs, rows

    def _engine(self, max_num_seqs: int) -> EngineConfig:
        return EngineConfig(
            self.c,
            None,
            load_format="dummy",
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(2048, max_num_seqs),
            max_model_len=131_072,
        )

    def compilations(self, steps: int) -> Row:
        """What random mixed steps compile that the warm-up did not."""
        engine, found = self._engine(32), []
        if DEVICE.type == "cuda":
            kernel_check.warm_up(self.model, self.cache, engine, self.comm)
            precompile.warn_when_compiling(found.append)
        limits = {"max_tokens": engine.max_num_batched_tokens, "max_len": engine.max_model_len}
        if DEVICE.type != "cuda":
            limits = {"max_tokens": 12, "max_len": 40}
        for contexts, counts in random_sizes(steps, max_num_seqs=engine.max_num_seqs, **limits):
            rows = step_rows(contexts, counts, self.num_blocks, BLOCK_SIZE)
            logits = self.model.forward(build_batch(rows, self.model.kernels, BLOCK_SIZE), self.cache)
            if len(logits):
                kernel_check.launch_sampler(logits)
        name = f"{self.name} kernels compiled in {steps} random steps"
        note = f"{len(found)}: {', '.join(found[:5])}" if found else "0"
        return Row("model", name, 0.0, note=note, extra={"compiled": found})

    def eager(self, rows: StepRows) -> torch.Tensor:
        """The same step without a graph -> its logits."""
        batch = build_batch(rows, self.model.kernels, BLOCK_SIZE)
        return self.model.forward(batch, self.cache)

    def decode(self, batch: int, context: int) -> Row:
        """The whole step but sampling: buffers filled, graph replayed. The rate is the graph's: serving, the host works
        while the device computes the next step."""
        graphs, rows = self.prepared(batch, context)
        graphs.run(rows.states)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(REPEATS):
            graphs.run(rows.states)
            torch.cuda.synchronize()
        us = (time.perf_counter() - started) * 1e6 / REPEATS
        replay = graph_time(graphs, batch)
        return Row(
            "model",
            f"{self.name} decode step, batch {batch}, context {context}",
            us,
            extra={"tok_s": round(batch / replay * 1e6), "graph_us": round(replay, 1)},
            note=f"{batch / replay * 1e6:,.0f} tok/s by the graph's {replay:,.0f} us, {batch / us * 1e6:,.0f} with the host",
        )

    def prefill(self, tokens: int) -> Row:
        ids = [j % self.c.vocab_size for j in range(tokens)]
        blocks = list(range(1, tokens // BLOCK_SIZE + 2))
        table = RequestTable()
        new = [NewRequest("p", ids, tokens, SamplingParams(max_tokens=9, seed=0), (blocks, blocks), 0)]
        rows = table.apply(SchedulerOutput(new, {}, {"p": tokens}, []))
        batch = build_batch(rows, self.model.kernels, BLOCK_SIZE)
        self.model.forward(batch, self.cache)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(PREFILL_REPEATS):
            self.model.forward(batch, self.cache)
        torch.cuda.synchronize()
        us = (time.perf_counter() - started) * 1e6 / PREFILL_REPEATS
        kinds = self.c.layer_types
        seen = sum(
            kinds.count(kind) * sum(min(i + 1, limit) for i in range(tokens))
            for kind, limit in ((FULL, tokens), (SLIDING, self.c.sliding_window))
        )
        attention = 4 * seen * self.c.num_attention_heads * self.c.head_dim
        flops = tokens * self._layer_flops() * self.c.num_layers + attention
        return Row("model", f"{self.name} prefill {tokens}", us, flops=flops, note=f"{tokens / us * 1e6:,.0f} tok/s")

    def invariance(self) -> Row:
        """Whether a token's logits are the same bits in a batch of 32, in one of 1 and as the end of a prefill."""
        ids = [(7 * j) % self.c.vocab_size for j in range(300)]
        outputs = []
        for count in (1, 32):
            table, new = RequestTable(), []
            for i in range(count):
                blocks = [1 + 5 * i + j for j in range(5)]
                tokens = ids if i == 0 else [(i + 3 * j) % self.c.vocab_size for j in range(300)]
                new.append(NewRequest(str(i), tokens, 300, SamplingParams(max_tokens=9, seed=0), (blocks, blocks), 0))
            for step in (299, 1):
                rows = table.apply(SchedulerOutput(new, {}, dict.fromkeys(map(str, range(count)), step), []))
                new = []
                batch = build_batch(rows, self.model.kernels, BLOCK_SIZE)
                logits = self.model.forward(batch, self.cache)
                table.finish_step(rows, {})
            outputs.append(logits[0])
        table = RequestTable()
        blocks = list(range(1, 6))
        new = [NewRequest("p", ids, 300, SamplingParams(max_tokens=9, seed=0), (blocks, blocks), 0)]
        rows = table.apply(SchedulerOutput(new, {}, {"p": 300}, []))
        batch = build_batch(rows, self.model.kernels, BLOCK_SIZE)
        outputs.append(self.model.forward(batch, self.cache)[0])
        same = [bool(torch.equal(outputs[0], other)) for other in outputs[1:]]
        note = f"alone = among 32: {same[0]}; decode = prefill: {same[1]}"
        return Row("model", f"{self.name} batch_invariant", 0.0, note=note, extra={"same_bits": same})

    def _layer_flops(self) -> int:
        c = self.c
        width = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        expert = 3 * c.hidden_size * c.intermediate_size * c.experts_per_token
        return 2 * (width * c.hidden_size + expert + c.num_experts * c.hidden_size)


def graph_time(graphs: GraphRunner, batch: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        graphs.replay(batch)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / 20


def launches() -> Iterator[Row]:
    """The fixed cost of a launch in a graph: 150 kernels that each wait for the one before."""
    from gptoss.kernels.triton import dense

    x = torch.randn(1, 64, device=DEVICE, dtype=torch.bfloat16)
    scale = torch.ones(64, device=DEVICE, dtype=torch.bfloat16)

    def chain() -> None:
        y = x
        for _ in range(150):
            y, _ = dense.norm_tokens(y, scale, 1e-5)

    yield Row("launch", "one of 150 dependent small kernels in a graph", graph_us(chain) / 150)
