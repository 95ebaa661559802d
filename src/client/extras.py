"""The request fields that OpenAI's API does not have."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack

Profile = Literal["latency_first", "balanced", "quality_first"]


class Extras(TypedDict, total=False):
    """Fields of this server (docs/api.md). None: as the server's profile says."""

    profile: Profile | None
    reasoning_budget: int | None  # tokens of reasoning; 0: none
    include_reasoning: bool | None
    include_relaxations: bool | None  # report what of the schemas is not enforced
    priority: int | None  # lower runs sooner
    cache_salt: str | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    min_tokens: int | None
    ignore_eos: bool | None


def extra_body(**extras: Unpack[Extras]) -> dict[str, Any]:
    """Returns the argument `extra_body` of any method of openai's client that generates."""
    return {name: value for name, value in extras.items() if value is not None}


def split_extras(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits options into this server's fields, merged with a given `extra_body`, and openai's arguments."""
    known = Extras.__annotations__
    extras = {name: value for name, value in options.items() if name in known and value is not None}
    rest = {name: value for name, value in options.items() if name not in known}
    return {**(rest.pop("extra_body", None) or {}), **extras}, rest
