"""Logits to token ids, for the whole batch at once.

Order, as in vLLM: penalties, bias, minimum length, grammar mask, temperature, top-k, top-p, min-p, one draw.

A draw inverts the cumulative distribution at a uniform number that a counter-based generator (Philox4x32-10, Salmon
et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") makes from the request's seed and the token's position:
it depends on nothing else, so neighbours in the batch cannot change an answer.

Shapes: R rows to sample, V vocabulary, C candidates that survive truncation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from src.engine.messages import TokenLogprobs
from src.engine.sampling_params import SamplingParams
from src.engine.worker.transfers import Reading, to_device
from src.kernels import native
from src.kernels.gpu import support

NUM_CANDIDATES = (
    1024  # tried first for top-k, top-p and min-p; a row that needs more falls back to the whole V
)
INVERT_BLOCK = 128
LOGPROB_FLOOR = -9999.0


@dataclass(frozen=True, slots=True)
class SamplingRow:
    params: SamplingParams
    prompt_ids: np.ndarray
    output_ids: np.ndarray


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    finite: list[bool]  # false: the row's logits hold a NaN, or nothing that may be sampled


def sample(
    logits: torch.Tensor,
    rows: list[SamplingRow],
    mask_rows: list[int],
    bitmask: np.ndarray,
    sampled: Callable[[torch.Tensor], None] | None = None,
) -> SamplerOutput:
    """logits float32 [R, V], changed in place. `bitmask` int32 [len(mask_rows), ceil(V / 32)] holds a set bit for
    each allowed token of row mask_rows[i]. `sampled` gets the tokens, int64 [R], before the device is waited for; what
    it gives the device to do is not waited for."""
    params = [row.params for row in rows]
    raw = _raw_logprobs(logits, params)
    _apply_penalties(logits, rows)
    _apply_bias(logits, params)
    _apply_min_tokens(logits, rows)
    if support.samples(logits):
        token_ids, peak = _pick_on_gpu(logits, rows, mask_rows, bitmask)
    elif logits.is_cpu and native.library() is not None:
        token_ids, peak = _pick_natively(logits, rows, mask_rows, bitmask)
    else:
        token_ids, peak = _pick(logits, rows, mask_rows, bitmask)
    reading = Reading([token_ids, peak, *_chosen_and_best(raw, params, token_ids)])
    if sampled is not None:
        sampled(token_ids)
    chosen, peaks, *numbers = reading.values()
    finite = [math.isfinite(value) for value in peaks]
    return SamplerOutput(chosen, _collect_logprobs(list(raw), numbers, len(rows)), finite)


def _is_greedy(p: SamplingParams) -> bool:
    return p.temperature == 0 or p.top_k == 1 or p.top_p == 0


def _is_truncated(p: SamplingParams) -> bool:
    return p.top_k > 0 or p.top_p < 1 or p.min_p > 0


def _pick(
    logits: torch.Tensor, rows: list[SamplingRow], mask_rows: list[int], bitmask: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (token ids int64 [R], the largest allowed logit of each row)."""
    apply_bitmask(logits, mask_rows, bitmask)
    greedy = [_is_greedy(row.params) for row in rows]
    token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    peak = torch.empty(len(rows), dtype=logits.dtype, device=logits.device)
    for wanted, pick in ((True, _argmax), (False, _draw)):
        chosen_rows = [i for i, g in enumerate(greedy) if g is wanted]
        if len(chosen_rows) == len(rows):
            token_ids, peak = pick(logits, rows)
        elif chosen_rows:
            index = torch.tensor(chosen_rows, device=logits.device)
            token_ids[index], peak[index] = pick(logits[index], [rows[i] for i in chosen_rows])
    return token_ids, peak


