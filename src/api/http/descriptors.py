"""The number of connections that the limit of open files allows."""

from __future__ import annotations

import contextlib
import logging
import os
import resource

from gptoss.config.errors import ConfigError

logger = logging.getLogger(__name__)

RESERVE = 64  # for the engine's sockets, files, /health and connections being refused
MIN_CONNECTIONS = 8


def allowed_connections(wanted: int) -> int:
    """Returns `wanted`, or as many as the limit of open files allows; raises the soft limit if necessary.

    Raises ConfigError if fewer than MIN_CONNECTIONS are possible.
    """
    needed = wanted + RESERVE + _num_open()
    limit = _raised_limit(needed)
    if limit >= needed:
        return wanted
    allowed = wanted - (needed - limit)
    remedy = f"raise the limit of open files ({limit}) to {needed}, with `ulimit -n {needed}` or LimitNOFILE"
    if allowed < min(MIN_CONNECTIONS, wanted):
        raise ConfigError(f"max_connections {wanted}: {remedy}")
    logger.warning("max_connections is %d instead of %d; %s", allowed, wanted, remedy)
    return allowed


def _num_open() -> int:
    return len(os.listdir("/dev/fd"))


def _raised_limit(needed: int) -> int:
    """Raises the soft limit of open files if necessary; returns how many files this process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return needed
    raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = raised
    return soft
