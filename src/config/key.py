"""A key of the configuration is one line: a dataclass field made by `key`.

Free of pydantic, which the engine's process does not load.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import field
from typing import Any, TypeVar

T = TypeVar("T")


def key(
    default: T,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    from_profile: bool = False,
    secret: bool = False,
) -> T:
    """Returns a dataclass field with a description and bounds, where pydantic reads them.

    Args:
        from_profile: the default is None, which stands for the active profile's value.
        secret: no error quotes the value.
    """
    bounds = {name: bound for name, bound in (("ge", ge), ("gt", gt), ("le", le)) if bound is not None}
    help += "; unset: the profile's" if from_profile else ""
    metadata: dict[str, Any] = {"description": help, "from_profile": from_profile, "secret": secret, **bounds}
    if isinstance(default, dict | list):
        factory: Callable[[], T] = lambda: copy.copy(default)  # noqa: E731
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)
