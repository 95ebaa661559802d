"""A part of a request's schemas that the grammar does not enforce."""

from __future__ import annotations

from dataclasses import dataclass

from gptoss.harmony.schema.context import Relaxed


@dataclass(frozen=True, slots=True)
class RelaxedSchema:
    kind: str  # "function", or the field that the schema came in
    name: str
    relaxed: Relaxed

    def __str__(self) -> str:
        named = self.name if self.name.partition(".")[0] == self.kind else f"{self.kind} {self.name}"
        return f"{named}: {self.relaxed}"

    def as_json(self) -> dict[str, str]:
        return {"kind": self.kind, "name": self.name, "path": self.relaxed.path, "reason": self.relaxed.reason}
