"""The three profiles: limits of the engine, defaults of a request and a service level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

ProfileName = Literal["latency_first", "balanced", "quality_first"]
Effort = Literal["low", "medium", "high"]


@dataclass(frozen=True, slots=True)
class Profile:
    """The settings of a profile. Explicit keys and request fields beat every value here."""

    name: ProfileName
    model: str  # served on a GPU when no model is configured
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_waiting: int
    batch_invariant: bool
    effort: Effort
    temperature: float  # the model card recommends 1 and 1
    top_p: float
    max_output_tokens: int
    reasoning_budget: int | None
    priority: int  # lower values run sooner
    deadline_s: float
    expected_answer_s: tuple[float, float]
    ttft_p95_s: float = 7.0  # service level, to the first reasoning or content token
    e2e_p95_s: float = 20.0
    max_error_ratio: float = 0.005


def overridden(profile: Profile, changes: Mapping[str, Any]) -> Profile:
    """Returns the profile with changes. Raises ValueError, which names an unknown or invalid key."""
    checked: dict[str, Any] = {}
    for key, value in changes.items():
        where = f"profiles.{profile.name}.{key}"
        if key == "name" or key not in Profile.__dataclass_fields__:
            known = ", ".join(k for k in Profile.__dataclass_fields__ if k != "name")
            raise ValueError(f"{where}: unknown key. Known keys: {known}")
        try:
            checked[key] = TypeAdapter(_TYPES[key]).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{where}: {error.errors()[0]['msg']}, got {value!r}") from None
    return replace(profile, **checked)


_Positive = Annotated[float, Field(gt=0)]
_Count = Annotated[int, Field(ge=1)]
_TYPES: dict[str, Any] = {
    "model": str,
    "max_num_seqs": Annotated[int, Field(ge=1, le=1024)],
    "max_num_batched_tokens": _Count,
    "max_num_waiting": Annotated[int, Field(ge=0)],
    "batch_invariant": bool,
    "effort": Effort,
    "temperature": Annotated[float, Field(ge=0, le=2)],
    "top_p": Annotated[float, Field(ge=0, le=1)],
    "max_output_tokens": _Count,
    "reasoning_budget": Annotated[int, Field(ge=0)] | None,
    "priority": int,
    "deadline_s": _Positive,
    "expected_answer_s": tuple[_Positive, _Positive],
    "ttft_p95_s": _Positive,
    "e2e_p95_s": _Positive,
    "max_error_ratio": Annotated[float, Field(ge=0, le=1)],
}

PROFILES: dict[str, Profile] = {
    "latency_first": Profile(
        "latency_first",
        "20b",
        max_num_seqs=8,
        max_num_batched_tokens=1024,
        max_num_waiting=32,
        batch_invariant=False,
        effort="low",
        temperature=1.0,
        top_p=1.0,
        max_output_tokens=4096,
        reasoning_budget=2048,
        priority=-10,
        deadline_s=120.0,
        expected_answer_s=(0.5, 2.0),
    ),
    "balanced": Profile(
        "balanced",
        "20b",
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        max_num_waiting=256,
        batch_invariant=False,
        effort="medium",
        temperature=1.0,
        top_p=1.0,
        max_output_tokens=32_768,
        reasoning_budget=None,
        priority=0,
        deadline_s=600.0,
        expected_answer_s=(1.0, 4.0),
    ),
    "quality_first": Profile(
        "quality_first",
        "120b",
        max_num_seqs=16,
        max_num_batched_tokens=4096,
        max_num_waiting=128,
        batch_invariant=True,
        effort="high",
        temperature=1.0,
        top_p=1.0,
        max_output_tokens=65_536,
        reasoning_budget=None,
        priority=5,
        deadline_s=1800.0,
        expected_answer_s=(3.0, 8.0),
    ),
}
