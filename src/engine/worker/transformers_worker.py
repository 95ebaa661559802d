"""The model as transformers runs it: for hardware that our kernels do not support, and as an oracle.

It has the same interface. accelerate lays the layers over whatever devices there are (device_map "auto"). Each request
has a cache of its own and is computed by itself: correct everywhere, fast nowhere.
"""

from __future__ import annotations

import logging
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache, Mxfp4Config

from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import ModelRunnerOutput, SchedulerOutput
from gptoss.engine.parallel.shards import whole
from gptoss.engine.worker.adapters import RankAdapters
from gptoss.engine.worker.batch import RequestState, RequestTable, ScoredTokens
from gptoss.engine.worker.device_choice import choose_device, choose_dtype, set_threads
from gptoss.engine.worker.model_runner import sample_states, with_scores
from gptoss.engine.worker.sampling.prompt_logprobs import score_prompts
from gptoss.engine.worker.worker import GIB
from gptoss.kernels.backend import choose_sampling

logger = logging.getLogger(__name__)


class TransformersWorker:
    kernel_path = "transformers"
    prelaunches_steps = False
    adapters: RankAdapters | None = None

    def __init__(self, config: EngineConfig) -> None:
        if config.batch_invariant:
            logger.info("backend transformers computes each request by itself: batch_invariant costs nothing")
        self.config = config
        self.shard = whole(config.model)
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, self.device, config.gpu_dtypes)
        if self.device.type == "cpu":
            set_threads(config.num_threads)
        self._table = RequestTable()
        self._caches: dict[str, DynamicCache] = {}

    def load(self) -> None:
        if self.config.model_path is None:
            raise ConfigError("backend 'transformers' needs a checkpoint: load_format 'dummy' has none")
        started = time.monotonic()
        packed = self.config.model.quantized
        self._model = AutoModelForCausalLM.from_pretrained(
            self.config.model_path,
            dtype=self.dtype,
            device_map="auto" if self.device.type == "cuda" else {"": "cpu"},
            local_files_only=True,
            **({"quantization_config": Mxfp4Config(dequantize=True)} if packed and self.device.type == "cpu" else {}),
        ).eval()
        self.weight_bytes = sum(p.nbytes for p in self._model.parameters())
        self.load_s = time.monotonic() - started
        logger.info("transformers loaded %.2f GiB of weights in %.1f s", self.weight_bytes / GIB, self.load_s)

    def init_cache(self) -> int:
        """Returns how many blocks of tokens the scheduler may hand out.

        The caches themselves grow with the requests.
        """
        c = self.config.model
        element = torch.empty((), dtype=self.dtype).element_size()
        block_bytes = c.num_layers * 2 * c.num_key_value_heads * c.head_dim * element * self.config.block_size
        if self.device.type == "cpu":
            room = int(self.config.cpu_kv_cache_gib * GIB)
        else:
            free, total = torch.cuda.mem_get_info(self.device)
            room = int(free - (1 - self.config.gpu_memory_utilization) * total)
        num_blocks = room // block_bytes
        if num_blocks < 4:
            raise ConfigError(
                f"the KV cache holds {num_blocks} blocks of {block_bytes} bytes; "
                "raise cpu_kv_cache_gib (CPU) or gpu_memory_utilization (GPU)"
            )
        self.kv_cache_bytes = num_blocks * block_bytes
        return num_blocks

    def execute_model(self, out: SchedulerOutput, sampled: dict[str, list[int]] | None = None) -> ModelRunnerOutput:
        for request_id in out.finished_or_preempted_ids:
            self._caches.pop(request_id, None)
        rows = self._table.apply(out)
        sampled_logits, scored_logits = [], []
        for state, count in zip(rows.states, rows.counts, strict=True):
            scored = ScoredTokens.among(state, count)
            logits = self._forward(state, count, 1 if scored is None else count)
            if state.num_computed_tokens + count == state.tokens.size:
                rows.sampled.append(state)
                sampled_logits.append(logits[-1:])
            if scored is not None:
                rows.scored.append(scored)
                scored_logits.append(logits[: scored.count])
        result = ModelRunnerOutput({}, {}, {})
        if sampled_logits:
            result = sample_states(
                torch.cat(sampled_logits), rows.sampled, out, choose_sampling(sampled_logits[0].device)
            )
        if scored_logits:
            result = with_scores(result, score_prompts(torch.cat(scored_logits), rows.scored))
        self._table.finish_step(rows, result.sampled)
        return result

    @torch.inference_mode()
    def _forward(self, state: RequestState, count: int, keep: int) -> torch.Tensor:
        """Returns the logits float32 [keep, V] after the last of `count` new tokens."""
        start = state.num_computed_tokens
        if start == 0:
            self._caches[state.request_id] = DynamicCache(config=self._model.config)
        ids = torch.from_numpy(state.tokens.view[start : start + count].copy()).to(self._model.device)
        found = self._model(
            input_ids=ids.unsqueeze(0),
            past_key_values=self._caches[state.request_id],
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = found.logits[0].float()
        return logits

    def close(self) -> None:
        self._caches.clear()
