"""Reports what the grammar does not enforce, in the log and to clients that request it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from gptoss.api.telemetry.warn_once import WarnOnce
from gptoss.generation.relaxed_schema import RelaxedSchema

logger = logging.getLogger(__name__)
_warn = WarnOnce(logger, "not enforced by the grammar: %s", max_chars=400)


def warn_relaxed(relaxed: Sequence[RelaxedSchema]) -> None:
    """Logs each part once."""
    if relaxed:
        _warn(str(one) for one in relaxed)


def relaxations(relaxed: Sequence[RelaxedSchema], asked: bool | None) -> dict[str, Any]:
    """The field of the answer, if the client requested it."""
    return {"relaxations": [one.as_json() for one in relaxed]} if asked else {}
