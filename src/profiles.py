"""The three ways to run: what each sets for the engine, for a request, and as its service level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProfileName = Literal["latency_first", "balanced", "quality_first"]
Effort = Literal["low", "medium", "high"]


@dataclass(frozen=True, slots=True)
class Profile:
    """Explicit flags and request fields beat every value here. Times in seconds."""

    name: ProfileName
    model: str  # served when --model is not given and a GPU is there
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_waiting: int
    batch_invariant: bool
    effort: Effort
    temperature: float  # the model card recommends 1 and 1
    top_p: float
    max_output_tokens: int
    reasoning_budget: int | None
    priority: int  # lower runs sooner
    deadline_s: float
    expected_answer_s: tuple[float, float]


PROFILES: dict[str, Profile] = {
    "latency_first": Profile(
        "latency_first", "20b",
        max_num_seqs=8, max_num_batched_tokens=1024, max_num_waiting=32, batch_invariant=False,
        effort="low", temperature=1.0, top_p=1.0, max_output_tokens=4096, reasoning_budget=2048,
        priority=-10, deadline_s=120.0, expected_answer_s=(0.5, 2.0),
    ),
    "balanced": Profile(
        "balanced", "20b",
        max_num_seqs=32, max_num_batched_tokens=2048, max_num_waiting=256, batch_invariant=False,
        effort="medium", temperature=1.0, top_p=1.0, max_output_tokens=32_768, reasoning_budget=None,
        priority=0, deadline_s=600.0, expected_answer_s=(1.0, 4.0),
    ),
    "quality_first": Profile(
        "quality_first", "120b",
        max_num_seqs=16, max_num_batched_tokens=4096, max_num_waiting=128, batch_invariant=True,
        effort="high", temperature=1.0, top_p=1.0, max_output_tokens=65_536, reasoning_budget=None,
        priority=5, deadline_s=1800.0, expected_answer_s=(3.0, 8.0),
    ),
}  # fmt: skip
