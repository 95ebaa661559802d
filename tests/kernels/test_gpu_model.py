"""A whole gpt-oss on the Triton kernels against the plain torch one, with the engine's own batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from src.engine.config import ModelConfig
from src.engine.messages import NewRequest, SchedulerOutput
from src.engine.model.gpt_oss import GptOss, LayerCache
from src.engine.model.triton_gpt_oss import TritonGptOss
from src.engine.model.weights import dummy_weights, for_kernels
from src.engine.parallel import Communicator
from src.engine.sampling_params import SamplingParams
from src.engine.shapes import SIZES, hf_config
from src.engine.shards import whole
from src.engine.worker.batch import RequestTable, build_batch
from src.kernels.gpu import support
from tests.kernels.gpu_helpers import DEVICE, TYPE, assert_close

BLOCK_SIZE = 16
NUM_BLOCKS = 40
CONFIG = dataclasses.replace(
    ModelConfig.from_json(hf_config(SIZES["nano"])), num_layers=2, vocab_size=512, hidden_size=96, num_experts=6,
    intermediate_size=64, sliding_window=24, layer_types=("sliding_attention", "full_attention"),
)  # fmt: skip
# two rounds: prompts together, then one decoding beside a prompt's second chunk
PROMPTS = {"a": 37, "b": 5, "c": 21}
ROUNDS = ({"a": 37, "b": 5, "c": 9}, {"b": 1, "a": 1, "c": 12}, {"a": 1, "b": 1, "c": 1})


def run(model: GptOss) -> list[torch.Tensor]:
    """-> the logits of every round, a row a token."""
    shape = (NUM_BLOCKS, BLOCK_SIZE, CONFIG.num_key_value_heads, CONFIG.head_dim)
    cache = [
        LayerCache(*(torch.zeros(shape, dtype=TYPE, device=DEVICE) for _ in "kv")) for _ in range(2)
    ]
    table, out, g = RequestTable(), [], torch.Generator().manual_seed(5)
    new, first = [], 1
    for name, length in PROMPTS.items():
        ids = torch.randint(0, CONFIG.vocab_size, (length + 2,), generator=g).tolist()
        blocks = list(range(first, first + 3))
        first += 3
        new.append(
            NewRequest(name, ids, length, SamplingParams(max_tokens=9, seed=0), (blocks, blocks), 0)
        )
    for counts in ROUNDS:
        rows = table.apply(SchedulerOutput(new, {}, dict(counts), []))
        new = []
        batch = build_batch(rows, BLOCK_SIZE, CONFIG.sliding_window, TYPE, DEVICE)
        batch = dataclasses.replace(
            batch, sample_rows=torch.arange(len(batch.token_ids), device=DEVICE)
        )
        out.append(model.forward(batch, cache).cpu())
        table.finish_step(rows, {})
    return out


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("invariant", [False, True])
def test_logits_equal_plain_torch(monkeypatch: pytest.MonkeyPatch, invariant: bool) -> None:
    plain = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    comm = Communicator(whole(CONFIG), DEVICE)
    monkeypatch.setattr(support, "runs_triton", lambda _: False)
    weights = dummy_weights(CONFIG, plain, DEVICE, 1)
    expected = run(GptOss(CONFIG, weights, comm))
    monkeypatch.setattr(support, "runs_triton", lambda _: True)
    layers = [
        dataclasses.replace(one, experts=for_kernels(one.experts, TYPE)) for one in weights.layers
    ]
    weights = dataclasses.replace(weights, layers=layers)
    found = run(TritonGptOss(CONFIG, weights, comm, max_positions=64, invariant=invariant))
    tolerance = 1e-5 if DEVICE.type == "cpu" else 3e-2
    for step, (one, two) in enumerate(zip(expected, found, strict=True)):
        assert_close(f"round {step}", one, two, tolerance)
