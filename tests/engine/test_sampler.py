"""The vectorised sampler against plain references, one row at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from gptoss.engine.sampling_params import LogitBias, SamplingParams
from gptoss.engine.worker.sampling import penalties
from gptoss.engine.worker.sampling.philox import philox_uniform
from gptoss.engine.worker.sampling.sampler import SamplerOutput, _pick, _pick_natively, apply_bitmask, sample
from gptoss.engine.worker.sampling.sampling_row import SamplingRow
from gptoss.kernels.backend import choose_sampling
from gptoss.kernels.cpu import native
from tests.support.helpers import sampling_row

V = 3000
ON_CPU = choose_sampling(torch.device("cpu"))


def row(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> SamplingRow:
    options = {"max_tokens": 10, "seed": 1} | params
    return sampling_row(SamplingParams(**options), np.array(prompt or [1], np.int64), np.array(output or [], np.int64))


def run(logits: torch.Tensor, rows: list[SamplingRow]) -> SamplerOutput:
    return sample(logits.clone(), rows, [], np.empty((0, -(-logits.shape[1] // 32)), np.int32), ON_CPU)


def logits_of(seed: int, rows: int = 1, vocab: int = V) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def distribution(logits: torch.Tensor, p: SamplingParams) -> np.ndarray:
    """What the parameters mean, written the slow way in float64."""
    probs = np.exp(logits.double().numpy() / p.temperature)
    probs /= probs.sum()
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    if p.top_k:
        order = order[: p.top_k]
    total, kept, mass = sum(probs[i] for i in order), [], 0.0
    for i in order:
        if kept and p.top_p < 1 and mass >= p.top_p * total:
            break
        kept.append(i)
        mass += probs[i]
    kept = [i for i in kept if probs[i] >= p.min_p * probs[order[0]]] or [order[0]]
    out = np.zeros(len(probs))
    out[kept] = probs[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 50, "top_p": 0.8, "min_p": 0.05},
        {"top_p": 0.999, "temperature": 2.0},
        {"top_k": 2000, "temperature": 2.0},
    ],
)
def test_samples_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square over 4,000 seeds, tokens pooled so that every cell expects at least 10."""
    n, logits = 4000, logits_of(3)
    counts = np.zeros(V)
    for start in range(0, n, 500):
        rows = [row(seed=start + i, **params) for i in range(500)]
        counts += np.bincount(run(logits.expand(500, -1), rows).token_ids, minlength=V)
    wanted = distribution(logits[0], row(**params).params) * n
    assert counts[wanted == 0].sum() == 0
    cells, observed, expected = [], 0.0, 0.0
    for i in np.argsort(-wanted):
        observed, expected = observed + counts[i], expected + wanted[i]
        if expected >= 10:
            cells.append((observed, expected))
            observed = expected = 0.0
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    dof = max(1, len(cells) - 1)
    assert statistic < dof + 5 * math.sqrt(2 * dof) + 10, (statistic, dof)


def test_every_combination_stays_inside_its_support() -> None:
    rng = np.random.default_rng(0)
    logits = logits_of(5, 64)
    rows = [
        row(
            seed=i,
            temperature=float(rng.choice([0.3, 1.0, 1.9])),
            top_k=int(rng.choice([0, 1, 5, 1500])),
            top_p=float(rng.choice([0.1, 0.9, 1.0])),
            min_p=float(rng.choice([0.0, 0.3])),
        )
        for i in range(64)
    ]
    for i, token in enumerate(run(logits, rows).token_ids):
        assert distribution(logits[i], rows[i].params)[token] > 0


def test_neighbours_do_not_matter() -> None:
    logits = logits_of(7, 32)
    rows = [row(seed=i, temperature=i % 3 / 2, top_k=i % 5, top_p=1 - i % 2 / 10) for i in range(32)]
    together = run(logits, rows).token_ids
    alone = [run(logits[i : i + 1], [rows[i]]).token_ids[0] for i in range(32)]
    assert together == alone


def test_greedy_takes_the_largest_and_top_p_zero_and_top_k_one_too() -> None:
    logits = logits_of(1, 3)
    rows = [row(temperature=0.0), row(top_p=0.0), row(top_k=1)]
    assert run(logits, rows).token_ids == logits.argmax(-1).tolist()


