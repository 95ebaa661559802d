"""What the sampler needs to know of one row of logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gptoss.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingRow:
    params: SamplingParams
    prompt_ids: np.ndarray
    output_ids: np.ndarray
