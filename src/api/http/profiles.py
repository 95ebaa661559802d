"""The profile that a request's model names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptoss.api.http.errors import InvalidRequest, NotFound
from gptoss.config.profiles import Profile
from gptoss.engine.client.adapters import Adapters
from gptoss.engine.messages import Adapter


@dataclass(frozen=True, slots=True)
class Profiles:
    """The profiles of a server, and the names of its model."""

    by_name: Mapping[str, Profile]
    default: Profile
    model_id: str
    model_names: frozenset[str]  # the id and its aliases
    adapters: Adapters | None = None  # whose names are models too

    def of(self, model: str, name: str | None = None) -> Profile:
        """The profile `name`, else the suffix of `model:profile`, else the server's own.

        Raises InvalidRequest or NotFound.
        """
        base, _, suffix = model.rpartition(":")
        has_suffix = suffix in self.by_name and self._is_model(base)
        if not has_suffix and not self._is_model(model):
            text = f"The model '{model}' does not exist. This server serves {self.model_id!r}."
            raise NotFound(text, "model", "model_not_found")
        if name is None:
            return self.by_name[suffix] if has_suffix else self.default
        if name not in self.by_name:
            raise InvalidRequest(f"Unknown profile {name!r}; there are {', '.join(self.by_name)}.", "profile")
        return self.by_name[name]

    def adapter_of(self, model: str) -> Adapter | None:
        """The LoRA adapter that `model` or `model:profile` names; None for the model itself. Raises NotFound."""
        self.of(model)
        if self.adapters is None:
            return None
        base, _, suffix = model.rpartition(":")
        served = self.adapters.get(base if suffix in self.by_name and base else model)
        return None if served is None else served.message

    def _is_model(self, name: str) -> bool:
        return name in self.model_names or (self.adapters is not None and self.adapters.get(name) is not None)
