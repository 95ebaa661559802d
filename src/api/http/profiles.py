"""The profile that a request's model names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptoss.api.http.errors import InvalidRequest, NotFound
from gptoss.config.profiles import Profile


@dataclass(frozen=True, slots=True)
class Profiles:
    """The profiles of a server, and the names of its model."""

    by_name: Mapping[str, Profile]
    default: Profile
    model_id: str
    model_names: frozenset[str]  # the id and its aliases

    def of(self, model: str, name: str | None = None) -> Profile:
        """The profile `name`, else the suffix of `model:profile`, else the server's own.

        Raises InvalidRequest or NotFound.
        """
        base, _, suffix = model.rpartition(":")
        has_suffix = suffix in self.by_name and base in self.model_names
        if not has_suffix and model not in self.model_names:
            text = f"The model '{model}' does not exist. This server serves {self.model_id!r}."
            raise NotFound(text, "model", "model_not_found")
        if name is None:
            return self.by_name[suffix] if has_suffix else self.default
        if name not in self.by_name:
            raise InvalidRequest(f"Unknown profile {name!r}; there are {', '.join(self.by_name)}.", "profile")
        return self.by_name[name]