def _pick_natively(
    logits: torch.Tensor, rows: list[SamplingRow], mask_rows: list[int], bitmask: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """As _pick, by a kernel."""
    params = [row.params for row in rows]
    mask_of = [-1] * len(rows)
    for place, number in enumerate(mask_rows):
        mask_of[number] = place
    whole = [
        mask_of,
        [p.seed for p in params],
        [len(row.prompt_ids) + len(row.output_ids) for row in rows],
        [p.top_k for p in params],
    ]
    real = [
        [0.0 if _is_greedy(p) else p.temperature for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
    ]
    return native.pick(logits.contiguous(), bitmask, whole, real)


def _pick_on_gpu(
    logits: torch.Tensor, rows: list[SamplingRow], mask_rows: list[int], bitmask: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """As _pick. Rows that are cut by top-k, top-p or min-p are drawn by torch, all others by two kernels."""
    from src.kernels.gpu import sampling

    device = logits.device
    params = [row.params for row in rows]
    cut = [i for i, p in enumerate(params) if _is_truncated(p) and not _is_greedy(p)]
    mask_of = np.full(len(rows), -1, np.int32)
    mask_of[mask_rows] = np.arange(len(mask_rows))
    words = bitmask if len(mask_rows) else np.zeros((1, -(-logits.shape[1] // 32)), np.int32)
    temperature = [0.0 if _is_greedy(p) else p.temperature for p in params]
    token_ids, peak = sampling.pick(
        logits,
        to_device(temperature, torch.float32, device),
        to_device(_uniform(rows), torch.float32, device),
        to_device(mask_of, torch.int32, device),
        to_device(words, torch.int32, device),
    )
    if cut:
        masked = [(i, int(mask_of[i])) for i in cut if mask_of[i] >= 0]
        apply_bitmask(logits, [i for i, _ in masked], bitmask[[m for _, m in masked]])
        index = to_device(cut, torch.int64, device)
        token_ids[index], peak[index] = _draw(logits[index], [rows[i] for i in cut])
    return token_ids, peak


def _uniform(rows: list[SamplingRow]) -> torch.Tensor:
    """float64 [R], on the CPU: one number for each request's seed and the position that it has reached."""
    seeds = [row.params.seed for row in rows]
    positions = [len(row.prompt_ids) + len(row.output_ids) for row in rows]
    return torch.from_numpy(
        philox_uniform(np.array(seeds, np.int64), np.array(positions, np.int64))
    )


def apply_bitmask(logits: torch.Tensor, mask_rows: list[int], bitmask: np.ndarray) -> None:
    """Sets the logits of disallowed tokens to -inf. Words that allow all their 32 tokens cost nothing: in free text
    only the few words with special tokens or stray bytes are touched."""
    for row, words in zip(mask_rows, bitmask, strict=True):
        banned = _banned(words.tobytes(), logits.shape[1])
        if banned.numel():
            logits[row].index_fill_(0, banned.to(logits.device), float("-inf"))


@functools.lru_cache(
    maxsize=128
)  # free text has one mask, and JSON meets the same ones again and again
def _banned(mask: bytes, vocab: int) -> torch.Tensor:
    words = np.frombuffer(mask, np.int32)
    restricted = np.flatnonzero(words != -1)
    bits = np.unpackbits(words[restricted].view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    word, bit = np.nonzero(bits == 0)
    banned = restricted[word] * 32 + bit
    return torch.from_numpy(banned[banned < vocab])


def philox_uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """int64 [R] seeds, int64 [R] positions -> float64 [R] in [0, 1), 53 random bits each."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    seeds, positions = seeds.view(np.uint64), positions.view(np.uint64)
    zero = np.zeros_like(positions)
    c0, c1, c2, c3 = positions & low, positions >> half, zero, zero
    k0, k1 = seeds & low, seeds >> half
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & low, (p0 >> half) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    bits = (c0 << np.uint64(21)) | (c1 >> np.uint64(11))
    return bits.astype(np.float64) / (1 << 53)


def _argmax(logits: torch.Tensor, rows: list[SamplingRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (int64 [R], their logits; NaN wins, so a row with one shows)."""
    token_ids = logits.argmax(dim=-1)
    return token_ids, logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)


def _draw(logits: torch.Tensor, rows: list[SamplingRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (int64 [R], the largest logit of each row). Changes `logits` in place."""
    peak = logits.amax(dim=-1)
    device = logits.device

    def column(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    params = [row.params for row in rows]
    uniform = _uniform(rows).to(device)
    temperature = column([p.temperature for p in params], torch.float32).unsqueeze(1)
    logits.sub_(peak.unsqueeze(1)).div_(temperature)
    truncated = [_is_truncated(p) for p in params]
    if not any(truncated):
        return _invert(logits.exp_(), uniform), peak
    out = torch.empty(len(rows), dtype=torch.int64, device=device)
    plain = column([i for i, t in enumerate(truncated) if not t], torch.int64)
    cut = column([i for i, t in enumerate(truncated) if t], torch.int64)
    chosen = [p for p, t in zip(params, truncated, strict=True) if t]
    out[cut] = _draw_truncated(
        logits[cut],
        uniform[cut],
        column([p.top_k or logits.shape[1] for p in chosen], torch.int64),
        column([p.top_p for p in chosen], torch.float64),
        column([p.min_p for p in chosen], torch.float32),
    )
    if plain.numel():
        out[plain] = _invert(logits[plain].exp_(), uniform[plain])
    return out, peak


def _draw_truncated(
    scaled: torch.Tensor,
    uniform: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    out = torch.empty(scaled.shape[0], dtype=torch.int64, device=scaled.device)
    left = torch.arange(scaled.shape[0], device=scaled.device)
    for width in (min(NUM_CANDIDATES, scaled.shape[1]), scaled.shape[1]):
        probs, ids = _candidates(scaled[left], width)
        ahead = probs.cumsum(dim=-1) - probs  # mass of the likelier tokens
        rank = torch.arange(width, device=scaled.device)
        k = top_k[left].unsqueeze(1)
        # top-p acts on what top-k left, renormalised; min-p is relative to the likeliest token
        kept_mass = torch.where(rank < k, probs, 0).sum(dim=-1, keepdim=True)
        p = top_p[left].unsqueeze(1)
        limit = p * torch.where(k <= width, kept_mass, 1.0)
        keep = (
            (rank < k)
            & ((ahead < limit) | (p >= 1))
            & (probs >= min_p[left].unsqueeze(1) * probs[:, :1])
        )
        keep[:, 0] = True
        done = (~keep[:, -1]) | (rank[-1] + 1 >= k.squeeze(1))
        # what top-k leaves is not all among the candidates: its mass is not known yet
        done &= ~((k > width) & (k < scaled.shape[1]) & (p < 1)).squeeze(1)
        done |= width == scaled.shape[1]
        picked = _invert(torch.where(keep, probs, 0), uniform[left])
        token = ids.gather(1, picked.unsqueeze(1)).squeeze(1)
        out[left[done]] = token[done]
        left = left[~done]
        if left.numel() == 0:
            break
    return out


def _candidates(scaled: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (probabilities float64 [R, width] in falling order, ids). Equal logits keep the order of their ids."""
    log_z = torch.logsumexp(scaled, dim=-1, keepdim=True)
    if width < scaled.shape[1]:
        values, ids = torch.topk(scaled, width, dim=-1)
        by_id = ids.argsort(dim=-1)
        values, ids = values.gather(1, by_id), ids.gather(1, by_id)
        order = values.argsort(dim=-1, descending=True, stable=True)
        values, ids = values.gather(1, order), ids.gather(1, order)
    else:
        values, ids = torch.sort(scaled, dim=-1, descending=True, stable=True)
    return (values - log_z).double().exp(), ids


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """weights [R, C] >= 0, not necessarily summing to 1, uniform [R] -> index [R] drawn in proportion.

    Two levels: first the block of INVERT_BLOCK candidates, then the candidate in it, so that the running sum is short.
    """
    num_rows, width = weights.shape
    if width % INVERT_BLOCK:
        weights = torch.nn.functional.pad(weights, (0, INVERT_BLOCK - width % INVERT_BLOCK))
    blocks = weights.view(num_rows, -1, INVERT_BLOCK)
    block, rest = _step(blocks.sum(dim=-1, dtype=torch.float64), uniform.clone(), scale=True)
    inside = blocks[torch.arange(num_rows, device=weights.device), block].double()
    index, _ = _step(inside, rest, scale=False)
    return block * INVERT_BLOCK + index


def _step(
    weights: torch.Tensor, target: torch.Tensor, *, scale: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (index [R] whose share of the running sum holds the target, the target within that share)."""
    cumulative = weights.cumsum(dim=-1)
    if scale:
        target = target * cumulative[:, -1]
    index = torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)
    # rounding may put the target at the very end: stay on an index that has weight
    last = weights.shape[1] - 1 - (weights.flip(-1) > 0).int().argmax(dim=-1)
    index = torch.minimum(index, last)
    before = cumulative.gather(1, index.unsqueeze(1)).squeeze(1) - weights.gather(
        1, index.unsqueeze(1)
    ).squeeze(1)
    return index, target - before


def _apply_penalties(logits: torch.Tensor, rows: list[SamplingRow]) -> None:
    wanted = [i for i, row in enumerate(rows) if row.params.needs_penalties]
    if not wanted:
        return
    device, vocab = logits.device, logits.shape[1]
    counts = torch.stack([_bincount(rows[i].output_ids, vocab) for i in wanted]).to(device)
    in_prompt = torch.stack([_bincount(rows[i].prompt_ids, vocab) for i in wanted]).to(device) > 0

    def column(name: str) -> torch.Tensor:
        return torch.tensor(
            [[getattr(rows[i].params, name)] for i in wanted], dtype=torch.float32, device=device
        )

    index = torch.tensor(wanted, device=device)
    chosen = logits[index]
    repetition = torch.where(in_prompt | (counts > 0), column("repetition_penalty"), 1.0)
    chosen = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
    chosen -= column("frequency_penalty") * counts + column("presence_penalty") * (counts > 0)
    logits[index] = chosen


def _bincount(token_ids: np.ndarray, vocab: int) -> torch.Tensor:
    return torch.bincount(torch.from_numpy(token_ids), minlength=vocab)


def _apply_bias(logits: torch.Tensor, params: list[SamplingParams]) -> None:
    entries = [
        (row, token, bias) for row, p in enumerate(params) for token, bias in p.logit_bias.items()
    ]
    if entries:
        rows, tokens, biases = zip(*entries, strict=True)
        index = (
            torch.tensor(rows, device=logits.device),
            torch.tensor(tokens, device=logits.device),
        )
        logits.index_put_(index, torch.tensor(biases, device=logits.device), accumulate=True)


def _apply_min_tokens(logits: torch.Tensor, rows: list[SamplingRow]) -> None:
    entries = [
        (i, token)
        for i, row in enumerate(rows)
        if len(row.output_ids) < row.params.min_tokens and not row.params.ignore_eos
        for token in row.params.stop_token_ids
    ]
    if entries:
        index = torch.tensor(entries, device=logits.device)
        logits[index[:, 0], index[:, 1]] = float("-inf")


def _raw_logprobs(logits: torch.Tensor, params: list[SamplingParams]) -> dict[int, torch.Tensor]:
    wanted = [i for i, p in enumerate(params) if p.logprobs is not None]
    return {i: torch.log_softmax(logits[i], dim=-1) for i in wanted}


def _chosen_and_best(
    raw: dict[int, torch.Tensor], params: list[SamplingParams], token_ids: torch.Tensor
) -> list[torch.Tensor]:
    """Of each row in `raw` three: the logprob of its token [1], its largest logprobs and their ids."""
    found: list[torch.Tensor] = []
    for i, logprobs in raw.items():
        best = torch.topk(logprobs, params[i].logprobs or 0)
        found += [logprobs.gather(0, token_ids[i : i + 1]), best.values, best.indices]
    return found


def _collect_logprobs(
    rows: list[int], numbers: list[Any], count: int
) -> list[TokenLogprobs | None]:
    """`numbers`: what _chosen_and_best found for each of `rows`."""
    out: list[TokenLogprobs | None] = [None] * count
    for i, (chosen,), values, ids in zip(
        rows, numbers[::3], numbers[1::3], numbers[2::3], strict=True
    ):
        alternatives = [(t, max(v, LOGPROB_FLOOR)) for t, v in zip(ids, values, strict=True)]
        out[i] = TokenLogprobs(max(chosen, LOGPROB_FLOOR), alternatives)
    return out
