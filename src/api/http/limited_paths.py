"""Which routes count against a key's limits, as their declarations say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

F = TypeVar("F", bound=Callable[..., object])
_MARK = "generates_tokens"


def generates(endpoint: F) -> F:
    """Marks a route's function: its requests take tokens, so they need some left of the key's limit."""
    setattr(endpoint, _MARK, True)
    return endpoint


@dataclass(frozen=True, slots=True)
class LimitedPaths:
    works: frozenset[str] = frozenset()  # each request counts
    generates: frozenset[str] = frozenset()  # of these, the ones that take tokens

    @classmethod
    def of(cls, routes: Iterable[BaseRoute]) -> LimitedPaths:
        """Routes with a JSON body work; those marked with `generates` take tokens."""
        found = [route for route in routes if isinstance(route, APIRoute)]
        return cls(
            frozenset(route.path for route in found if "requestBody" in (route.openapi_extra or {})),
            frozenset(route.path for route in found if getattr(route.endpoint, _MARK, False)),
        )
