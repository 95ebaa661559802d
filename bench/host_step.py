"""Measures the host's work for one decode step on a GPU, by number of requests.

    python bench/host_step.py [--lookahead 0]

It consists of scheduling, grammars, the sampler's inputs, the buffers of the next step, accounting and encoding; copies
and launches are not included. The device is replaced by one that is always ready. On a GPU this work should overlap
with the next step, which only a run on a GPU can confirm. Passes are those through the model: a request whose next
token had no slot in the cache needs a second one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptoss.engine.config import EngineConfig
from gptoss.engine.core.grammar_matcher import GuidedDecoding, load_tokenizer
from gptoss.engine.core.kv_cache_manager import KVCacheManager
from gptoss.engine.core.request import Request
from gptoss.engine.core.scheduler import Scheduler
from gptoss.engine.messages import EngineStats, Outputs
from gptoss.engine.model.gpt_oss import layer_shape
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import whole
from gptoss.engine.sampling_params import LoopGuard, SamplingParams
from gptoss.engine.worker.cuda_graphs import GraphRunner
from gptoss.engine.worker.model_runner import ModelRunner
from gptoss.engine.worker.sampling import sampler
from gptoss.engine.worker.sampling.sampling_row import SamplingRow
from gptoss.harmony.grammar import TurnSpec, turn_grammar
from gptoss.harmony.special_tokens import END, SPECIAL_TOKENS, SPLIT_PATTERN, STOP_TOKEN_IDS
from gptoss.harmony.vocabulary_files import load_vocabulary
from gptoss.kernels.device_copy import to_device
from gptoss.kernels.triton.backend import TritonBackend

CPU = torch.device("cpu")
MODEL = ModelConfig.from_json(hf_config(SIZES["20b"]))
CONFIG = EngineConfig(
    MODEL, None, load_format="dummy", max_model_len=MODEL.max_position, max_num_seqs=256, max_num_batched_tokens=1 << 20
)
PROMPT = 1000
WARM, STEPS = 30, 150
PARTS = ("schedule", "masks", "run", "account", "grammars", "encode")
TEXT = Path(__file__).resolve().parents[1] / "README.md"


class Device:
    """Its logits are there at once, and it writes `script` in every row."""

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.passes = 0
        self.logits = torch.zeros(CONFIG.max_num_seqs, 1).expand(-1, MODEL.vocab_size)

    def forward(self, *_: Any) -> torch.Tensor:
        self.passes += 1
        return self.logits

    def pick(
        self, _: torch.Tensor, rows: list[SamplingRow], masks: list[int], bitmask: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sampler._uniform(rows)
        to_device(np.ascontiguousarray(bitmask), torch.int32, CPU)
        tokens = [self.script[len(row.output_ids)] for row in rows]
        return torch.tensor(tokens), torch.zeros(len(rows))


class Host:
    """All that stands between two steps, with `count` requests that go on and on."""

    def __init__(
        self, count: int, script: list[int], grammar: str | None, guided: GuidedDecoding, lookahead: int
    ) -> None:
        kv = KVCacheManager(40_000, CONFIG.block_size, MODEL.sliding_window, enable_prefix_caching=True)
        self.scheduler, self.guided = Scheduler(CONFIG, kv, lookahead=lookahead), guided
        self.device = device = Device(script)
        sampler._pick_natively = sampler._pick = device.pick
        model: Any = device
        graphs = GraphRunner(CONFIG, model, [], CPU, capture=lambda _: device.forward)
        graphs.capture_all()
        comm = Communicator(whole(MODEL), CPU)
        shape = layer_shape(MODEL, whole(MODEL), CONFIG.max_model_len)
        kernels = TritonBackend(shape, torch.bfloat16, CPU)  # lays the steps out
        self.runner = ModelRunner(CONFIG, model, [], kernels, comm, graphs)
        self.parts: dict[str, list[float]] = defaultdict(list)
        for number in range(count):
            params = SamplingParams(max_tokens=1 << 16, seed=number, temperature=1.0)
            prompt = [number] * (PROMPT + 61 * number % 640)
            self.scheduler.add_request(Request(f"request-{number}", prompt, params))
            if grammar is not None:
                guided.add(f"request-{number}", grammar, LoopGuard(6, (END,)))

    def step(self) -> None:
        times = [time.perf_counter()]

        def passed() -> None:
            times.append(time.perf_counter())

        out = self.scheduler.schedule()
        passed()
        out.grammar_rows, out.grammar_bitmask = self.guided.bitmask(list(out.num_scheduled_tokens))
        passed()
        result = self.runner.execute_model(out, {})
        assert result is not None
        passed()
        outputs = self.scheduler.update_from_output(out, result)
        passed()
        for output in outputs:
            for token_id in output.token_ids:
                self.guided.advance(output.request_id, token_id)
        passed()
        msgspec.msgpack.encode(Outputs(outputs, EngineStats()))
        passed()
        for name, before, after in zip(PARTS, times, times[1:], strict=False):
            self.parts[name].append(1000 * (after - before))
        self.parts["all"].append(1000 * (times[-1] - times[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lookahead", type=int, default=1, help="as of the scheduler")
    lookahead = parser.parse_args().lookahead
    torch.set_num_threads(1)
    vocabulary = load_vocabulary()
    tokenizer = load_tokenizer(
        vocabulary.ranks_path, SPECIAL_TOKENS, SPLIT_PATTERN, MODEL.vocab_size, list(STOP_TOKEN_IDS)
    )
    grammar = turn_grammar(TurnSpec(), vocabulary)
    start = vocabulary.encode_with_special("<|channel|>analysis<|message|>")
    script = start + vocabulary.encode(TEXT.read_text())
    out = sys.stdout.write
    out(f"| requests | grammar | {' | '.join(PARTS)} | all, ms | passes |\n|---|---{'|---' * len(PARTS)}|---|---|\n")
    for count in (1, 4, 16, 64, 256):
        for name, spec in (("Harmony", grammar), ("none", None)):
            guided = GuidedDecoding(tokenizer)
            host = Host(count, script, spec, guided, lookahead)
            for step in range(WARM + STEPS):
                if step == WARM:
                    host.parts.clear()
                    host.device.passes = 0
                host.step()
            shown = [f"{statistics.median(host.parts[part]):.2f}" for part in (*PARTS, "all")]
            out(f"| {count} | {name} | {' | '.join(shown)} | {host.device.passes / STEPS:.2f} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
