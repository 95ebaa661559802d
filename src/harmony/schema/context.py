"""What a rewriting of a schema knows: what is left out, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALL = "*"  # as a keyword: the whole schema
NOT_SUPPORTED = "the grammar has no such keyword"


@dataclass(frozen=True, slots=True)
class Relaxed:
    """One keyword that is not enforced."""

    location: str
    keyword: str
    reason: str
    contradiction: bool = False  # if it were enforced, nothing would match

    @property
    def path(self) -> str:
        return self.location if self.keyword == ALL else f"{self.location}.{self.keyword}"

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Context:
    """Which keywords are left out.

    `blocked`: (location, keyword) -> why it is left out, known from an earlier attempt.
    """

    def __init__(self, blocked: Mapping[tuple[str, str], Relaxed], *, strict: bool) -> None:
        self.blocked, self.strict = blocked, strict
        self.relaxed: dict[tuple[str, str], Relaxed] = {}
        self.impossible: set[str] = set()  # locations of contradictions

    def relax(self, location: str, keyword: str, reason: str, *, contradiction: bool = False) -> None:
        """Notes that a keyword is left out."""
        self.leave_out(Relaxed(location, keyword, reason, contradiction))

    def leave_out(self, relaxed: Relaxed) -> None:
        """Notes it, unless the same keyword there is noted already."""
        self.relaxed.setdefault((relaxed.location, relaxed.keyword), relaxed)
        if relaxed.contradiction:
            self.impossible.add(relaxed.location)

    def get(self, schema: Mapping[str, Any], keyword: str, location: str, default: Any = None) -> Any:
        """The keyword's value; `default` if it is absent or known not to compile."""
        if keyword not in schema:
            return default
        known = self.blocked.get((location, keyword))
        if known is None:
            return schema[keyword]
        if keyword != "format":  # an annotation, enforced only if possible
            self.leave_out(known)
        return default
