"""EAGLE-3 heads: what they compute of the model's states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptoss.engine.messages import NewRequest, SchedulerOutput
from gptoss.engine.model.draft_head import read_draft_head
from gptoss.engine.model.eagle3 import Eagle3Head
from gptoss.engine.model.gpt_oss import GptOss
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.batch import RequestTable, build_batch
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.reference.rope import yarn_inverse_frequencies
from gptoss.kernels.step_layout import StepLayout
from tests.support.draft_heads import write_head
from tests.support.eagle3_reference import model_of, plain_guesses, stored_tensor
from tests.support.helpers import assert_close, checkpoint, make_cache

FOLDER = checkpoint()
MODEL = ModelConfig.from_folder(FOLDER)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}
SHAPES: list[dict[str, Any]] = [
    {},
    {"norm_before_fc": True, "norm_before_residual": True, "dialect": "speculators", "rope_scaling": YARN},
    {"fc_norm": True, "norm_output": True, "biases": True, "rope_scaling": LLAMA3},
    {"taps": (), "draft_vocab": None},
    {"taps": (0, 6), "layer_types": ["sliding_attention"], "sliding_window": 5},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: ",".join(shape) or "plain")
def test_a_head_computes_what_its_kind_says(tmp_path: Path, shape: dict[str, Any], dtype: torch.dtype) -> None:
    model = model_of(dtype)
    shape = {"dialect": "sglang"} | shape
    head = read_draft_head(write_head(tmp_path, MODEL, shape.pop("dialect"), **shape), MODEL)
    eagle = Eagle3Head(head, model, 1024)
    rng = torch.Generator().manual_seed(0)
    length, block_size = 21, 8
    ids = torch.randint(0, 1000, (length,), generator=rng).tolist()
    states = [torch.randn(length, MODEL.hidden_size, generator=rng).to(dtype) for _ in head.boundaries(6)]
    cache = LayerCache(*(torch.full((8, block_size, 2, 64), torch.nan, dtype=dtype) for _ in range(2)))
    cache.key[0] = cache.value[0] = 0
    table = np.array([5, 2, 7, 1])

    def step(start: int, count: int) -> Any:
        return eagle.kernels.prepare_step(StepLayout.of([start], [count], ([table], [table]), block_size))

    fused = eagle.fuse(states)
    eagle.store(torch.tensor(ids[:20]), fused[:20], cache, step(0, 20))
    token, hidden = eagle.guess(torch.tensor(ids[20:]), fused[20:], cache, step(20, 1))
    logits, kept = plain_guesses(head, model, states, ids, 1)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert_close("state", kept[0][None], hidden, tolerance)
    if dtype == torch.float32:
        second, after = eagle.guess(token, hidden, cache, step(21, 1))
        assert_close("state of the second guess", kept[1][None], after, tolerance)
        differences = (
            stored_tensor(head, "d2t") if "d2t" in head.tensors else torch.zeros(MODEL.vocab_size, dtype=torch.int64)
        )
        best = [int(one.argmax()) for one in logits]
        assert [int(token), int(second)] == [one + int(differences[one]) for one in best]


def test_a_head_of_another_head_size_takes_plain_torch(tmp_path: Path) -> None:
    folder = write_head(tmp_path, MODEL, head_dim=32)
    eagle = Eagle3Head(read_draft_head(folder, MODEL), model_of(torch.bfloat16), 1024)
    assert eagle.kernels.name == "torch"


def test_taps_are_what_the_layers_take(tmp_path: Path) -> None:
    """On the native kernels too, where all layers of a part are one call."""
    plain = model_of(torch.bfloat16)
    whole = GptOss(plain.config, plain.weights, plain._comm, plain.kernels, taps=tuple(range(7)))
    logits, states, tapped = [], [], []
    for model in (plain, whole):
        cache = make_cache(model, 4, 16, torch.bfloat16)
        for layer in cache:
            layer.key[0] = layer.value[0] = 0
        new = NewRequest("r", list(range(5, 25)), 20, SamplingParams(max_tokens=1, seed=0), ([1, 2], [1, 2]), 0)
        rows = RequestTable().apply(SchedulerOutput([new], {}, {"r": 20}, []))
        batch = build_batch(rows, model.kernels, 16)
        found: list[torch.Tensor] = []
        logits.append(model.forward(batch, cache, states=found))
        tapped.append(found)
        x = model._embed(batch.token_ids)
        states = [x.clone()]
        for layer, own in zip(model.weights.layers, cache, strict=True):
            x = model.layer(x, layer, own, batch.step)
            states.append(x)
    assert torch.equal(*logits)
    assert not tapped[0] and len(tapped[1]) == 7
    for wanted, given in zip(states, tapped[1], strict=True):
        assert torch.equal(wanted, given)


def test_a_yarn_ramp_of_no_width_is_finite() -> None:
    frequencies, _ = yarn_inverse_frequencies(64, 1e4, 8.0, 32.0, 1.0, 6, truncate=True)
    assert frequencies.isfinite().all() and frequencies[0] == 1.0
    assert float(frequencies[1]) == pytest.approx(1e4 ** (-1 / 32) / 8)
