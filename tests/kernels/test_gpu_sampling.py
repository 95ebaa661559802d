"""Picking tokens in Triton, against plain torch and against what must hold whatever the numbers are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptoss.engine.sampling_params import LogitBias, SamplingParams
from gptoss.engine.worker.sampling.sampler import sample
from gptoss.engine.worker.sampling.truncation import Truncated
from gptoss.kernels.backend import choose_sampling
from gptoss.kernels.triton import sampling, truncated
from tests.kernels.gpu_helpers import DEVICE
from tests.support.helpers import sampling_row

VOCAB = 700
ON_CPU = choose_sampling(torch.device("cpu"))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "TILE", 128)
    monkeypatch.setattr(truncated, "TOP", 16)


def everything(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((rows,), -1, dtype=torch.int32), torch.full((1, 22), -1, dtype=torch.int32)


def pick(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = sampling.pick(*(t.to(DEVICE) for t in tensors))
    return found.tokens.cpu(), found.best.cpu()


def masks(*allowed: list[int]) -> torch.Tensor:
    words = torch.zeros(len(allowed), 22, dtype=torch.int64)
    for row, tokens in zip(words, allowed, strict=True):
        for token in tokens:
            row[token // 32] |= 1 << (token % 32)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def test_the_best_and_the_lowest_of_equals() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[1, [650, 20, 300]] = 9.0
    tokens, best = pick(logits, torch.zeros(3), torch.zeros(3), *everything(3))
    assert tokens.tolist() == [int(logits[0].argmax()), 20, int(logits[2].argmax())]
    assert torch.equal(best, logits.amax(dim=1))


def test_draws_are_those_of_the_running_sum() -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(40, VOCAB, generator=g) * 2
    temperature = torch.rand(40, generator=g) + 0.3
    uniform = torch.rand(40, generator=g)
    given = (logits, temperature, uniform, *everything(40))
    tokens, _ = pick(*given)
    expected, _ = sampling.pick_ref(*given)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("number", [0.0, 0.5, 0.99999994])
def test_a_mask_leaves_what_it_allows(number: float) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 7] = 50.0
    words = masks([31, 32, 699], [64], [5, 400])
    mask_rows = torch.tensor([0, 1, -1], dtype=torch.int32)
    tokens, best = pick(logits, torch.tensor([1.0, 1.0, 0.0]), torch.full((3,), number), mask_rows, words)
    assert int(tokens[0]) == {0.0: 31, 0.5: 32, 0.99999994: 699}[number]
    assert tokens[1:].tolist() == [64, 7]
    assert best.tolist() == [0.0, 0.0, 50.0]


def test_a_row_that_cannot_be_sampled_shows() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[0, 600] = float("nan")
    words = masks([], [1])
    rows = torch.tensor([-1, 0, 1], dtype=torch.int32)
    _, best = pick(logits, torch.tensor([0.0, 1.0, 1.0]), torch.full((3,), 0.5), rows, words)
    assert best[0].isnan() and best[1] == float("-inf") and best[2] == 0.0


def test_what_has_no_weight_is_never_drawn() -> None:
    logits = torch.full((1, VOCAB), float("-inf"))
    logits[0, [130, 131]] = 1.0
    for number in (0.0, 0.4999, 0.5001, 0.99999994):
        tokens, _ = pick(logits, torch.ones(1), torch.tensor([number]), *everything(1))
        assert int(tokens[0]) == (130 if number < 0.5 else 131)


def test_a_draw_does_not_depend_on_the_other_rows() -> None:
    g = torch.Generator().manual_seed(2)
    logits, uniform = torch.randn(6, VOCAB, generator=g), torch.rand(6, generator=g)
    together, _ = pick(logits, torch.ones(6), uniform, *everything(6))
    alone = [int(pick(logits[i : i + 1], torch.ones(1), uniform[i : i + 1], *everything(1))[0]) for i in range(6)]
    assert together.tolist() == alone


def test_the_sampler_gives_the_same_tokens_by_either_way() -> None:
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(6, VOCAB, generator=g) * 3
    params = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.3},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 0.5},
    ]
    rows = [
        sampling_row(SamplingParams(max_tokens=4, seed=11 + i, **p), np.arange(5 + i), np.arange(i))
        for i, p in enumerate(params)
    ]
    mask_rows = [4, 5, 2]
    words = masks(list(range(0, VOCAB, 3)), list(range(100)), [1, 2, 3, 500]).numpy()
    plain = sample(logits.clone(), rows, mask_rows, words, ON_CPU)
    ours = sample(logits.clone().to(DEVICE), rows, mask_rows, words, "triton")
    assert ours.token_ids == plain.token_ids
    assert ours.finite == plain.finite == [True] * 6


def test_a_row_for_which_the_likeliest_do_not_suffice_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(4)) * 3
    params = [{"top_p": 0.9}, {"top_k": 30, "top_p": 0.95}, {"top_k": 4}, {"min_p": 0.01}, {}]
    rows = [
        sampling_row(SamplingParams(max_tokens=4, seed=3 + i, logprobs=1, **p), np.arange(5), np.arange(i))
        for i, p in enumerate(params)
    ]
    words = masks(list(range(0, VOCAB, 2)), list(range(VOCAB))).numpy()
    plain = sample(logits.clone(), rows, [0, 2], words, ON_CPU)
    for top, calls in ((16, 1), (2, 2)):
        monkeypatch.setattr(truncated, "TOP", top)
        started: list[list[int]] = []

        def start(token_ids: torch.Tensor, to: list[list[int]] = started) -> None:
            to.append(token_ids.tolist())

        ours = sample(logits.to(DEVICE, copy=True), rows, [0, 2], words, "triton", start)
        assert ours.token_ids == plain.token_ids == started[-1]
        assert len(started) == calls
        assert (started[0] == started[-1]) is (calls == 1)
        for mine, theirs in zip(ours.logprobs, plain.logprobs, strict=True):
            assert mine is not None and theirs is not None
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)


def test_penalties_and_bias_are_the_same_by_either_way() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    params = [
        {"presence_penalty": 0.5, "frequency_penalty": 1.0, "top_p": 0.7},
        {"repetition_penalty": 1.4, "temperature": 0.0},
        {"logit_bias": LogitBias.of({3: 5.0, 9: -100.0}), "min_tokens": 3, "stop_token_ids": (5,)},
    ]
    rows = [
        sampling_row(SamplingParams(max_tokens=9, seed=i, **p), np.arange(30), np.arange(1 + i) * 7)
        for i, p in enumerate(params)
    ]
    nothing = np.empty((0, 22), np.int32)
    plain = sample(logits.clone(), rows, [], nothing, ON_CPU)
    assert sample(logits.to(DEVICE, copy=True), rows, [], nothing, "triton").token_ids == plain.token_ids


@pytest.mark.parametrize("top", [2, 16])
def test_truncated_draws_are_those_of_torch_or_said_not_to_be(monkeypatch: pytest.MonkeyPatch, top: int) -> None:
    """Rows of flat and of steep logits, with ties and masks, under all ways to cut them."""
    monkeypatch.setattr(truncated, "TOP", top)
    g = torch.Generator().manual_seed(top)
    rows = 6
    logits = torch.randn(rows, VOCAB, generator=g) * torch.linspace(0.5, 6, rows)[:, None]
    logits[2:4] = (logits[2:4] * 2).round() / 2
    params = [
        SamplingParams(
            max_tokens=1,
            seed=0,
            temperature=0.5 + i / 10,
            top_p=(0.1, 0.5, 0.9, 1.0)[i % 4],
            top_k=(0, 3, 50, 0, 1)[i % 5],
            min_p=(0.0, 0.05)[i % 2],
        )
        for i in range(rows)
    ]
    words = masks(list(range(1, VOCAB, 3)), list(range(VOCAB)))
    mask_rows = torch.tensor([-1, 0, 1] * (rows // 3), dtype=torch.int32)
    allowed = torch.ones(rows, VOCAB, dtype=torch.bool)
    allowed[1::3] = (torch.arange(VOCAB) % 3 == 1)[None]
    uniform = torch.rand(rows, generator=g, dtype=torch.float64)
    temperature = torch.tensor([p.temperature for p in params])
    scaled = logits.masked_fill(~allowed, float("-inf"))
    scaled = (scaled - scaled.amax(dim=1, keepdim=True)) / temperature[:, None]
    expected = Truncated.of(scaled, uniform, params).draw_among_all()
    given = [t.to(DEVICE) for t in (logits, temperature, uniform.float(), mask_rows, words)]
    picked = sampling.pick(*given)
    numbers = torch.tensor(
        [[float(u), p.top_p, p.min_p, p.top_k or VOCAB] for u, p in zip(uniform, params, strict=True)]
    )
    numbers = torch.stack((uniform, *numbers.double().t()[1:]))
    right = truncated.pick(
        given[0], given[1], *given[3:], torch.arange(rows, device=DEVICE), numbers.to(DEVICE), picked
    ).cpu()
    assert torch.equal(picked.tokens.cpu()[right], expected[right])
    assert int(right.sum()) >= {2: 1, 16: 5}[top]
    assert not right.all() or top == 16