def test_the_draw_depends_on_seed_and_position_alone() -> None:
    logits = logits_of(2, 1) / 4
    first = run(logits, [row(seed=5)]).token_ids
    assert run(logits, [row(seed=5)]).token_ids == first
    assert run(logits, [row(prompt=[3], seed=5)]).token_ids == first
    others = {run(logits, [row(seed=s)]).token_ids[0] for s in range(20)}
    assert len(others) > 10
    positions = {run(logits, [row(seed=5, output=[1] * n)]).token_ids[0] for n in range(20)}
    assert len(positions) > 10


def test_philox_gives_the_published_numbers() -> None:
    """Known answers of Random123 1.14 (kat_vectors, philox4x32 10): the first two words make our 53 bits."""
    for counter, key, words in (((0, 0), 0, (0x6627E8D5, 0xE169C58D)),):
        seeds, positions = np.array([key]), np.array([counter[0] | counter[1] << 32])
        bits = ((words[0] << 21) | (words[1] >> 11)) & ((1 << 53) - 1)
        assert philox_uniform(seeds, positions).item() == bits / (1 << 53)


def test_uniform_numbers_are_uniform_and_differ_for_negative_seeds() -> None:
    u = torch.from_numpy(philox_uniform(np.arange(-5000, 5000), np.zeros(10_000, np.int64)))
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 0.01
    assert len(set(u.tolist())) == 10_000


def test_penalties_follow_their_formulas() -> None:
    logits = logits_of(4)
    params = {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.3}
    prompt, output = [10, 11], [11, 12, 12]
    wanted = logits[0].clone()
    for token in {*prompt, *output}:
        wanted[token] = wanted[token] / 1.3 if wanted[token] > 0 else wanted[token] * 1.3
    for token in set(output):
        wanted[token] -= 0.5 + 0.25 * output.count(token)
    for candidate in range(V):  # lift one token after the other to the top: the argmax tells its penalised logit
        if candidate not in (10, 11, 12, 13):
            continue
        lifted = logits.clone()
        lifted[0, candidate] = 30.0
        value = 30.0 / (1.3 if candidate in prompt + output else 1)
        value -= (0.5 + 0.25 * output.count(candidate)) if candidate in output else 0
        rival = torch.full((1, V), value - 0.01)
        rival[0, candidate] = 30.0
        assert run(rival, [row(prompt, output, **params)]).token_ids == [candidate]
        rival[0] = value + 0.01
        rival[0, candidate] = 30.0
        assert run(rival, [row(prompt, output, **params)]).token_ids != [candidate]


def test_bias_bans_and_forces() -> None:
    logits = logits_of(6)
    best = int(logits.argmax())
    assert run(logits, [row(temperature=0.0, logit_bias=LogitBias.of({best: -100.0}))]).token_ids != [best]
    assert run(logits, [row(temperature=0.0, logit_bias=LogitBias.of({77: 100.0}))]).token_ids == [77]


def test_bias_of_one_row_is_not_its_neighbours() -> None:
    logits = logits_of(4, rows=3)
    best = logits.argmax(dim=-1).tolist()
    all_but = {token: -100.0 for token in range(V) if token != 5}
    biases = [{}, all_but, {7: 60.0, 9: 70.0}]
    rows = [row(temperature=0.0, logit_bias=LogitBias.of(bias), logprobs=0) for bias in biases]
    out = run(logits, rows)
    assert out.token_ids == [best[0], 5, 9]
    plain = run(logits, [row(temperature=0.0, logprobs=0)] * 3)
    assert plain.token_ids == best


def test_a_bias_of_many_tokens_is_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    bias = LogitBias.of({token: (token % 401 - 200) / 7 for token in range(0, V, 2)})
    other = LogitBias.of({5: 3.5, V - 1: -2.0})
    rows = [row(logit_bias=one) for one in (bias, None, bias, other)]
    few, many = logits_of(4, rows=4), logits_of(4, rows=4)
    penalties.apply_bias(few, rows)
    monkeypatch.setattr(penalties, "FEW_BIASED", 2)
    penalties.apply_bias(many, rows)
    assert torch.equal(few, many) and not torch.equal(few, logits_of(4, rows=4))


def test_min_tokens_forbids_stopping_early() -> None:
    logits = torch.zeros(1, V)
    logits[0, 9] = 50
    options = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (9,)}
    assert run(logits, [row(output=[1], **options)]).token_ids != [9]
    assert run(logits, [row(output=[1, 1], **options)]).token_ids == [9]


