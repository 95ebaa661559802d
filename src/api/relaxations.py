"""What of a request's schemas the grammar does not enforce: for the log, and for clients that ask."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from gptoss.api.chat.structured_outputs import FinalFormat
from gptoss.api.telemetry.warn_once import WarnOnce
from gptoss.generation.relaxed_schema import RelaxedSchema

logger = logging.getLogger(__name__)
_warn = WarnOnce(logger, "not enforced by the grammar: %s", max_chars=400)


def relaxed_format(final: FinalFormat | None) -> list[RelaxedSchema]:
    if final is None or final.enforced is None:
        return []
    kind = final.field.partition(".")[0]
    name = final.name if kind == "response_format" else final.field
    return [RelaxedSchema(kind, name, relaxed) for relaxed in final.enforced.relaxed]


def warn_relaxed(relaxed: Sequence[RelaxedSchema]) -> None:
    """Once for each part."""
    if relaxed:
        _warn(str(r) for r in relaxed)


def relaxations(relaxed: Sequence[RelaxedSchema], asked: bool | None) -> dict[str, Any]:
    """The answer's field, where the client asked for it."""
    return {"relaxations": [r.as_json() for r in relaxed]} if asked else {}
