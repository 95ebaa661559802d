"""Draws among what top-k, top-p and min-p leave of a row.

The likeliest NUM_CANDIDATES tokens nearly always hold all of that; a row for which they do not is drawn from the whole
vocabulary. Whether it needs that is known to the device alone, so a caller that must not wait draws first and reads
the flag with the tokens.

Shapes: R rows, V vocabulary, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from gptoss.engine.sampling_params import SamplingParams
from gptoss.kernels.device_copy import to_device

NUM_CANDIDATES = 1024
INVERT_BLOCK = 128


def is_truncated(p: SamplingParams) -> bool:
    return p.top_k > 0 or p.top_p < 1 or p.min_p > 0


@dataclass(frozen=True, slots=True)
class Truncated:
    """Rows to be drawn, all of their tensors on one device."""

    scaled: torch.Tensor  # float32 [R, V]: logits over temperature
    uniform: torch.Tensor  # float64 [R]
    top_k: torch.Tensor  # int64 [R]
    top_p: torch.Tensor  # float64 [R]
    min_p: torch.Tensor  # float32 [R]

    @classmethod
    def of(cls, scaled: torch.Tensor, uniform: torch.Tensor, params: list[SamplingParams]) -> Truncated:
        device, vocab = scaled.device, scaled.shape[1]
        return cls(
            scaled,
            uniform,
            to_device([p.top_k or vocab for p in params], torch.int64, device),
            to_device([p.top_p for p in params], torch.float64, device),
            to_device([p.min_p for p in params], torch.float32, device),
        )

    def rows(self, index: torch.Tensor) -> Truncated:
        return Truncated(*(getattr(self, field.name)[index] for field in fields(self)))

    def draw(self) -> torch.Tensor:
        """Draws the token ids, int64 [R]."""
        token_ids, right = self.draw_among_likeliest()
        if not bool(right.all()):
            wrong = (~right).nonzero().squeeze(1)
            token_ids[wrong] = self.rows(wrong).draw_among_all()
        return token_ids

    def draw_among_all(self) -> torch.Tensor:
        return self._draw(self.scaled.shape[1])[0]

    def draw_among_likeliest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws token ids, int64 [R], without waiting for the device, and returns whether each is final.

        draw_among_all decides the tokens that are not.
        """
        return self._draw(min(NUM_CANDIDATES, self.scaled.shape[1]))

    def _draw(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        vocab = self.scaled.shape[1]
        probs, ids = _candidates(self.scaled, width)
        ahead = probs.cumsum(dim=-1) - probs  # mass of the likelier tokens
        rank = torch.arange(width, device=probs.device)
        k, p, m = self.top_k.unsqueeze(1), self.top_p.unsqueeze(1), self.min_p.unsqueeze(1)
        # top-p acts on what top-k left, renormalised; min-p is relative to the likeliest token
        kept_mass = torch.where(rank < k, probs, 0).sum(dim=-1, keepdim=True)
        limit = p * torch.where(k <= width, kept_mass, 1.0)
        keep = (rank < k) & ((ahead < limit) | (p >= 1)) & (probs >= m * probs[:, :1])
        keep |= rank == 0
        right = ~keep[:, -1] | (width >= self.top_k)
        # what top-k leaves is not all among the candidates: its mass is not known yet
        right &= (self.top_k <= width) | (self.top_k >= vocab) | (self.top_p >= 1)
        right |= width == vocab
        picked = invert(torch.where(keep, probs, 0), self.uniform)
        return ids.gather(1, picked.unsqueeze(1)).squeeze(1), right


def _candidates(scaled: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns probabilities, float64 [R, width] in falling order, and their ids.

    Equal logits keep the order of their ids.
    """
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


def invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Returns an index [R] for each row of weights, drawn in proportion to them.

    weights [R, C] >= 0 need not sum to 1; uniform [R] in [0, 1). Two levels: first the block of INVERT_BLOCK
    candidates, then the candidate in it, so that the running sum is short.
    """
    num_rows, width = weights.shape
    if width % INVERT_BLOCK:
        weights = torch.nn.functional.pad(weights, (0, INVERT_BLOCK - width % INVERT_BLOCK))
    blocks = weights.view(num_rows, -1, INVERT_BLOCK)
    block, rest = _step(blocks.sum(dim=-1, dtype=torch.float64), uniform.clone(), scale=True)
    inside = blocks[torch.arange(num_rows, device=weights.device), block].double()
    index, _ = _step(inside, rest, scale=False)
    return block * INVERT_BLOCK + index


def _step(weights: torch.Tensor, target: torch.Tensor, *, scale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the index [R] whose share of the running sum holds the target, and the target in it."""
    cumulative = weights.cumsum(dim=-1)
    if scale:
        target = target * cumulative[:, -1]
    index = torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)
    # rounding may put the target at the very end: stay on an index that has weight
    last = weights.shape[1] - 1 - (weights.flip(-1) > 0).int().argmax(dim=-1)
    index = torch.minimum(index, last)
    before = cumulative.gather(1, index.unsqueeze(1)).squeeze(1) - weights.gather(1, index.unsqueeze(1)).squeeze(1)
    return index, target - before