@pytest.mark.parametrize("stops", [(9,), (31, 9), (9, 2999)])
def test_min_tokens_forbids_no_end_that_the_grammar_demands(stops: tuple[int, ...]) -> None:
    logits = logits_of(3, rows=3)
    logits[:, 9] = 50
    allowed = np.zeros((2, -(-V // 32)), np.int32)
    allowed[:, 0] = 1 << 9
    allowed[1, 5] = 1 << 7
    rows = [row(temperature=0.0, min_tokens=2, stop_token_ids=stops) for _ in range(3)]
    out = sample(logits.clone(), rows, [0, 2], allowed, ON_CPU)
    assert (out.token_ids[0], out.token_ids[2]) == (9, 5 * 32 + 7)
    assert out.token_ids[1] not in stops and all(out.finite)


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = logits_of(8)
    out = run(logits, [row(temperature=0.0, logit_bias=LogitBias.of({5: 100.0}), logprobs=3)])
    raw = torch.log_softmax(logits[0], -1)
    numbers = out.logprobs[0]
    assert out.token_ids == [5] and numbers is not None
    assert numbers.logprob == pytest.approx(float(raw[5]))
    assert [t for t, _ in numbers.alternatives] == raw.topk(3).indices.tolist()
    assert run(logits, [row(logprobs=0)]).logprobs[0].alternatives == []  # type: ignore[union-attr]
    assert run(logits, [row()]).logprobs == [None]


@pytest.mark.parametrize("allowed", [[3], [0, 31, 32, 2999], list(range(0, V, 2)), list(range(V))])
def test_the_bitmask_leaves_exactly_the_allowed_tokens(allowed: list[int]) -> None:
    bits = np.zeros(-(-V // 32) * 32, np.uint8)
    bits[allowed] = 1
    mask = np.packbits(bits, bitorder="little").view(np.int32)[None]
    logits = logits_of(9, 2)
    before = logits.clone()
    apply_bitmask(logits, [1], mask)
    assert torch.isfinite(logits[1]).nonzero().flatten().tolist() == allowed
    assert torch.equal(logits[0], before[0])


def test_bad_rows_are_told_apart() -> None:
    logits = logits_of(10, 3)
    logits[1, 5] = torch.nan
    logits[2] = -torch.inf
    assert run(logits, [row(temperature=0.0)] * 3).finite == [True, False, False]


@pytest.mark.skipif(native.library() is None, reason="the CPU kernels do not run here")
@pytest.mark.parametrize("vocab", [3000, 1024, 77])
def test_the_kernel_picks_what_torch_picks(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    n = 600
    logits = logits_of(11, n, vocab)
    logits[::7, 5] = logits[::7].amax(dim=1)  # ties
    rows = [
        row(
            list(range(i % 9 + 1)),
            seed=int(rng.integers(-(2**62), 2**62)),
            temperature=float(rng.choice([0.0, 1e-4, 0.3, 1.0, 1.9])),
            top_k=int(rng.choice([0, 0, 1, 5, 1500, 10**6])),
            top_p=float(rng.choice([0.0, 0.1, 0.9, 1.0, 1.0])),
            min_p=float(rng.choice([0.0, 0.0, 0.3])),
        )
        for i in range(n)
    ]
    mask_rows = list(range(0, n, 3))
    masks = rng.integers(-(2**31), 2**31, (len(mask_rows), -(-vocab // 32)), np.int64).astype(np.int32)
    masks[::2] |= np.int32(-1) - 1
    wanted = _pick(logits.clone(), rows, mask_rows, masks)
    found = _pick_natively(logits.clone(), rows, mask_rows, masks)
    assert found[0].tolist() == wanted[0].tolist()
    assert torch.equal(found[1], wanted[1])


@pytest.mark.skipif(native.library() is None, reason="the CPU kernels do not run here")
def test_the_kernel_sees_what_cannot_be_sampled() -> None:
    logits = logits_of(1, 5, 100)
    logits[0, 37] = torch.nan
    logits[1, 99] = torch.nan
    logits[2, 3] = torch.inf
    rows = [row(temperature=float(i % 2)) for i in range(5)]
    nothing = np.zeros((1, 4), np.int32)
    _, peaks = _pick_natively(logits, rows, [3], nothing)
    assert torch.isfinite(peaks).tolist() == [False, False, False, False, True]
