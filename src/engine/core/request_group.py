"""The requests of one class, and how its tenants share what it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container

from gptoss.engine.config import EngineConfig
from gptoss.engine.core.request import Request
from gptoss.engine.core.waiting import WaitingQueue


class RequestGroup:
    """Running and waiting requests, live or background ones.

    The scheduler decides which of them start and stop.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._max_running, self._priority_ageing_s = config.max_num_seqs, config.priority_ageing_s
        self.running: list[Request] = []
        self.running_of: Counter[str] = Counter()  # by tenant, without zeros
        self.waiting = WaitingQueue()
        self.num_waiting = 0
        self.num_waiting_tokens = 0

    def __bool__(self) -> bool:
        return bool(self.running or self.num_waiting)

    @property
    def is_full(self) -> bool:
        """Whether it runs as many requests as it may."""
        return len(self.running) >= self._max_running

    def num_known(self) -> int:
        """Requests that could be in a step, at most as many as may run."""
        return min(len(self.running) + self.num_waiting, self._max_running)

    def enqueue(self, request: Request) -> None:
        self.waiting.push(self.key(request), request)
        self.num_waiting += 1
        self.num_waiting_tokens += request.num_tokens

    def leave_queue(self, request: Request) -> None:
        """Counts a request that no longer waits."""
        self.num_waiting -= 1
        self.num_waiting_tokens -= request.num_tokens

    def start(self, request: Request) -> None:
        self.leave_queue(request)
        self.running.append(request)
        self.running_of[request.tenant] += 1

    def stop(self, request: Request) -> None:
        self.running.remove(request)
        self.running_of[request.tenant] -= 1
        if not self.running_of[request.tenant]:
            del self.running_of[request.tenant]

    def first_waiting(self) -> Request | None:
        """The next request to start: tenants that run their share come last; None if no request waits."""
        share = self._share()
        return self.waiting.first(lambda tenant: self.running_of[tenant] >= share)

    def last_idle(self, in_flight: Container[str]) -> Request | None:
        """The running request to preempt first; none that is in a step in flight."""
        idle = [r for r in self.running if r.request_id not in in_flight]
        return max(idle, key=self.key) if idle else None

    def over_share(self, in_flight: Container[str]) -> Request | None:
        """The request to preempt for a tenant below its share that waits.

        It is one of the tenant that runs most, if that exceeds its share. None: every tenant has its share.
        """
        if not self.is_full or not self.num_waiting:
            return None
        share = self._share()
        tenant, num_running = max(self.running_of.items(), key=lambda item: item[1])
        if num_running <= share or all(self.running_of[t] >= share for t in self.waiting.tenants()):
            return None
        idle = [r for r in self.running if r.tenant == tenant and r.request_id not in in_flight]
        return max(idle, key=self.key) if idle else None

    def prompt_tokens_per_tenant(self, budget: int) -> int:
        """Prompt tokens that each tenant may compute in this step.

        So one tenant's long prompts do not fill the step.
        """
        tenants = {r.tenant for r in self.running if r.num_new_tokens > 1}
        if not self.is_full:
            tenants.update(self.waiting.tenants())
        return max(1, budget // max(1, len(tenants)))

    def key(self, request: Request) -> float:
        """The order of requests, lowest first. Priority shifts the arrival time, so no request waits forever."""
        return request.arrival + request.priority * self._priority_ageing_s

    def _share(self) -> int:
        """Requests that each tenant may run at once while others wait."""
        tenants = {*self.running_of, *self.waiting.tenants()}
        return max(1, self._max_running // max(1, len(tenants)))
