"""How the embedded model is taught and folded: the network that trains is the model that serves."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoss.embedded.token_rows import CODE_SIZE, LENGTHS, LETTERS, NO_LETTER, NUM_FEATURES, TokenTraits
from gptoss.embedded.unfold import read_folded, unfold
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.harmony.special_tokens import VOCAB_SIZE
from gptoss.harmony.vocabulary_files import Vocabulary, load_vocabulary
from gptoss.kernels.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from gptoss.kernels.reference.moe import clamped_swiglu_ref
from tests.support.helpers import load_model, model_logits, relative_rms
from training.nano.batches import IGNORED
from training.nano.first_rows import first_rows
from training.nano.folding import fold, restore
from training.nano.muon import Muon
from training.nano.network import GROUP, Network, SwiGlu, fake_quantize, linear, parts_of
from training.nano.train import (
    DECISIVE_WEIGHT,
    LATER_LETTER,
    LETTER_WEIGHT,
    VALUE_WEIGHT,
    Optimizers,
    TokenWeights,
    main,
    mix,
    train,
)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return load_vocabulary()


@pytest.fixture(scope="module")
def network(vocabulary: Vocabulary) -> Network:
    """Untrained, with every kind of parameter away from its beginning."""
    torch.manual_seed(5)
    common = torch.arange(0, 6000, 5)
    made = Network(ModelConfig.from_json(hf_config(SIZES["nano"])), TokenTraits.of(vocabulary), common)
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


def test_the_gradient_of_swiglu_is_autograds() -> None:
    torch.manual_seed(1)
    inputs = torch.randn(50, 12) * 4  # a limit of 3 cuts some of each half
    weights = torch.randn(50, 6)
    grads = []
    for function in (SwiGlu.apply, clamped_swiglu_ref):
        gate_up = inputs.clone().requires_grad_()
        (function(gate_up, 3.0) * weights).sum().backward()
        grads.append(gate_up.grad)
    assert (grads[0] == 0).any() and (grads[0] != 0).any()
    torch.testing.assert_close(*grads)


def test_rows_that_fill_up_a_product_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.nano.network.ROWS", 8)
    monkeypatch.setattr("training.nano.network.COMPUTE", torch.float32)
    torch.manual_seed(2)
    x, weight, bias = torch.randn(11, 6), torch.randn(4, 6), torch.randn(4)
    grads = []
    for product in (linear, torch.nn.functional.linear):
        inputs = [part.clone().requires_grad_() for part in (x, weight, bias)]
        made = product(*inputs)
        made.square().sum().backward()
        grads.append([made.detach(), *(part.grad for part in inputs)])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_new_models_letters_are_apart_and_look_the_same_at_each_position() -> None:
    code, feature = first_rows(192)
    letters = feature[: LETTERS * (NO_LETTER + 1)].view(LETTERS, NO_LETTER + 1, 192)
    rest = feature[LETTERS * (NO_LETTER + 1) :]
    used = torch.stack([(part != 0).any(dim=0) for part in (code, *letters, rest)])
    assert used.sum(dim=0).max() == 1, "what says one thing says nothing else"
    assert code.shape == (CODE_SIZE, 192)
    blocks = torch.stack([rows[:, place] for rows, place in zip(letters, used[1:-1], strict=True)])
    assert (blocks == blocks[0]).all()


def test_the_head_has_no_rows_for_what_it_does_not_tell(network: Network) -> None:
    rows = [network.traits.features_of(table) for table in (network.embedding, network.head)]
    first_of_more = LETTERS * (NO_LETTER + 1) + LENGTHS + 256
    assert (rows[0] >= first_of_more).sum() > 100 and (rows[1] < first_of_more).all()
    with torch.no_grad():
        before = network.head.rows(torch.arange(500), network.traits)
        network.head.feature[first_of_more:] += 1
        assert torch.equal(before, network.head.rows(torch.arange(500), network.traits))


def test_the_file_leaves_out_features_that_no_row_is_made_of(network: Network, tmp_path: Path) -> None:
    fold(network, tmp_path / "folded.safetensors")
    folded = read_folded(tmp_path / "folded.safetensors")
    for name, table in (("embedding", network.embedding), ("head", network.head)):
        used = network.traits.features_of(table)
        assert len(folded[f"{name}.feature"]) == len(used) < 0.7 * NUM_FEATURES
    assert len(folded["head.feature"]) < len(folded["embedding.feature"])


def test_the_unfolded_checkpoint_is_the_network(network: Network, tmp_path: Path) -> None:
    fold(network, tmp_path / "folded.safetensors")
    folder = unfold(tmp_path / "folded.safetensors", tmp_path / "nano")
    ids = torch.tensor([*range(3, 80), *range(1200, 1270), 199_999, 200_006, 200_008])
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
    monkeypatch.setattr("training.nano.network.QUERIES_AT_ONCE", at_once)
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


def test_what_is_exported_may_be_the_mean_of_the_last_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.nano.train.common_tokens", lambda _: torch.arange(0, 6000, 5))
    after_each: list[torch.Tensor] = []
    step_of = Optimizers.step

    def step(self: Optimizers, step: int) -> None:
        step_of(self, step)
        after_each.append(self._parameters[0].detach().clone())

    monkeypatch.setattr(Optimizers, "step", step)

    def trained(average_over: int) -> torch.Tensor:
        made = train(
            tmp_path / str(average_over),
            start=None,
            seed=3,
            steps=3,
            batch_tokens=100,
            muon_rate=1e-2,
            adam_rate=1e-2,
            average_over=average_over,
        )
        return next(made.parameters()).detach()

    assert torch.equal(trained(1), after_each[2])
    one, two, three = after_each[:3]
    expected = 0.75 * (0.75 * one + 0.25 * two) + 0.25 * three
    assert not torch.allclose(expected, three, atol=1e-4)
    torch.testing.assert_close(trained(4), expected)
    assert len(after_each) == 6
    torch.testing.assert_close(trained(4), expected)
    assert len(after_each) == 6, "it goes on from its checkpoint, where nothing is left to do"


def test_what_is_exported_may_keep_a_share_of_the_start(network: Network, tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    fold(network, start)
    began, trained = copy.deepcopy(network), copy.deepcopy(network)
    restore(began, read_folded(start))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter))
    mixed = copy.deepcopy(trained)
    mix(mixed, start, 0.25)
    weights = zip(*(n.layers[2].w1[3].detach() for n in (began, trained, mixed)), strict=True)
    for before, after, mean in weights:
        assert torch.allclose(mean, 0.25 * before + 0.75 * after, atol=1e-6)
    used = network.traits.features_of(mixed.head)
    assert torch.allclose(
        mixed.head.feature[used], 0.25 * began.head.feature[used] + 0.75 * trained.head.feature[used], atol=1e-6
    )


@pytest.mark.parametrize("options", [["--start-share", "0.5"], ["--start-share", "2", "--start", "x"]])
def test_a_share_of_nothing_is_refused(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path), *options])


def test_what_is_hard_and_decides_counts_more(vocabulary: Vocabulary) -> None:
    weights = TokenWeights(vocabulary)

    def of(text: str) -> dict[str, float]:
        ids = vocabulary.encode(text)
        told = weights(torch.tensor([IGNORED, *ids])).tolist()[1:]
        return {vocabulary.token_bytes[i].decode(): w for i, w in zip(ids, told, strict=True)}

    told = of("get_weather no, find_hotels yes: city = Paris, stars = none")
    assert told[" no"] == told[" yes"] == DECISIVE_WEIGHT
    assert told[" Paris"] == told[" none"] == VALUE_WEIGHT and told[" city"] == told[" ="] == 1
    ids = torch.tensor([vocabulary.rank_of[letter] for letter in (b"a", b"b", b"c")])
    spelled = [LETTER_WEIGHT * (1 + LATER_LETTER * place) for place in range(3)]
    assert weights(ids).tolist() == spelled
