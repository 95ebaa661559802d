"""Whether more requests may wait, over one engine or several."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from gptoss.engine.client.errors import QueueFullError
from gptoss.engine.client.streams import OpenStreams, refusal
from gptoss.engine.config import EngineConfig


class FinishRate:
    """How often requests of an engine ended recently."""

    def __init__(self) -> None:
        self._moments: deque[float] = deque(maxlen=64)

    def __bool__(self) -> bool:
        """Whether any request ended since the start or the last `clear`."""
        return bool(self._moments)

    def count(self) -> None:
        self._moments.append(time.monotonic())

    def clear(self) -> None:
        self._moments.clear()

    @property
    def per_second(self) -> float:
        """0 if fewer than two requests have ended."""
        if len(self._moments) < 2:
            return 0.0
        return len(self._moments) / max(time.monotonic() - self._moments[0], 0.001)


def check_capacity(
    streams: Sequence[OpenStreams],
    config: EngineConfig,
    rates: Sequence[FinishRate],
    *,
    tenant: str,
    num_requests: int,
    num_tokens: int,
) -> None:
    """Raises QueueFullError if this many more requests or prompt tokens may not wait.

    `streams` and `rates`: of each engine.
    """
    max_running = config.max_num_seqs * len(streams)
    max_requests = max_running + config.max_num_waiting
    problem = refusal(streams, tenant, num_requests, num_tokens, max_requests, config.max_num_waiting_tokens)
    if problem is None:
        return
    if problem == "requests":
        text = f"{config.max_num_waiting} requests are waiting already (max_num_waiting)"
    else:
        num_held = sum(s.num_unstarted_tokens for s in streams)
        text = f"the waiting requests hold {num_held} tokens already (max_num_waiting_tokens)"
    raise QueueFullError(text, _retry_after(max_running, sum(rate.per_second for rate in rates)))


def _retry_after(max_running: int, per_second: float) -> float:
    """Seconds until capacity should be free."""
    return min(60.0, max(1.0, max_running / max(per_second, 0.01) / 4)) if per_second else 1.0
