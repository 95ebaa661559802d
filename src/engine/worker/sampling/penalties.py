"""Penalties, biases and minimum lengths, on the logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gptoss.engine.sampling_params import LogitBias
from gptoss.engine.worker.sampling.sampling_row import SamplingRow
from gptoss.kernels.device_copy import to_device

FEW_BIASED = 4096  # tokens of one request


def apply_penalties(logits: torch.Tensor, rows: list[SamplingRow]) -> None:
    wanted = [i for i, row in enumerate(rows) if row.params.needs_penalties]
    if not wanted:
        return
    device, vocab = logits.device, logits.shape[1]
    counts = _counts([rows[i].output_ids for i in wanted], vocab, device)
    in_prompt = _counts([rows[i].prompt_ids for i in wanted], vocab, device) > 0

    def column(name: str) -> torch.Tensor:
        values = [[getattr(rows[i].params, name)] for i in wanted]
        return to_device(values, torch.float32, device)

    index = to_device(wanted, torch.int64, device)
    chosen = logits[index]
    repetition = torch.where(in_prompt | (counts > 0), column("repetition_penalty"), 1.0)
    chosen = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
    chosen -= column("frequency_penalty") * counts + column("presence_penalty") * (counts > 0)
    logits[index] = chosen


def _counts(token_ids: list[np.ndarray], vocab: int, device: torch.device) -> torch.Tensor:
    """float32 [len(token_ids), V]: how often each token occurs."""
    places = np.concatenate([ids + vocab * row for row, ids in enumerate(token_ids)])
    flat = torch.zeros(len(token_ids) * vocab, device=device)
    ones = torch.ones(1, device=device).expand(len(places))
    flat.scatter_add_(0, to_device(places, torch.int64, device), ones)
    return flat.view(len(token_ids), vocab)


def apply_bias(logits: torch.Tensor, rows: list[SamplingRow]) -> None:
    """Adds the requests' biases to their rows of the logits.

    Few tokens of all rows are changed at once; a bias of many is spread out once for all rows that share it.
    """
    few: list[tuple[int, LogitBias]] = []
    many: dict[int, tuple[LogitBias, list[int]]] = {}
    for place, row in enumerate(rows):
        bias = row.params.logit_bias
        if bias is not None and len(bias.token_ids) <= 4 * FEW_BIASED:
            few.append((place, bias))
        elif bias is not None:
            many.setdefault(id(bias), (bias, []))[1].append(place)
    device = logits.device
    if few:
        counts = [len(bias.token_ids) // 4 for _, bias in few]
        places = np.repeat([place for place, _ in few], counts)
        token_ids, values = _bias_arrays([bias for _, bias in few])
        index = (to_device(places, torch.int64, device), to_device(token_ids, torch.int64, device))
        logits[index] += to_device(values, torch.float32, device)
    for bias, biased in many.values():
        token_ids, values = _bias_arrays([bias])
        spread = np.zeros(logits.shape[1], np.float32)
        spread[token_ids] = values
        added = to_device(spread, torch.float32, device)
        for place in biased:
            logits[place] += added


def _bias_arrays(biases: list[LogitBias]) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids and values, concatenated."""
    token_ids = np.frombuffer(b"".join(bias.token_ids for bias in biases), np.int32)
    values = np.frombuffer(b"".join(bias.values for bias in biases), np.float32)
    return token_ids.astype(np.int64), values.copy()  # torch warns of arrays that cannot be written


def apply_min_tokens(logits: torch.Tensor, rows: list[SamplingRow], mask_rows: list[int], bitmask: np.ndarray) -> None:
    """Forbids the end before `min_tokens`, unless the grammar allows nothing else."""
    early = [
        i for i, row in enumerate(rows) if len(row.output_ids) < row.params.min_tokens and not row.params.ignore_eos
    ]
    if not early:
        return
    masks = dict(zip(mask_rows, bitmask, strict=True))
    entries = [
        (i, token)
        for i in early
        if i not in masks or _allows_others(masks[i], rows[i].params.stop_token_ids)
        for token in rows[i].params.stop_token_ids
    ]
    if entries:
        index = to_device(entries, torch.int64, logits.device)
        logits.index_put_((index[:, 0], index[:, 1]), logits.new_full((), float("-inf")))


def _allows_others(mask: np.ndarray, token_ids: Sequence[int]) -> bool:
    """Whether the mask allows a token that is none of these."""
    left = mask.copy()
    for token in token_ids:
        left[token // 32] &= ~np.int32(np.uint32(1 << token % 32).view(np.int32))
    return bool(left.any())
