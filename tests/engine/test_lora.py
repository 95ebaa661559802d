"""LoRA adapters against PEFT, and in the engine: mixed in a batch, loaded and unloaded while requests run."""

from __future__ import annotations

import dataclasses
import random
import statistics
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoss.cli.conversion import safetensors_folder
from gptoss.cli.convert import main as convert
from gptoss.engine.block_hash import adapter_key
from gptoss.engine.core.core import EngineCore
from gptoss.engine.messages import Adapter, AdapterChanged, AddRequest, NewRequest, SchedulerOutput
from gptoss.engine.model.gpt_oss import GptOss
from gptoss.engine.model.lora import load_adapter
from gptoss.engine.model.lora_file import read_adapter
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.parallel.device_placement import choose_devices
from gptoss.engine.parallel.shards import whole
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.batch import RequestTable, build_batch
from gptoss.kernels.cpu import native
from gptoss.kernels.lora import LoraTable
from tests.engine.test_parallel import LAYOUTS
from tests.support.adapters import ATTENTION, DOWN, GATE_UP, ROUTER, write_adapter
from tests.support.helpers import assert_close, checkpoint, engine_config, load_model, make_cache, relative_rms
from tests.support.tiers import nightly_except

CPU = torch.device("cpu")
BLOCK_SIZE = 16
VOCAB = 512
KINDS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "router": {"target_modules": [], "target_parameters": [ROUTER]},
    "gate_up": {"target_modules": ["o_proj"], "target_parameters": [GATE_UP]},
    "down": {"target_modules": [], "target_parameters": [DOWN]},
    "experts": {"target_modules": [], "target_parameters": [DOWN, GATE_UP], "use_rslora": True},
    "all": {
        "target_modules": ATTENTION,
        "target_parameters": [GATE_UP, DOWN, ROUTER],
        "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 5, "mlp.experts.down_proj": 3},
        "alpha_pattern": {"mlp.experts.gate_up_proj": 7, "router.weight": 3, "o_proj": 12},
    },
    "some layers": {"target_modules": r".*\.[02]\.self_attn\.(q|k)_proj"},
}


@dataclasses.dataclass(frozen=True)
class Theirs:
    """A model as transformers saves it, and each kind of adapter as PEFT does, with its logits of a prompt."""

    model: Path
    adapters: dict[str, tuple[Path, torch.Tensor]]


def prompt(seed: int, length: int = 40) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=4, hidden_size=64, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=VOCAB, sliding_window=16,
    )  # fmt: skip
    base = GptOssForCausalLM(config).eval()
    for parameter in base.parameters():
        parameter.data.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp("model")
    base.save_pretrained(folder)
    found = {}
    for index, (name, options) in enumerate(KINDS.items()):
        found[name] = _adapted(base, options, prompt(index), tmp_path_factory.mktemp("adapter"))
    return Theirs(folder, found)


