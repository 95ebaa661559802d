"""EAGLE-3 heads: what they compute, and that answers are the same with them as without."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from gptoss.config.errors import ConfigError
from gptoss.engine.core.core import EngineCore
from gptoss.engine.core.draft_proposer import MIN_PAUSE, Drafter
from gptoss.engine.messages import AddRequest, ModelRunnerOutput, NewRequest, SchedulerOutput
from gptoss.engine.model.draft_head import DraftHead, read_draft_head
from gptoss.engine.model.eagle3 import Eagle3Head
from gptoss.engine.model.gpt_oss import GptOss, layer_shape
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.parallel.memory_plan import eager_tap_bytes
from gptoss.engine.parallel.shards import whole
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.batch import RequestTable, build_batch
from gptoss.engine.worker.draft_runner import DraftRunner
from gptoss.engine.worker.worker import Worker
from gptoss.kernels.cpu import native
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.step_layout import StepLayout
from gptoss.kernels.triton.backend import TritonBackend
from tests.engine.test_draft_proposer import answers_of, make_core
from tests.support.draft_heads import write_bigram_head, write_head
from tests.support.fake_runner import FakeRunner, make_request, make_scheduler
from tests.support.helpers import assert_close, checkpoint, engine_config, load_model, make_cache
from tests.support.tiers import nightly_except, sized

needs_native = pytest.mark.skipif(native.library() is None, reason="the CPU kernels do not run here")
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


def plain_guesses(
    head: DraftHead, model: GptOss, states: list[torch.Tensor], ids: list[int], num_more: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits and states of each guess, in float64 and without a cache, from the tensors of the file."""
    read = {name: _tensor(head, name) for name in head.tensors if name != "d2t"}
    hidden_size, eps = model.config.hidden_size, head.rms_norm_eps

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * read[f"{name}.weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ read[f"{name}.weight"].T + read.get(f"{name}.bias", 0)

    given = [state.double() for state in states]
    if head.fc_norm:
        given = [norm(state, f"fc_norm.{i}") for i, state in enumerate(given)]
    if head.taps:
        joined = torch.cat(given, dim=1)
        fused = linear(norm(joined, "input_norm") if head.norm_before_fc else joined, "fc")
    else:
        assert model.weights.final_norm is not None
        x = given[0]
        fused = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * model.weights.final_norm.double()
    frequencies, scale = _frequencies(head)
    logits, kept = [], []
    assert model.weights.embedding is not None
    lm_head = read["lm_head.weight"] if "lm_head.weight" in read else torch.as_tensor(model.weights.lm_head).double()
    for _ in range(1 + num_more):
        embedded = model.weights.embedding[ids].double()
        both = torch.cat((norm(embedded, "layers.0.input_layernorm"), norm(fused, "layers.0.hidden_norm")), dim=1)
        q, k, v = (
            linear(both, f"layers.0.self_attn.{x}_proj").view(len(ids), -1, head.head_dim).transpose(0, 1)
            for x in "qkv"
        )
        angles = torch.arange(len(ids)).double()[:, None] * frequencies
        q, k = (_rotated(x, angles.cos() * scale, angles.sin() * scale) for x in (q, k))
        repeat = head.num_heads // head.num_kv_heads
        scores = q @ k.repeat_interleave(repeat, 0).transpose(1, 2) * head.head_dim**-0.5
        distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
        seen = (distance >= 0) & (distance < (head.window or 1 << 30))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        attended = (weights @ v.repeat_interleave(repeat, 0)).transpose(0, 1).flatten(1)
        x = norm(fused, "layers.0.hidden_norm") if head.norm_before_residual else fused
        x = x + linear(attended, "layers.0.self_attn.o_proj")
        y = norm(x, "layers.0.post_attention_layernorm")
        y = torch.nn.functional.silu(linear(y, "layers.0.mlp.gate_proj")) * linear(y, "layers.0.mlp.up_proj")
        x = x + linear(y, "layers.0.mlp.down_proj")
        normed = norm(x, "norm")
        logits.append(normed[-1] @ lm_head.T)
        kept.append((normed if head.norm_output else x)[-1])
        best = int(logits[-1].argmax())
        if "d2t" in head.tensors:
            best += int(_tensor(head, "d2t")[best])
        ids, fused = [*ids, best], torch.cat((fused, kept[-1][None]))
        assert fused.shape == (len(ids), hidden_size)
    return logits, kept


def _tensor(head: DraftHead, name: str) -> torch.Tensor:
    tensor = head.tensors[name]
    with safe_open(tensor.file, framework="pt") as file:
        found: torch.Tensor = file.get_tensor(tensor.name)
    return found.double() if found.is_floating_point() else found


def _frequencies(head: DraftHead) -> tuple[torch.Tensor, float]:
    """As transformers 5.0 computes them (modeling_rope_utils.py), written out here."""
    dim, rope = head.head_dim, head.rope
    plain = rope.theta ** -(torch.arange(0, dim, 2).double() / dim)
    if rope.type == "llama3":
        turns = rope.original_max_position * plain / (2 * torch.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        mixed = (1 - smooth) * plain / rope.factor + smooth * plain
        high, low = turns > rope.high_freq_factor, turns < rope.low_freq_factor
        return torch.where(high, plain, torch.where(low, plain / rope.factor, mixed)), 1.0
    if rope.type == "yarn":
        bounds = [
            dim * np.log(rope.original_max_position / (turns * 2 * np.pi)) / (2 * np.log(rope.theta))
            for turns in (rope.beta_fast, rope.beta_slow)
        ]
        ramp = ((torch.arange(dim // 2).double() - bounds[0]) / (bounds[1] - bounds[0])).clamp(0, 1)
        return plain / rope.factor * ramp + plain * (1 - ramp), float(0.1 * np.log(rope.factor) + 1)
    return plain, 1.0


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@functools.cache
def model_of(dtype: torch.dtype) -> GptOss:
    return load_model(
        FOLDER, dtype, dequantize=dtype == torch.float32, kernels="torch" if dtype != torch.bfloat16 else "auto"
    )


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
            _tensor(head, "d2t") if "d2t" in head.tensors else torch.zeros(MODEL.vocab_size, dtype=torch.int64)
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


def core_of(**keys: Any) -> EngineCore:
    """An engine without a vocabulary, which takes a second to load."""
    return EngineCore(engine_config(FOLDER, dtype="bfloat16", **keys))


def ask(core: EngineCore, requests: dict[str, tuple[list[int], dict[str, Any]]]) -> tuple[dict[str, list[int]], int]:
    """-> (the tokens by request, steps)."""
    for name, (prompt, options) in requests.items():
        core.add_request(AddRequest(name, prompt, SamplingParams(ignore_eos=True, **options)))
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    steps = 0
    while core.has_work:
        for output in core.step():
            assert output.error is None
            tokens[output.request_id] += output.token_ids
        steps += 1
    core.kv.check_integrity()
    return tokens, steps


PROMPT = [7 * i % 900 + 3 for i in range(70)]
DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 40}


@pytest.fixture(scope="module")
def plain() -> tuple[EngineCore, dict[str, list[int]]]:
    """An engine without drafts, and its answer to PROMPT."""
    core = core_of(num_speculative_tokens=0)
    return core, ask(core, {"a": (PROMPT, DRAWN)})[0]


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory, plain: tuple[EngineCore, dict[str, list[int]]]) -> Path:
    """A head that knows the answer to PROMPT."""
    answer = plain[1]["a"]
    assert len(set(answer)) == len(answer), "a model of random weights draws from all of its vocabulary"
    embedding = model_of(torch.bfloat16).weights.embedding
    assert embedding is not None
    return write_bigram_head(tmp_path_factory.mktemp("heads"), MODEL, embedding.float().numpy(), answer)


@needs_native
@pytest.mark.parametrize("count", nightly_except(3, of=(1, 2, 3, 4)))
def test_answers_are_the_same_with_a_head_that_guesses_wrong(tmp_path: Path, count: int) -> None:
    """With a grammar too: the guesses that break it are for GuidedDecoding to cut."""
    core = make_core(num_speculative_tokens=count, speculative_model=write_head(tmp_path, MODEL))
    drafter, core.scheduler._drafter = core.scheduler._drafter, None
    plain, _ = answers_of(core, sized(8, nightly=40))
    core.scheduler._drafter = drafter
    tokens, _ = answers_of(core, sized(8, nightly=40))
    assert tokens == plain
    stats = core.current_stats()
    assert stats.num_head_draft_total > stats.num_head_accepted_total


@pytest.fixture(scope="module")
def with_head(knowing: Path) -> EngineCore:
    return core_of(speculative_model=knowing)


@needs_native
def test_guesses_that_are_right_save_steps(
    knowing: Path, plain: tuple[EngineCore, dict[str, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once more with a cached prefix, whose blocks hold the head's keys too."""
    core = core_of(num_speculative_tokens=3, speculative_model=knowing, max_num_batched_tokens=24)
    drafter = core.scheduler._drafter
    monkeypatch.setattr(drafter, "finish", lambda request: None)  # nothing is remembered
    tokens, steps = ask(core, {"a": (PROMPT, DRAWN)})
    assert tokens["a"] == plain[1]["a"]
    stats = core.current_stats()
    assert stats.num_head_accepted_total == stats.num_head_draft_total == stats.num_accepted_total
    assert stats.num_head_accepted_total >= 29
    assert steps == 3 + 10, "the prompt in three chunks, then four tokens a step"
    again, fewer = ask(core, {"b": (PROMPT, DRAWN)})
    assert again["b"] == tokens["a"]
    assert fewer == steps - 2
    runner = core.executor.worker.runner._draft_runner
    assert runner is not None
    assert int((runner.cache.key.abs().sum((2, 3)) > 0).sum()) >= len(PROMPT) + 39


@needs_native
@pytest.mark.parametrize("kind", ["preempted", "aborted", "scored", "crowd", "two"])
def test_answers_are_the_same_whatever_else_happens(
    knowing: Path, plain: tuple[EngineCore, dict[str, list[int]]], with_head: EngineCore, kind: str
) -> None:
    """A head that is right for one of the requests and wrong for the others."""
    others = {
        f"o{n}": (PROMPT[n:], {"temperature": 1.0, "seed": n, "max_tokens": 30})
        for n in range({"crowd": 7, "two": 1}.get(kind, 3))
    }
    if kind == "scored":
        others["o1"][1]["prompt_logprobs"] = 0
    cores = [plain[0], with_head]
    if kind == "preempted":
        small: dict[str, Any] = {"enable_prefix_caching": False}
        cores = [
            core_of(num_speculative_tokens=0, cpu_kv_cache_gib=0.0006, **small),
            core_of(speculative_model=knowing, cpu_kv_cache_gib=0.0008, **small),
        ]
    answers = []
    for core in cores:
        if kind == "aborted":
            core.add_request(AddRequest("gone", PROMPT[9:], SamplingParams(max_tokens=50, seed=1, ignore_eos=True)))
            for _ in range(4):
                core.step()
            core.abort(["gone"])
        answers.append(ask(core, {"a": (PROMPT, DRAWN), **others})[0])
        assert (core.current_stats().num_preemptions_total > 0) == (kind == "preempted")
    assert answers[0] == answers[1]
    assert cores[1].current_stats().num_head_accepted_total > 0


@needs_native
def test_prompt_logprobs_and_logprobs_are_the_same(
    plain: tuple[EngineCore, dict[str, list[int]]], with_head: EngineCore
) -> None:
    found = []
    for core in (plain[0], with_head):
        before = core.current_stats().num_draft_total
        params = SamplingParams(max_tokens=6, seed=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
        core.add_request(AddRequest("a", PROMPT, params))
        outputs = []
        while core.has_work:
            outputs += [(o.token_ids, o.logprobs, o.prompt_logprobs) for o in core.step()]
        found.append(outputs)
        assert core.current_stats().num_draft_total == before
    assert found[0] == found[1]


def test_the_head_does_not_see_requests_with_an_adapter(tmp_path: Path) -> None:
    model = model_of(torch.float32)
    head = Eagle3Head(read_draft_head(write_head(tmp_path, MODEL), MODEL), model, 64)
    cache = LayerCache(*(torch.zeros(4, 16, 2, 64) for _ in range(2)))
    runner = DraftRunner(head, cache, 16, 64)
    states = []
    for number, adapter in enumerate((0, 3)):
        blocks = ([1 + number], [1 + number])
        new = NewRequest(f"r{number}", [5, 6, 7], 3, SamplingParams(max_tokens=9, seed=0), blocks, 0, adapter)
        states.append(new)
    rows = RequestTable().apply(SchedulerOutput(states, {}, {"r0": 3, "r1": 3}, []))
    output = ModelRunnerOutput({"r0": 8, "r1": 8}, {})
    hidden = [torch.randn(6, MODEL.hidden_size) for _ in range(3)]
    drafts = runner.run(rows, hidden, output, {"r0": 2, "r1": 2})
    assert drafts.keys() == {"r0"} and len(drafts["r0"]) == 2
    written = (cache.key.abs().sum((2, 3)) > 0).sum(1).tolist()
    assert written == [0, 4, 0, 0]
    assert runner.run(rows, hidden, ModelRunnerOutput({}, {}, {"r0": "not finite"}), {}) == {}


def test_guesses_end_where_the_blocks_do(tmp_path: Path) -> None:
    head = Eagle3Head(read_draft_head(write_head(tmp_path, MODEL), MODEL), model_of(torch.float32), 64)
    for num_known, max_model_len, wanted in ((14, 64, 3), (15, 64, 2), (16, 64, 1), (13, 14, 2)):
        runner = DraftRunner(head, LayerCache(*(torch.zeros(3, 16, 2, 64) for _ in range(2))), 16, max_model_len)
        new = NewRequest("r", list(range(num_known)), num_known, SamplingParams(max_tokens=9, seed=0), ([1], [1]), 0)
        rows = RequestTable().apply(SchedulerOutput([new], {}, {"r": num_known}, []))
        hidden = [torch.randn(num_known, MODEL.hidden_size) for _ in range(3)]
        drafts = runner.run(rows, hidden, ModelRunnerOutput({"r": 8}, {}), {"r": 3})
        assert len(drafts["r"]) == wanted


def test_a_warm_up_leaves_the_blocks_of_requests_alone(tmp_path: Path) -> None:
    head = Eagle3Head(read_draft_head(write_head(tmp_path, MODEL), MODEL), model_of(torch.float32), 256)
    cache = LayerCache(*(torch.zeros(3, 16, 2, 64) for _ in range(2)))
    for num_tokens in (1, 16, 40):
        DraftRunner(head, cache, 16, 256).warm_up(num_tokens)
    assert int((cache.key[0].abs().sum((1, 2)) > 0).sum()) == 16
    assert not cache.key[1:].any() and not cache.value[1:].any()


def test_engines_that_cannot_check_guesses_say_so(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"speculative_model \(--speculative-model\) works on one rank, with the compiled"
    ):
        EngineCore(engine_config(FOLDER, dtype="float32", speculative_model=write_head(tmp_path, MODEL)))


@pytest.mark.parametrize("eager", [True, False])
def test_one_gpu_takes_a_head_with_and_without_graphs(tmp_path: Path, eager: bool) -> None:
    worker = Worker(engine_config(FOLDER, speculative_model=write_head(tmp_path, MODEL), enforce_eager=eager))
    worker.kernels = TritonBackend(layer_shape(MODEL, whole(MODEL), 64), torch.bfloat16, torch.device("cpu"))
    worker._check_draft_head()
    worker.comm.world_size = 2
    with pytest.raises(ConfigError, match="this engine runs triton kernels on 2"):
        worker._check_draft_head()


def drafter_with(guesses: list[int]) -> tuple[Drafter, Any]:
    drafter, request = Drafter(None, 3, has_head=True), make_request("a", [1, 2, 3, 4, 5, 6], max_tokens=100)
    assert drafter.head_limit(request, 3, 0) == 3
    drafter.receive(request, guesses)
    return drafter, request


def test_guesses_are_drafts_for_the_tokens_that_they_follow_alone() -> None:
    drafter, request = drafter_with([40, 41, 42])
    assert drafter.propose(request, 3) == [40, 41, 42]
    assert drafter.propose(request, 2) == [40, 41]
    request.token_ids.append(40)
    assert drafter.propose(request, 3) == []


def test_what_is_forced_or_remembered_goes_before_guesses() -> None:
    class Forced:
        def forced(self, request_id: str) -> list[int]:
            return [40]

        def allowed(self, request_id: str, drafts: list[int]) -> list[int]:
            return drafts[:2]  # the third breaks the grammar

    drafter, request = drafter_with([40, 41, 42])
    drafter._guided = Forced()  # type: ignore[assignment]
    assert drafter.propose(request, 3) == [40, 41]
    drafter.receive(request, [50, 51, 52])
    assert drafter.propose(request, 3) == [40], "guesses that begin otherwise are of no use"
    drafter, request = drafter_with([40, 41, 42])
    request.token_ids += [1, 2, 3]
    drafter.receive(request, [40, 41, 42])
    assert drafter.propose(request, 3) == [4, 5, 6]
    assert drafter.head_limit(request, 3, 3) == 0, "while remembered drafts are tried the head is not asked"


def test_guesses_are_asked_for_as_far_as_they_are_right() -> None:
    drafter, request = drafter_with([])
    limits = []
    for _ in range(120):
        limit = drafter.head_limit(request, 3, 0)
        limits.append(limit)
        drafter.receive(request, [40, 41, 42][:limit])
        num_drafts = len(drafter.propose(request, 3))
        drafter.observe("a", num_drafts, min(1, num_drafts))  # the first is always right, the second never
    assert limits[0] == 3
    assert limits[30:].count(1) > 80 and set(limits[30:]) == {1, 2}
    assert drafter.num_head_accepted == 120


def test_a_head_that_is_never_right_is_hardly_asked() -> None:
    drafter, request = drafter_with([])
    limits = []
    for _ in range(300):
        limits.append(drafter.head_limit(request, 3, 0))
        drafter.receive(request, [40, 41, 42][: limits[-1]])
        drafter.observe("a", len(drafter.propose(request, 3)), 0)
    assert limits[0] == 3 and sum(map(bool, limits)) <= 9 + 6
    assert limits[20 : 20 + MIN_PAUSE - 1].count(0) >= MIN_PAUSE - 2


def test_the_scheduler_asks_the_head_for_what_the_next_step_may_draft() -> None:
    for count, wanted in ((1, [3]), (2, [1, 1]), (3, [1]), (4, [])):
        scheduler = make_scheduler(drafter=Drafter(None, 3, has_head=True), max_num_seqs=8)
        for number in range(count):
            scheduler.add_request(make_request(f"r{number}", 10, 9))
        out = FakeRunner(scheduler).step()
        assert list(out.draft_limits.values()) == wanted
    for params, most in (({"logprobs": 0}, 9), ({}, 2)):  # the second answer ends before a draft could help
        scheduler = make_scheduler(drafter=Drafter(None, 3, has_head=True))
        scheduler.add_request(make_request("a", 10, most, params=params))
        assert not FakeRunner(scheduler).step().draft_limits
    scheduler = make_scheduler(drafter=Drafter(None, 3, has_head=True))
    request = make_request("a", 10, 9)
    request.adapter = 2
    scheduler.add_request(request)
    assert not FakeRunner(scheduler).step().draft_limits


@needs_native
@pytest.mark.parametrize("taps", [(1, 3, 5), (6,)])
def test_the_plan_has_room_for_the_states_of_a_long_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taps: tuple[int, ...]
) -> None:
    core = make_core(speculative_model=write_head(tmp_path, MODEL, taps=taps), max_num_batched_tokens=1500)
    worker = core.executor.worker
    assert isinstance(worker, Worker)
    runner, held = worker.runner._draft_runner, []
    assert runner is not None
    run = runner.run

    def noting(rows: Any, states: list[torch.Tensor], *rest: Any) -> dict[str, list[int]]:
        held.append(sum(state.untyped_storage().nbytes() for state in states))
        return run(rows, states, *rest)

    monkeypatch.setattr(runner, "run", noting)
    assert core.add_request(AddRequest("r", [7] * 1500, SamplingParams(max_tokens=8, seed=0))) is None
    core.step()
    assert held == [len(taps) * 1500 * MODEL.hidden_size * 2]
    assert held[0] <= eager_tap_bytes(worker.config, whole(MODEL), 2)
