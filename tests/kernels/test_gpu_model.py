"""A whole gpt-oss on the Triton kernels against the plain torch one, with the engine's own batches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import NewRequest, SchedulerOutput
from gptoss.engine.model.draft_head import read_draft_head
from gptoss.engine.model.eagle3 import Eagle3Head
from gptoss.engine.model.gpt_oss import GptOss, layer_shape
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.engine.model.weights import dummy_weights
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import whole
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker import kernel_check
from gptoss.engine.worker.batch import RequestTable, build_batch
from gptoss.engine.worker.cuda_graphs import GraphRunner
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.reference.backend import ReferenceBackend
from gptoss.kernels.step_layout import StepLayout
from gptoss.kernels.triton import experts
from gptoss.kernels.triton.backend import TritonBackend
from tests.kernels.gpu_helpers import DEVICE, TYPE, assert_close, normal, on_device
from tests.support.draft_heads import write_head
from tests.support.tiers import nightly_except

pytestmark = [  # numpy's, in the interpreter: a sigmoid far below zero, and rows that are padding
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]
BLOCK_SIZE = 16
NUM_BLOCKS = 40
CONFIG = dataclasses.replace(
    ModelConfig.from_json(hf_config(SIZES["nano"])),
    num_layers=2,
    vocab_size=512,
    hidden_size=96,
    head_dim=32,
    experts_per_token=2,
    num_experts=6,
    intermediate_size=64,
    sliding_window=24,
    layer_types=("sliding_attention", "full_attention"),
)
# two rounds: prompts together, then one decoding beside a prompt's second chunk
PROMPTS = {"a": 37, "b": 5, "c": 21}
ROUNDS = ({"a": 37, "b": 5, "c": 9}, {"b": 1, "a": 1, "c": 12}, {"a": 1, "b": 1, "c": 1})


def triton_model(*, invariant: bool = False, max_positions: int = 128, taps: tuple[int, ...] = ()) -> GptOss:
    kernels = TritonBackend(layer_shape(CONFIG, whole(CONFIG), max_positions), TYPE, DEVICE, batch_invariant=invariant)
    weights = dummy_weights(CONFIG, TYPE, DEVICE, 1, prepare_layer=kernels.prepare_layer)
    return GptOss(CONFIG, weights, Communicator(whole(CONFIG), DEVICE), kernels, taps=taps)


def run(model: GptOss) -> list[torch.Tensor]:
    """-> the logits of every round, a row a token."""
    shape = (NUM_BLOCKS, BLOCK_SIZE, CONFIG.num_key_value_heads, CONFIG.head_dim)
    cache = [LayerCache(*(torch.zeros(shape, dtype=TYPE, device=DEVICE) for _ in "kv")) for _ in range(2)]
    table, out, g = RequestTable(), [], torch.Generator().manual_seed(5)
    new, first = [], 1
    for name, length in PROMPTS.items():
        ids = torch.randint(0, CONFIG.vocab_size, (length + 2,), generator=g).tolist()
        blocks = list(range(first, first + 3))
        first += 3
        new.append(NewRequest(name, ids, length, SamplingParams(max_tokens=9, seed=0), (blocks, blocks), 0))
    for counts in ROUNDS:
        rows = table.apply(SchedulerOutput(new, {}, dict(counts), []))
        new = []
        batch = build_batch(rows, model.kernels, BLOCK_SIZE)
        batch = dataclasses.replace(batch, sample_rows=torch.arange(len(batch.token_ids), device=DEVICE))
        out.append(model.forward(batch, cache).cpu())
        table.finish_step(rows, {})
    return out


DIFFERING = dataclasses.replace(
    CONFIG, layer_types=("sliding_attention", "wide_attention"), wide_window=30, layer_experts=(6, 4)
)


@pytest.mark.parametrize(
    ("config", "invariant"),
    [(CONFIG, False), (CONFIG, True), pytest.param(DIFFERING, False, marks=pytest.mark.nightly)],
    ids=["False", "True", "layers that differ"],
)
def test_logits_equal_plain_torch(config: ModelConfig, invariant: bool) -> None:
    plain = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    shape = layer_shape(config, whole(config), 64)
    weights, comm = dummy_weights(config, plain, DEVICE, 1), Communicator(whole(config), DEVICE)
    expected = run(GptOss(config, weights, comm, ReferenceBackend(shape, plain, DEVICE)))
    kernels = TritonBackend(shape, TYPE, DEVICE, batch_invariant=invariant)
    weights = dataclasses.replace(weights, layers=[kernels.prepare_layer(layer) for layer in weights.layers])
    found = run(GptOss(config, weights, comm, kernels))
    for step, (one, two) in enumerate(zip(expected, found, strict=True)):
        if DEVICE.type == "cpu":
            assert_close(f"round {step}", one, two, 1e-5)
        else:  # the median: rounding may give a token another expert than plain torch gives it
            error = float(((two - one).norm(dim=1) / one.norm(dim=1)).median())
            assert error < 3e-2, f"round {step}: {error}"


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    """With batch_invariant: alone the experts' kernels find the experts, among others a list says which."""
    config = dataclasses.replace(CONFIG, intermediate_size=160)  # more columns than one program of several would take
    kernels = TritonBackend(layer_shape(config, whole(config), 64), TYPE, DEVICE, batch_invariant=True)
    weights = dummy_weights(config, TYPE, DEVICE, 1, prepare_layer=kernels.prepare_layer)
    model = GptOss(config, weights, Communicator(whole(config), DEVICE), kernels)
    g = torch.Generator().manual_seed(3)
    shape = (NUM_BLOCKS, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
    cache = LayerCache(*(on_device(normal(g, *shape)) for _ in "kv"))
    contexts = [30, 3, 17, 9, 1, 12]
    x = on_device(normal(g, len(contexts), config.hidden_size))
    tables = [np.arange(1 + 2 * i, 3 + 2 * i) for i in range(len(contexts))]
    for layer in weights.layers:
        rows = []
        for count in (1, len(contexts)):
            layout = StepLayout.of(contexts[:count], [1] * count, (tables[:count],) * 2, BLOCK_SIZE)
            rows.append(model.layer(x[:count], layer, cache, kernels.prepare_step(layout))[0])
        assert torch.equal(*rows)


def test_graphs_replay_what_eager_steps_compute() -> None:
    """The graphs' static buffers, sizes and padding, on a capture that simply repeats the forward pass.

    With the states that a draft head takes.
    """
    model = triton_model(taps=(0, 1, 2))
    engine = EngineConfig(CONFIG, None, load_format="dummy", max_model_len=128, max_num_seqs=3, block_size=BLOCK_SIZE)
    shape = (NUM_BLOCKS, BLOCK_SIZE, CONFIG.num_key_value_heads, CONFIG.head_dim)
    eager, graphed = (
        [LayerCache(*(torch.zeros(shape, dtype=TYPE, device=DEVICE) for _ in "kv")) for _ in range(2)] for _ in range(2)
    )
    repeats = None if DEVICE.type == "cuda" else lambda forward: forward
    graphs = GraphRunner(engine, model, graphed, DEVICE, repeats, num_taps=model.num_taps)
    graphs.capture_all()
    for cache in graphed:  # padding has been to the null block
        cache.key[1:] = cache.value[1:] = 0
    table, first = RequestTable(), 1
    new = []
    for name, length in (("a", 18), ("b", 3), ("c", 33)):
        ids = [7 * i % CONFIG.vocab_size for i in range(length + 3)]
        new.append(
            NewRequest(name, ids, length, SamplingParams(max_tokens=9, seed=0), ([first, first + 1, first + 2],) * 2, 0)
        )
        first += 3
    rows = table.apply(SchedulerOutput(new, {}, {"a": 18, "b": 3, "c": 33}, []))
    batch = build_batch(rows, model.kernels, BLOCK_SIZE)
    states: list[torch.Tensor] = []
    model.forward(batch, eager, states=states)
    assert graphs.prompts is not None and graphs.prompts.holds(rows)
    graphs.prompts.compute(rows)
    for one, other in zip(states, graphs.prompts.tapped(18 + 3 + 33), strict=True):
        assert_close("states of prompts", one, other, 1e-6 if DEVICE.type == "cpu" else 1e-3)
    for mine, theirs in zip(graphed, eager, strict=True):
        for one, other in ((mine.key, theirs.key), (mine.value, theirs.value)):
            assert_close("keys and values of prompts", other[1:], one[1:], 1e-6 if DEVICE.type == "cpu" else 1e-3)
    table.finish_step(rows, {})
    buffers = set()
    for names in (("a", "b", "c"), ("c",), ("b", "a")):
        rows = table.apply(SchedulerOutput([], {}, dict.fromkeys(names, 1), []))
        batch = build_batch(rows, model.kernels, BLOCK_SIZE)
        batch = dataclasses.replace(batch, sample_rows=torch.arange(len(names), device=DEVICE))
        states = []
        expected = model.forward(batch, eager, states=states)
        found = graphs.run(rows.states)
        for one, other in zip(states, graphs.tapped(len(names)), strict=True):
            assert_close("states", one, other, 1e-6 if DEVICE.type == "cpu" else 1e-3)
        buffers.add(found.data_ptr())
        assert_close(str(names), expected, found, 1e-6 if DEVICE.type == "cpu" else 1e-3)
        table.finish_step(rows, {})
    assert len(buffers) == 1, "graphs of all sizes write their logits to one buffer"


@pytest.mark.parametrize(
    "invariant",
    [True] if DEVICE.type == "cuda" else [pytest.param(True, marks=pytest.mark.nightly), False],
)
def test_a_row_among_drafts_has_the_bits_of_a_row_alone(invariant: bool) -> None:
    """Of 1 to 4 rows: the token after those that are computed, and drafts."""
    model = triton_model(invariant=invariant)
    engine = EngineConfig(CONFIG, None, load_format="dummy", max_model_len=128, max_num_seqs=1, block_size=BLOCK_SIZE)
    shape = (NUM_BLOCKS, BLOCK_SIZE, CONFIG.num_key_value_heads, CONFIG.head_dim)
    cache = [LayerCache(*(torch.zeros(shape, dtype=TYPE, device=DEVICE) for _ in "kv")) for _ in range(2)]
    graphs = GraphRunner(engine, model, cache, DEVICE, None if DEVICE.type == "cuda" else lambda forward: forward)
    graphs.capture_sizes([1, 2, 4])
    table, known = RequestTable(), 14  # the third row is the first of its block
    ids = [7 * i % CONFIG.vocab_size for i in range(known + 4)]
    new = NewRequest("a", ids, known, SamplingParams(max_tokens=9, seed=0), ([1, 2, 3],) * 2, 0)
    rows = table.apply(SchedulerOutput([new], {}, {"a": known}, []))
    model.forward(build_batch(rows, model.kernels, BLOCK_SIZE), cache)
    state = rows.states[0]
    alone = [graphs.compute([(state, known + i)]).clone() for i in range(4)]
    for count in range(2, 5):
        for pair in cache:  # from the first position that is computed now
            pair.key[1, known:] = pair.value[1, known:] = 7.0
            pair.key[2:4] = pair.value[2:4] = 7.0
        found = graphs.compute([(state, known + i) for i in range(count)])
        assert torch.equal(found, torch.cat(alone[:count])), count


def test_the_check_at_start_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    comm = Communicator(whole(CONFIG), DEVICE)
    model = triton_model()
    shape = (2, BLOCK_SIZE, CONFIG.num_key_value_heads, CONFIG.head_dim)
    cache = [LayerCache(*(torch.zeros(shape, dtype=TYPE, device=DEVICE) for _ in "kv")) for _ in range(2)]
    assert kernel_check.check_layers(model, cache, comm, BLOCK_SIZE) < 0.01
    monkeypatch.setattr(experts, "moe_w2", lambda act, w, bias, residual, tiles, config: residual * 1.5)
    assert kernel_check.check_layers(model, cache, comm, BLOCK_SIZE) > kernel_check.TOLERANCE


@pytest.mark.parametrize("own_vocabulary", nightly_except(True, of=(True, False)))
def test_a_draft_head_guesses_as_with_plain_torch(tmp_path: Path, own_vocabulary: bool) -> None:
    folder = write_head(tmp_path, CONFIG, taps=(0, 1, 2), draft_vocab=130 if own_vocabulary else None, fc_norm=True)
    head, model = read_draft_head(folder, CONFIG), triton_model()
    plain = GptOss(
        CONFIG, model.weights, Communicator(whole(CONFIG), DEVICE), ReferenceBackend(model.kernels.shape, TYPE, DEVICE)
    )
    generator = torch.Generator().manual_seed(2)
    hidden = [torch.randn(22, CONFIG.hidden_size, generator=generator).to(DEVICE, TYPE) for _ in head.taps]
    ids = torch.randint(0, 500, (22,), generator=generator).to(DEVICE)
    tables = [np.array([3, 1]), np.array([2, 4])]
    found = []
    for one in (model, plain):
        eagle = Eagle3Head(head, one, 64)
        assert eagle.kernels.name == one.kernels.name
        cache = LayerCache(*(torch.zeros(5, BLOCK_SIZE, 2, 64, dtype=TYPE, device=DEVICE) for _ in "kv"))
        fused = eagle.fuse(hidden)
        first = StepLayout.of([0, 0], [5, 15], (tables, tables), BLOCK_SIZE)
        eagle.store(ids[:20], fused[:20], cache, eagle.kernels.prepare_step(first))
        second = StepLayout.of([5, 15], [1, 1], (tables, tables), BLOCK_SIZE)
        found.append(eagle.guess(ids[20:], fused[20:], cache, eagle.kernels.prepare_step(second)))
    assert torch.equal(found[0][0], found[1][0])
    assert_close("states", found[1][1], found[0][1])