def _adapted(base: Any, options: dict[str, Any], ids: list[int], folder: Path) -> tuple[Path, torch.Tensor]:
    """A random adapter as PEFT saves it, and the logits of a prompt with it; `base` is left as it was."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, about what PEFT calls
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **options))
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                parameter.data.normal_(0, 0.3)
        model.save_pretrained(folder)
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0]
        model.unload()
    return folder, logits


def lora_model(model: Path, folders: Sequence[Path], dtype: torch.dtype = torch.float32, **options: Any) -> GptOss:
    """The model with an adapter in each slot."""
    plain = load_model(model, dtype, **options)
    table = LoraTable(plain.config.num_layers, len(folders), CPU)
    for slot, folder in enumerate(folders):
        file = read_adapter(folder, plain.config)
        table.put(slot, load_adapter(file, plain.config, whole(plain.config), dtype, CPU))
    return GptOss(plain.config, plain.weights, plain._comm, plain.kernels, table)


def logits_of(model: GptOss, requests: Sequence[tuple[list[int], int]], chunk: int = 1 << 30) -> list[torch.Tensor]:
    """The logits of several prompts, each with the adapter of a slot (-1: none), in one batch a step."""
    blocks_each = -(-max(len(ids) for ids, _ in requests) // BLOCK_SIZE)
    cache = make_cache(model, 1 + blocks_each * len(requests), BLOCK_SIZE, model.kernels.dtype)
    for layer in cache:
        layer.key[0] = layer.value[0] = 0
    table, found = RequestTable(), [[] for _ in requests]
    params = SamplingParams(max_tokens=1, seed=0)
    new = []
    for i, (ids, slot) in enumerate(requests):
        blocks = list(range(1 + i * blocks_each, 1 + (i + 1) * blocks_each))
        new.append(NewRequest(str(i), ids, len(ids), params, (blocks, blocks), 0, slot + 1))
    start = 0
    while counts := {str(i): min(chunk, len(ids) - start) for i, (ids, _) in enumerate(requests) if start < len(ids)}:
        rows = table.apply(SchedulerOutput(new, {}, counts, []))
        batch = build_batch(rows, model.kernels, BLOCK_SIZE, lambda adapters: [a - 1 for a in adapters])
        batch = dataclasses.replace(batch, sample_rows=torch.arange(sum(rows.counts)))
        parts = model.forward(batch, cache).split(rows.counts)
        for state, part in zip(rows.states, parts, strict=True):
            found[int(state.request_id)].append(part)
        table.finish_step(rows, {})
        new, start = [], start + chunk
    return [torch.cat(parts) for parts in found]


def test_each_kind_of_adapter_gives_pefts_logits_alone_and_in_one_batch(theirs: Theirs) -> None:
    model = lora_model(theirs.model, [folder for folder, _ in theirs.adapters.values()])
    requests = [(prompt(i), i) for i in range(len(theirs.adapters))]
    mixed = logits_of(model, [*requests, (prompt(0), -1)])
    plain = logits_of(load_model(theirs.model), [(prompt(0), -1)])[0]
    assert_close("without an adapter", plain, mixed[-1], 1e-5)
    for i, (name, (_, wanted)) in enumerate(theirs.adapters.items()):
        alone = logits_of(model, [requests[i]], chunk=16)[0]
        assert_close(f"{name} alone", wanted, alone, 1e-4)
        assert_close(f"{name} with the others", wanted, mixed[i], 1e-4)
        assert relative_rms(wanted, logits_of(model, [(prompt(i), -1)])[0]) > 0.05, name


@pytest.mark.parametrize("kind", nightly_except("all", of=KINDS))
def test_a_merged_adapter_gives_pefts_logits(
    theirs: Theirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Within what rounding the dense tensors to bfloat16 changes; experts stay in the checkpoint's float32."""
    monkeypatch.setattr(safetensors_folder, "_write_tokenizer", lambda model, out: None)
    folder, wanted = theirs.adapters[kind]
    assert convert([str(theirs.model), str(tmp_path / "merged"), "--merge-adapter", str(folder)]) == 0
    ids = prompt(list(KINDS).index(kind))
    found = logits_of(load_model(tmp_path / "merged"), [(ids, -1)])[0]
    assert_close(kind, wanted, found, 0.02)


def served(folder: Path, number: int) -> Adapter:
    file = read_adapter(folder, ModelConfig.from_folder(checkpoint()))
    return Adapter(number, f"a{number}", str(folder), file.digest)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    """Of the small checkpoint: one of the attention, one of the rest, one of all."""
    model = ModelConfig.from_folder(checkpoint())
    kinds: list[dict[str, Any]] = [
        {},
        {"target_modules": [], "target_parameters": [GATE_UP, DOWN, ROUTER]},
        {"target_parameters": [GATE_UP, DOWN], "rank": 3},
    ]
    root = tmp_path_factory.mktemp("adapters")
    folders = [write_adapter(root / str(i), model, seed=i, **kind) for i, kind in enumerate(kinds)]
    return [served(folder, i + 1) for i, folder in enumerate(folders)]


def start(adapters: Sequence[Adapter], **changes: Any) -> EngineCore:
    lora = {adapter.name: Path(adapter.folder) for adapter in adapters}
    core = EngineCore(choose_devices(engine_config(checkpoint(), lora=lora, **changes)))
    for adapter in adapters:
        core.adapters.load(adapter)
    return core


def ask(name: str, adapter: Adapter | None, ids: list[int], tokens: int = 6) -> AddRequest:
    params = SamplingParams(max_tokens=tokens, seed=3, temperature=0.0, logprobs=2, ignore_eos=True)
    request = AddRequest(name, ids, params)
    if adapter is not None:
        request.adapter, request.adapter_key = adapter.id, adapter_key(adapter.name, adapter.digest)
    return request


Answer = list[tuple[int, float]]


def run(core: EngineCore, requests: Sequence[AddRequest], errors: dict[str, str] | None = None) -> dict[str, Answer]:
    """The tokens and logprobs of each request, and of those that fail the error."""
    for request in requests:
        assert core.add_request(request) is None
    answers: dict[str, Answer] = {request.request_id: [] for request in requests}
    while core.has_work:
        for output in core.step():
            if output.error is not None and errors is not None:
                errors[output.request_id] = output.error
                continue
            assert output.error is None
            logprobs = [numbers.logprob for numbers in output.logprobs or []]
            answers[output.request_id] += zip(output.token_ids, logprobs, strict=True)
        core.adapter_changes()
    core.kv.check_integrity()
    return answers


@pytest.fixture(scope="module")
def native_core(adapters: list[Adapter]) -> Iterator[EngineCore]:
    if native.library() is None:
        pytest.skip("this CPU or machine cannot build the native kernels")
    core = start(adapters, dtype="bfloat16", max_num_seqs=16)
    yield core
    core.executor.shutdown()


