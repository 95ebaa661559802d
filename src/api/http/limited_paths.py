"""Collects the routes whose requests count against a key's limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

F = TypeVar("F", bound=Callable[..., object])
_MARK = "generates_tokens"


def generates(endpoint: F) -> F:
    """Marks a route's function: its requests use tokens of the key's limit."""
    setattr(endpoint, _MARK, True)
    return endpoint


@dataclass(frozen=True, slots=True)
class LimitedPaths:
    works: frozenset[str] = frozenset()  # requests count
    generates: frozenset[str] = frozenset()  # requests use tokens too

    @classmethod
    def of(cls, routes: Iterable[BaseRoute]) -> LimitedPaths:
        """Finds the routes with a JSON body, and those marked with `generates`."""
        found = [route for route in routes if isinstance(route, APIRoute)]
        return cls(
            frozenset(route.path for route in found if "requestBody" in (route.openapi_extra or {})),
            frozenset(route.path for route in found if getattr(route.endpoint, _MARK, False)),
        )
