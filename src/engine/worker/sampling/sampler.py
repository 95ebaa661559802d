"""Logits to token ids, for the whole batch at once.

Order, as in vLLM: penalties, bias, minimum length, grammar mask, temperature, top-k, top-p, min-p, one draw.

A draw inverts the cumulative distribution at a uniform number that a counter-based generator (Philox4x32-10, Salmon
et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") makes from the request's seed and the token's position:
it depends on nothing else, so neighbours in the batch cannot change an answer.

Shapes: R rows to sample, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gptoss.engine.messages import TokenLogprobs
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.sampling.penalties import apply_bias, apply_min_tokens, apply_penalties
from gptoss.engine.worker.sampling.philox import philox_uniform
from gptoss.engine.worker.sampling.sampling_row import SamplingRow
from gptoss.engine.worker.sampling.truncation import Truncated, invert, is_truncated
from gptoss.kernels.backend import SamplingKernels
from gptoss.kernels.cpu import native
from gptoss.kernels.device_copy import PendingReadback, to_device, to_device_together

LOGPROB_FLOOR = -9999.0


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
    kernels: SamplingKernels,
    sampled: Callable[[torch.Tensor], None] | None = None,
) -> SamplerOutput:
    """Samples a token for each row of the logits, float32 [R, V], which are changed in place.

    `bitmask` int32 [len(mask_rows), ceil(V / 32)] holds a set bit for each allowed token of row mask_rows[i]. `sampled`
    gets the tokens, int64 [R], before the device is waited for; work that it queues on the device is not waited for. It
    is called again where some tokens turn out wrong: rows for which the likeliest tokens did not suffice.
    """
    params = [row.params for row in rows]
    raw = _raw_logprobs(logits, params)
    apply_penalties(logits, rows)
    apply_bias(logits, rows)
    apply_min_tokens(logits, rows, mask_rows, bitmask)
    unresolved = None
    if kernels == "triton":
        token_ids, peak, unresolved = _pick_on_gpu(logits, rows, mask_rows, bitmask)
    elif kernels == "native":
        token_ids, peak = _pick_natively(logits, rows, mask_rows, bitmask)
    else:
        token_ids, peak = _pick(logits, rows, mask_rows, bitmask)
    right = [] if unresolved is None else [unresolved.right]
    reading = PendingReadback([token_ids, peak, *right, *_chosen_and_best(raw, params, token_ids)])
    if sampled is not None:
        sampled(token_ids)
    chosen, peaks, *numbers = reading.values()
    if unresolved is not None and unresolved.redraw(token_ids, numbers.pop(0)):
        reading = PendingReadback([token_ids, *_chosen_and_best(raw, params, token_ids)])
        if sampled is not None:
            sampled(token_ids)
        chosen, *numbers = reading.values()
    finite = [math.isfinite(value) for value in peaks]
    return SamplerOutput(chosen, _collect_logprobs(list(raw), numbers, len(rows)), finite)


def _is_greedy(p: SamplingParams) -> bool:
    return p.temperature == 0 or p.top_k == 1 or p.top_p == 0


def _pick(
    logits: torch.Tensor, rows: list[SamplingRow], mask_rows: list[int], bitmask: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the token ids, int64 [R], and the largest allowed logit of each row."""
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
    """Does what _pick does, by a native kernel."""
    params = [row.params for row in rows]
    mask_of = [-1] * len(rows)
    for index, row in enumerate(mask_rows):
        mask_of[row] = index
    integers = [
        mask_of,
        [p.seed for p in params],
        [len(row.prompt_ids) + len(row.output_ids) for row in rows],
        [p.top_k for p in params],
    ]
    reals = [
        [0.0 if _is_greedy(p) else p.temperature for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
    ]
    return native.pick(logits.contiguous(), bitmask, integers, reals)


def _pick_on_gpu(
    logits: torch.Tensor, rows: list[SamplingRow], mask_rows: list[int], bitmask: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, UnresolvedRows | None]:
    """Does what _pick does without waiting for the device.

    It takes two kernels, and two more for truncated rows.
    """
    from gptoss.kernels.triton import sampling, truncated

    device = logits.device
    params = [row.params for row in rows]
    cut = [i for i, p in enumerate(params) if is_truncated(p) and not _is_greedy(p)]
    mask_of = np.full(len(rows), -1, np.int32)
    mask_of[mask_rows] = np.arange(len(mask_rows))
    masks = np.ascontiguousarray(bitmask) if len(mask_rows) else np.zeros((1, -(-logits.shape[1] // 32)), np.int32)
    temperature = np.array([0.0 if _is_greedy(p) else p.temperature for p in params], np.float32)
    uniform = _uniform(rows)
    numbers = [temperature, uniform.numpy().astype(np.float32), mask_of, masks]
    temperatures, uniforms, mask_index, words = to_device_together(numbers, device)
    allowed = mask_index, words
    picked = sampling.pick(logits, temperatures, uniforms, *allowed)
    if not cut:
        return picked.tokens, picked.best, None
    index = to_device(cut, torch.int64, device)
    limits = [[float(uniform[i]), params[i].top_p, params[i].min_p, params[i].top_k or logits.shape[1]] for i in cut]
    given = to_device(np.array(limits).T.copy(), torch.float64, device)
    right = truncated.pick(logits, temperatures, *allowed, index, given, picked)
    # the next step may write its logits where these are
    chosen = [params[i] for i in cut]
    unresolved = UnresolvedRows(cut, logits[index], mask_of[cut], words, uniform[cut], chosen, right)
    return picked.tokens, picked.best, unresolved


def _masked(logits: torch.Tensor, mask_of: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """The logits [R, V] with -inf for the tokens that are not allowed.

    `mask_of`: each row's row of `words` int32 [.., ceil(V / 32)], whose bits are the allowed tokens, or -1.
    """
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (words[mask_of.clamp(min=0)].unsqueeze(-1) >> bits) & 1
    forbidden = (allowed.flatten(1)[:, : logits.shape[1]] == 0) & (mask_of >= 0).unsqueeze(1)
    return logits.masked_fill_(forbidden, float("-inf"))


@dataclass(frozen=True, slots=True)
class UnresolvedRows:
    """Rows whose token may have to be drawn again."""

    rows: list[int]
    logits: torch.Tensor  # float32 [len(rows), V]
    mask_of: np.ndarray  # int32 [len(rows)], the row of `words` that says what is allowed, or -1
    words: torch.Tensor
    uniform: torch.Tensor  # float64 [len(rows)]
    params: list[SamplingParams]
    right: torch.Tensor  # bool [len(rows)]: whether the token is final

    def redraw(self, token_ids: torch.Tensor, right: list[bool]) -> bool:
        """Draws the rows that are not final again; returns whether `token_ids` changed."""
        wrong = [place for place, stands in enumerate(right) if not stands]
        if not wrong:
            return False
        device, params = token_ids.device, [self.params[place] for place in wrong]
        scaled = _masked(
            self.logits[torch.tensor(wrong, device=device)],
            to_device(self.mask_of[wrong], torch.int64, device),
            self.words,
        )
        _scale(scaled, params)
        uniform = to_device(self.uniform[wrong], torch.float64, device)
        at = torch.tensor([self.rows[place] for place in wrong], device=device)
        token_ids[at] = Truncated.of(scaled, uniform, params).draw_among_all()
        return True


def _uniform(rows: list[SamplingRow]) -> torch.Tensor:
    """One number for each request's seed and the position it has reached: float64 [R] on the CPU."""
    seeds = [row.params.seed for row in rows]
    positions = [len(row.prompt_ids) + len(row.output_ids) for row in rows]
    return torch.from_numpy(philox_uniform(np.array(seeds, np.int64), np.array(positions, np.int64)))


def apply_bitmask(logits: torch.Tensor, mask_rows: list[int], bitmask: np.ndarray) -> None:
    """Sets the logits of disallowed tokens to -inf.

    Words that allow all their 32 tokens cost nothing: in free text only the few words with special tokens or stray
    bytes are touched.
    """
    for row, words in zip(mask_rows, bitmask, strict=True):
        banned = _banned(words.tobytes(), logits.shape[1])
        if banned.numel():
            logits[row].index_fill_(0, banned.to(logits.device), float("-inf"))


@functools.lru_cache(maxsize=128)  # free text has one mask, and JSON meets the same ones again and again
def _banned(mask: bytes, vocab: int) -> torch.Tensor:
    words = np.frombuffer(mask, np.int32)
    restricted = np.flatnonzero(words != -1)
    bits = np.unpackbits(words[restricted].view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    word, bit = np.nonzero(bits == 0)
    banned = restricted[word] * 32 + bit
    return torch.from_numpy(banned[banned < vocab])


def _argmax(logits: torch.Tensor, rows: list[SamplingRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the best tokens, int64 [R], and their logits; NaN wins, so a row with one shows."""
    token_ids = logits.argmax(dim=-1)
    return token_ids, logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)


def _draw(logits: torch.Tensor, rows: list[SamplingRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws tokens, int64 [R], and returns them with each row's largest logit.

    Changes `logits` in place.
    """
    params = [row.params for row in rows]
    peak = _scale(logits, params)
    uniform = _uniform(rows).to(logits.device)
    truncated = [is_truncated(p) for p in params]
    if not any(truncated):
        return invert(logits.exp_(), uniform), peak
    out = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    cut = torch.tensor([i for i, t in enumerate(truncated) if t], device=logits.device)
    plain = torch.tensor([i for i, t in enumerate(truncated) if not t], dtype=torch.int64)
    chosen = [p for p, t in zip(params, truncated, strict=True) if t]
    out[cut] = Truncated.of(logits[cut], uniform[cut], chosen).draw()
    if plain.numel():
        plain = plain.to(logits.device)
        out[plain] = invert(logits[plain].exp_(), uniform[plain])
    return out, peak


def _scale(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Brings the largest of each row to 0 and divides by temperature, in place. -> what it was, [R]."""
    peak = logits.amax(dim=-1)
    temperature = to_device([[p.temperature] for p in params], torch.float32, logits.device)
    logits.sub_(peak.unsqueeze(1)).div_(temperature)
    return peak


def _raw_logprobs(logits: torch.Tensor, params: list[SamplingParams]) -> dict[int, torch.Tensor]:
    wanted = [i for i, p in enumerate(params) if p.logprobs is not None]
    return {i: torch.log_softmax(logits[i], dim=-1) for i in wanted}


def _chosen_and_best(
    raw: dict[int, torch.Tensor], params: list[SamplingParams], token_ids: torch.Tensor
) -> list[torch.Tensor]:
    """Three tensors for each row in `raw`: its token's logprob [1], its largest logprobs, their ids."""
    found: list[torch.Tensor] = []
    for i, logprobs in raw.items():
        best = torch.topk(logprobs, params[i].logprobs or 0)
        found += [logprobs.gather(0, token_ids[i : i + 1]), best.values, best.indices]
    return found


def _collect_logprobs(rows: list[int], numbers: list[Any], count: int) -> list[TokenLogprobs | None]:
    """The logprobs of `rows` from `numbers`, which _chosen_and_best found for each."""
    out: list[TokenLogprobs | None] = [None] * count
    for i, (chosen,), values, ids in zip(rows, numbers[::3], numbers[1::3], numbers[2::3], strict=True):
        out[i] = floored(chosen, values, ids)
    return out


def floored(chosen: float, values: list[float], ids: list[int]) -> TokenLogprobs:
    """A token's logprob and the largest at its position, none of them -inf. NaN is kept."""
    alternatives = [(t, max(v, LOGPROB_FLOOR)) for t, v in zip(ids, values, strict=True)]
    return TokenLogprobs(max(chosen, LOGPROB_FLOOR), alternatives)
