"""What decides whether a request is accepted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from gptoss.api.access.api_keys import ApiKeys, Caller
from gptoss.api.access.rate_limits import Allowance, RateLimits
from gptoss.api.http.errors import Unavailable


@dataclass(slots=True)
class Access:
    """The keys and limits of one app. While it is `draining`, new work is refused."""

    keys: ApiKeys
    limits: RateLimits = field(default_factory=RateLimits)
    draining: bool = False
    refused: Counter[str] = field(default_factory=Counter)  # by error code

    def enter(self, caller: Caller, *, generates: bool) -> Allowance:
        """Takes one request from the caller's limits. Raises RateLimited, or Unavailable while draining."""
        if self.draining:
            raise Unavailable("The server is shutting down.", code="draining", headers={"retry-after": "5"})
        return self.limits.enter(caller, generates=generates)

    def report(self) -> dict[str, Any]:
        """The part of /stats: counts, without the names of keys."""
        return {"keys": len(self.keys), "refused": dict(self.refused), "draining": self.draining}