def test_an_answer_has_the_same_bits_alone_and_among_other_adapters(
    native_core: EngineCore, adapters: list[Adapter]
) -> None:
    users = [None, *adapters]
    requests = [ask(f"{i}-{j}", users[i], prompt(j, 20 + 9 * j)) for j in range(3) for i in range(len(users))]
    mixed = run(native_core, requests)
    assert len({tuple(mixed[f"{i}-0"]) for i in range(len(users))}) == len(users)
    for request in requests:
        alone = ask("alone", None, request.token_ids)
        alone.adapter, alone.cache_salt = request.adapter, request.request_id  # computed anew
        assert run(native_core, [alone])["alone"] == mixed[request.request_id], request.request_id


def test_bfloat16_is_as_close_on_native_kernels_as_on_torch(theirs: Theirs) -> None:
    folders = [folder for folder, _ in theirs.adapters.values()]
    requests = [(prompt(i, 60), i - 1) for i in range(len(folders) + 1)]
    exact = torch.cat(logits_of(lora_model(theirs.model, folders), requests))

    def median_error(model: GptOss) -> float:
        found = torch.cat(logits_of(model, requests))
        return statistics.median(relative_rms(*rows) for rows in zip(exact, found, strict=True))

    compiled = lora_model(theirs.model, folders, torch.bfloat16, dequantize=False)
    plain = lora_model(theirs.model, folders, torch.bfloat16, kernels="torch")
    assert compiled.kernels.name == "native" and None not in compiled._stacks
    assert median_error(compiled) < 1.1 * median_error(plain) < 0.05
    stacked = logits_of(compiled, requests)
    compiled._stacks = [None]
    for one_call, separate in zip(stacked, logits_of(compiled, requests), strict=True):
        assert torch.equal(one_call, separate)


def test_cached_prefixes_are_kept_apart_by_adapter(native_core: EngineCore, adapters: list[Adapter]) -> None:
    ids = prompt(77, 100)
    run(native_core, [ask("first", adapters[0], ids)])
    hits = native_core.kv.num_hit_tokens
    first = run(native_core, [ask("other", adapters[1], ids), ask("none", None, ids)])
    assert native_core.kv.num_hit_tokens == hits
    again = run(native_core, [ask("other", adapters[1], ids), ask("none", None, ids)])
    assert native_core.kv.num_hit_tokens == hits + 2 * 99
    assert again == first
    replaced = ask("replaced", adapters[1], ids)
    replaced.adapter_key = adapter_key(adapters[1].name, "other files")
    run(native_core, [replaced])
    assert native_core.kv.num_hit_tokens == hits + 2 * 99


def test_an_adapter_is_unloaded_when_its_last_request_has_ended(adapters: list[Adapter]) -> None:
    core = start([], lora_dir=Path("/"), max_loras=1)
    try:
        assert core.add_request(ask("early", adapters[0], prompt(1))).error == "its LoRA adapter is not loaded"
        core.adapters.load(adapters[0])
        assert core.add_request(ask("r", adapters[0], prompt(1), tokens=12)) is None  # waits for the adapter
        changes: list[AdapterChanged] = []
        while not core.scheduler.num_running:
            core.step()
            changes += core.adapter_changes()
        assert changes == [AdapterChanged(1, True)]
        core.adapters.unload(1)
        core.step()
        assert core.adapter_changes() == []
        assert core.abort(["r"])[0].request_id == "r"
        assert core.adapter_changes() == [AdapterChanged(1, False)]
        assert core.add_request(ask("late", adapters[0], prompt(1))).error == "its LoRA adapter is not loaded"
        core.adapters.load(adapters[1])  # into the slot that is free again
        assert run(core, [ask("next", adapters[1], prompt(1))])["next"]
    finally:
        core.executor.shutdown()


def test_an_adapter_that_cannot_be_read_fails_its_requests_alone(
    native_core: EngineCore, adapters: list[Adapter], tmp_path: Path
) -> None:
    gone = Adapter(9, "gone", str(tmp_path), "")
    native_core.adapters.load(gone)
    errors: dict[str, str] = {}
    answers = run(native_core, [ask("fails", gone, prompt(1)), ask("runs", adapters[0], prompt(1))], errors)
    assert len(answers["runs"]) == 6
    assert errors == {"fails": f"its LoRA adapter cannot be loaded: {tmp_path}/adapter_config.json is missing"}


@pytest.mark.nightly
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_have_their_parts_of_an_adapter(adapters: list[Adapter], layout: str) -> None:
    requests = [ask(f"{i}", adapter, prompt(i)) for i, adapter in enumerate([None, *adapters])]
    found = []
    for options in ({}, LAYOUTS[layout]):
        core = start(adapters, num_threads=1, **options)
        try:
            found.append(run(core, requests))
        finally:
            core.executor.shutdown()
    for name, answer in found[0].items():
        assert [token for token, _ in found[1][name]] == [token for token, _ in answer], name
        assert [p for _, p in found[1][name]] == pytest.approx([p for _, p in answer], abs=1e-3), name
