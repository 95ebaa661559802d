"""What of a request's schemas the grammar does not enforce: for the log, and for clients that ask."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptoss.api.chat.structured_outputs import FinalFormat
from gptoss.api.telemetry.warn_once import WarnOnce
from gptoss.harmony.schema.rewrite import Relaxed

logger = logging.getLogger(__name__)
_warn = WarnOnce(logger, "not enforced by the grammar: %s", max_chars=400)


@dataclass(frozen=True, slots=True)
class RelaxedSchema:
    """A part of a request's schemas that the grammar does not enforce."""

    kind: str  # "function", or the field that the schema came in
    name: str
    relaxed: Relaxed

    def __str__(self) -> str:
        named = self.name if self.name.partition(".")[0] == self.kind else f"{self.kind} {self.name}"
        return f"{named}: {self.relaxed}"

    def as_json(self) -> dict[str, str]:
        return {"kind": self.kind, "name": self.name, "path": self.relaxed.path, "reason": self.relaxed.reason}


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


def relaxations(relaxed: Sequence[RelaxedSchema] | None) -> dict[str, Any]:
    """The answer's field; `None`: the client has not asked for it."""
    return {} if relaxed is None else {"relaxations": [r.as_json() for r in relaxed]}
