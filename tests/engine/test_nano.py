"""How the embedded model is taught and folded: the network that trains is the model that serves."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest
import torch
from safetensors import safe_open

from src.cli.evaluate_nano import BY_HAND
from src.engine.config import ModelConfig
from src.engine.shapes import SIZES, hf_config
from src.harmony.parser import ResponseParser
from src.harmony.vocabulary import CONSTRAIN, VOCAB_SIZE, Vocabulary, load_vocabulary
from src.kernels.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from src.nano.batches import GROUP_TOKENS, IGNORED, BatchMaker
from src.nano.described import described
from src.nano.everyday import archetypes, everyday
from src.nano.examples import Copier, Example, Source, completion_ids, held_out
from src.nano.folding import ASSET, fold, read_folded, restore, unfold
from src.nano.lessons import MIXTURE, lesson
from src.nano.muon import Muon
from src.nano.network import GROUP, Network, TokenTraits, fake_quantize, parts_of
from src.nano.tasks import Task
from src.nano.tools import invented, offered, same_tools
from src.nano.values import value_text
from src.prompt_builder import PromptBuilder
from tests.helpers import load_model, model_logits, relative_rms

MAX_ASSET_BYTES = 6 * 10**6


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return load_vocabulary()


@pytest.fixture(scope="module")
def network(vocabulary: Vocabulary) -> Network:
    """Untrained, with every kind of parameter away from its beginning."""
    torch.manual_seed(5)
    common = torch.arange(0, 6000, 5)
    made = Network(
        ModelConfig.from_json(hf_config(SIZES["nano"])), TokenTraits.of(vocabulary), common
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1 or name.endswith(("own", "b1", "b2")):
                parameter += 0.2 * torch.randn_like(parameter)
    return made


def test_training_rounds_as_the_checkpoint_does() -> None:
    weights = torch.randn(64, 96) * torch.logspace(-3, 3, 64).unsqueeze(1)
    weights[5] = 0
    exact = dequantize_mxfp4(quantize_mxfp4(weights), torch.float32)
    assert torch.equal(fake_quantize(weights), exact)
    weights.requires_grad_()
    fake_quantize(weights).sum().backward()
    assert torch.equal(weights.grad, torch.ones_like(weights)), "the gradient passes through"


def test_the_unfolded_checkpoint_is_the_network(network: Network, tmp_path: Path) -> None:
    fold(network, tmp_path / "folded.safetensors")
    folder = unfold(tmp_path / "folded.safetensors", tmp_path / "nano")
    ids = torch.tensor([*range(3, 150), 199_999, 200_006, 200_008])
    positions = torch.arange(len(ids))
    parts = parts_of(positions, torch.zeros_like(ids), network.config)
    with torch.no_grad():
        expected = network.logits(network(ids, positions, parts), torch.arange(VOCAB_SIZE))
    served = model_logits(load_model(folder), ids.tolist())
    assert relative_rms(expected, served) < 0.03  # bfloat16 in training, eight bits in the file


def test_branches_of_a_group_do_not_see_each_other(network: Network) -> None:
    shared, one, two = [5, 6, 7], [10, 11, 12, 13], [20, 21]
    ids = torch.tensor(shared + one + two)
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 3, 4])
    branches = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    alone_ids, alone_positions = torch.tensor(shared + two), torch.arange(5)
    alone_parts = parts_of(alone_positions, torch.zeros_like(alone_ids), network.config)
    with torch.no_grad():
        packed = network(ids, positions, parts_of(positions, branches, network.config))
        alone = network(alone_ids, alone_positions, alone_parts)
    assert relative_rms(alone[-2:], packed[-2:]) < 0.01


def test_only_wanted_states_are_the_same_as_among_all(network: Network) -> None:
    ids, positions = torch.arange(3, 23), torch.arange(20)
    parts = parts_of(positions, torch.zeros_like(ids), network.config)
    wanted = positions % 3 == 0
    with torch.no_grad():
        whole, some = (network(ids, positions, parts, w) for w in (None, wanted))
    assert len(some) == 7 and relative_rms(whole[wanted], some) < 0.01


@pytest.mark.parametrize("at_once", [1, 4, 128])
def test_parts_see_what_a_mask_of_the_whole_batch_says(
    network: Network, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("src.nano.network.QUERIES_AT_ONCE", at_once)
    window = 4
    groups = [
        ([0] * 7, [*range(7)]),
        ([0, 0, 0, 1, 1, 1, 1, 2, 2, 3], [0, 1, 2, 3, 4, 5, 6, 3, 4, 3]),
        ([0] * 6 + [1, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 6]),
        ([1, 1], [0, 1]),  # nothing shared
        ([0, 1], [0, 1]),
    ]
    branches = torch.tensor([n * GROUP + b for n, (own, _) in enumerate(groups) for b in own])
    positions = torch.tensor([p for _, own in groups for p in own])
    query, key = branches[:, None], branches
    full = ((query == key) | (key == query - query % GROUP)).tril()
    sliding = full & (positions[:, None] - positions < window)
    config = dataclasses.replace(network.config, sliding_window=window)
    heads = config.num_attention_heads // config.num_key_value_heads
    for name, expected in ("full", full), ("sliding", sliding):
        seen = torch.zeros_like(expected)
        parts = parts_of(positions, branches, config)
        ends = torch.tensor([part.size for part in parts]).cumsum(0).tolist()
        for part, end in zip(parts, ends, strict=True):
            keys = getattr(part, name)
            shared_end = 0 if part.shared is None else ends[part.shared]
            places = [*range(shared_end - keys.shared, shared_end), *range(end - part.size, end)]
            mask = (keys.mask == 0).view(part.size, heads, -1)
            assert mask[..., 0].all(), "every query sees the sink"
            assert (mask == mask[:, :1]).all(), "all heads see the same"
            seen[end - part.size : end, places] = mask[:, 0, 1:]
        assert torch.equal(seen, expected), name


def test_groups_of_a_batch_are_strangers(network: Network) -> None:
    ids = torch.tensor([5, 6, 7, 10, 11, 20, 8, 9, 12, 13])
    positions = torch.tensor([0, 1, 2, 3, 4, 3, 0, 1, 2, 3])
    branches = torch.tensor([0, 0, 0, 1, 1, 2, *(GROUP + b for b in (0, 0, 1, 1))])
    alone_parts = parts_of(positions[6:], branches[6:] - GROUP, network.config)
    with torch.no_grad():
        packed = network(ids, positions, parts_of(positions, branches, network.config))
        alone = network(ids[6:], positions[6:], alone_parts)
    assert relative_rms(alone, packed[6:]) < 0.01


def test_a_batch_is_full_of_groups(vocabulary: Vocabulary) -> None:
    for step in range(3):
        batch = BatchMaker(vocabulary, 2, 3000).batch(step)
        assert 3000 <= len(batch.token_ids) < 3000 + GROUP_TOKENS
        numbers, sizes = (batch.branches // GROUP).unique_consecutive(return_counts=True)
        assert numbers.tolist() == list(range(len(numbers)))
        assert sizes.max() <= GROUP_TOKENS and len(numbers) > 3
        starts = batch.positions == 0
        assert torch.equal(batch.branches[starts], numbers * GROUP), "what is shared comes first"


def test_lessons_depend_on_the_seed_alone(vocabulary: Vocabulary) -> None:
    batches = [
        BatchMaker(vocabulary, seed, 1000).batch(step)
        for seed, step in ((1, 7), (1, 7), (1, 8), (2, 7))
    ]
    same, other_step, other_seed = (
        torch.equal(batches[0].token_ids, b.token_ids)
        if b.token_ids.shape == batches[0].token_ids.shape
        else False
        for b in batches[1:]
    )
    assert same and not other_step and not other_seed


def test_targets_are_the_assistants_tokens(vocabulary: Vocabulary) -> None:
    batch = BatchMaker(vocabulary, 3, 1500).batch(0)
    wanted = batch.targets != IGNORED
    (places,) = torch.where(wanted[:-1] & (batch.branches[:-1] == batch.branches[1:]))
    assert torch.equal(batch.targets[places], batch.token_ids[places + 1])
    assert 0.2 < wanted.float().mean() < 0.6


@pytest.mark.parametrize("unseen", [False, True])
def test_every_lesson_is_valid_harmony_that_says_what_it_should(
    vocabulary: Vocabulary, unseen: bool
) -> None:
    source, builder = Source(vocabulary, Random(4), unseen=unseen), PromptBuilder(vocabulary)
    seen = set()
    for made in (made for _ in range(300) for made in lesson(source)):
        seen.add(made.skill)
        prompt = builder.build(
            made.messages,
            tools=made.tools,
            response_format=made.response_format,
            effort=made.effort,
        ).token_ids
        ids = completion_ids(made, vocabulary, prompt)
        parser = ResponseParser(vocabulary, [t["name"] for t in made.tools])
        deltas = [d for token in ids for d in parser.push(token)] + list(
            parser.finish(truncated=False)
        )
        assert not parser.recoveries
        text = {
            kind: "".join(d.text for d in deltas if d.kind == kind)
            for kind in ("reasoning", "content", "tool_call")
        }
        assert text["reasoning"]
        if made.call is not None:
            assert next(d.tool_name for d in deltas if d.tool_name) == made.call[0]
        else:
            assert text["content"] == made.answer_text
            assert all(part in made.answer_text for part in made.expected)
    assert len(seen) == len(MIXTURE) + 2  # calls and results of tools


@pytest.mark.parametrize("kind", [everyday, described, invented])
def test_a_task_is_one_that_its_tool_can_do(
    vocabulary: Vocabulary, kind: Callable[[Source], Task]
) -> None:
    source = Source(vocabulary, Random(9), unseen=False)
    for _ in range(300):
        task = kind(source)
        schema = task.definition.get("parameters", {"type": "object"})
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(task.arguments, schema)
        assert set(task.arguments) <= set(schema.get("properties", {}))
        for value in task.arguments.values():
            for part in value if isinstance(value, list) else [value]:
                if not isinstance(part, bool):
                    assert value_text(part).lower() in task.ask.lower(), task


def test_no_two_tools_on_offer_could_be_meant_by_one_request(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(2), unseen=True)
    for _ in range(200):
        tasks = offered(source, everyday(source), 4, 4)
        assert len({t.name for t in tasks}) == 4
        for task in tasks:
            assert not any(task.confusable(other) for other in tasks if other is not task)


def test_everyday_tools_that_are_examined_are_not_taught(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(3), unseen=False)
    taught = {
        name.replace("_", "").lower() for a in archetypes() if not a.held_out for name in a.names
    }
    held = {name.replace("_", "").lower() for a in archetypes() if a.held_out for name in a.names}
    names = {everyday(source).name.replace("_", "").replace("-", "").lower() for _ in range(1500)}
    assert names <= taught and not names & held and len(held) > 60


def test_conversations_with_the_same_tools_share_their_definitions(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(6), unseen=False)
    maker = BatchMaker(vocabulary, 0, 2000)
    for made in filter(lambda made: len(made) > 2, (same_tools(source) for _ in range(20))):
        prompts = [maker.encode(example)[0] for example in made]
        shared = os.path.commonprefix(prompts)
        tools_end = vocabulary.decode(shared).find("} // namespace functions")
        assert tools_end > 0, "the definitions are in what is shared"
        assert len({example.effort for example in made}) == 1


def test_tools_are_looked_at_one_after_the_other(vocabulary: Vocabulary) -> None:
    """Until one fits; then each of its parameters is told, also those that are left out."""
    source = Source(vocabulary, Random(8), unseen=False)
    left_out = none_fits = 0
    for made in (made for _ in range(60) for made in same_tools(source)):
        if made.skill == "tool_result":
            continue
        assert isinstance(made.analysis[0], str)
        names = [t["name"] for t in made.tools]
        looked_at = re.findall(r"[:?,] (\S+) (no|yes)\b", made.analysis[0].split(" = ")[0])
        if made.call is None:
            none_fits += 1
            assert looked_at == [(name, "no") for name in names]
            continue
        name, arguments = made.call
        assert looked_at == [*((n, "no") for n in names[: names.index(name)]), (name, "yes")]
        for key in made.tools[names.index(name)].get("parameters", {}).get("properties", {}):
            left_out += key not in arguments
            assert f" {key} = {value_text(arguments.get(key, 'none'))}" in made.analysis[0]
    assert left_out > 10 and none_fits > 10


def test_muon_is_torchs_muon_for_many_matrices_at_once() -> None:
    torch.manual_seed(0)
    start = [torch.randn(24, 40), torch.randn(24, 40), torch.randn(40, 16)]
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    ours, theirs = ([torch.nn.Parameter(m.clone()) for m in start] for _ in range(2))
    one = Muon(ours, dtype=torch.float32, **options)
    other = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for step in range(5):
        for mine, reference in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine) + step
            reference.grad = mine.grad.clone()
        one.step()
        other.step()
    for before, mine, reference in zip(start, ours, theirs, strict=True):
        assert relative_rms(reference.detach() - before, mine.detach() - before) < 0.02


def test_training_goes_on_from_a_folded_model(network: Network, tmp_path: Path) -> None:
    fold(network, tmp_path / "folded.safetensors")
    common = torch.cat((network.common[100:], torch.tensor([7, 9])))
    again = Network(network.config, network.traits, common)
    restore(again, read_folded(tmp_path / "folded.safetensors"))
    ids = torch.tensor([*network.common[200:300].tolist(), 7, 1001, 199_999])
    positions = torch.arange(len(ids))
    parts = parts_of(positions, torch.zeros_like(ids), network.config)
    with torch.no_grad():
        candidates = torch.tensor([7, 9, *network.common[150:400].tolist()])
        before, after = (n.logits(n(ids, positions, parts), candidates) for n in (network, again))
    assert relative_rms(before, after) < 0.03


def test_held_out_words_never_appear_in_training(vocabulary: Vocabulary) -> None:
    seen, unseen = (Source(vocabulary, Random(1), unseen=u) for u in (False, True))
    assert not {seen.word() for _ in range(3000)} & {unseen.word() for _ in range(3000)}
    assert held_out("sum 3 4") == held_out("sum 3 4")


@pytest.mark.parametrize(
    ("prompt", "answer", "written"),
    [
        ("weather in Alabama", '{"city": "Alabama"}', ['{"', "city", '":', ' "', *"Alabama", '"}']),
        ("weather in Paris", '"Paris"', ['"', "Paris", '"']),
        ('{"s": "ejecut"}', "s: ejecut.", ["s", ":", " ej", "ecut", "."]),
        ('both climbing and "climbing"', '"climbing"', None),
        ("use do_fyr", "do_fyr(", None),
        ("plain", "other", None),
    ],
)
def test_copied_words_keep_the_prompts_tokens(
    vocabulary: Vocabulary, prompt: str, answer: str, written: list[str] | None
) -> None:
    """None: as the vocabulary writes it, because that is in the prompt already or nothing is."""
    ids = Copier(vocabulary, vocabulary.encode(prompt)).encode(answer)
    assert vocabulary.decode(ids) == answer
    expected = (
        vocabulary.encode(answer)
        if written is None
        else [vocabulary.rank_of[t.encode()] for t in written]
    )
    assert ids == expected


def test_a_call_names_its_tool_in_tokens_of_the_prompt(vocabulary: Vocabulary) -> None:
    """As one text ".get" is a token, which no prompt has."""
    tools = [{"name": "get_horoscope"}]
    made = Example("tool_call", [], "low", ["get_horoscope"], call=("get_horoscope", {}), tools=tools)  # fmt: skip
    prompt = PromptBuilder(vocabulary).build(
        [{"role": "user", "content": "Hi"}], tools=tools, effort="low"
    )
    ids = completion_ids(made, vocabulary, prompt.token_ids)
    header = ids[: ids.index(CONSTRAIN)]
    assert vocabulary.decode(header).endswith("commentary to=functions.get_horoscope ")
    written = [vocabulary.decode([token]) for token in header]
    assert written[written.index("functions") + 1 :][:2] == [".", "get"]
    assert header[-4:-1] == vocabulary.encode(" get_horoscope")[1:]


def test_the_embedded_model_is_small_and_of_the_shape_that_is_named() -> None:
    assert ASSET.stat().st_size <= MAX_ASSET_BYTES
    with safe_open(ASSET, framework="pt") as file:
        assert file.get_slice("layers.5.w1.blocks").get_shape() == [8, 320, 6, 16]


@pytest.mark.parametrize("requests", ["requests", "untouched"])
def test_requests_by_hand_can_be_answered_with_their_tools(requests: str) -> None:
    for ask, name, arguments in BY_HAND[requests]:
        tool = BY_HAND["tools"][name]
        schema = {"properties": tool["parameters"], "required": tool["required"]}
        jsonschema.validate(arguments, {"type": "object", "additionalProperties": False, **schema})
        for key, value in arguments.items():
            said = str(value).lower() in ask.lower()
            assert said or tool["parameters"][key].get("enum"), f"{value!r} is not in {ask!r}"
