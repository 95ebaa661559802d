"""The queue of requests that wait to be scheduled, by tenant."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from gptoss.engine.core.request import Request, RequestStatus

Entry = tuple[float, int, Request]


class WaitingQueue:
    """Each tenant's requests in the order of their keys. The scheduler chooses the tenant."""

    def __init__(self) -> None:
        self._heaps: dict[str, list[Entry]] = {}
        self._order = 0

    def tenants(self) -> Iterator[str]:
        """The tenants of waiting requests."""
        return (tenant for tenant in list(self._heaps) if self._head(tenant) is not None)

    def push(self, key: float, request: Request) -> None:
        self._order += 1
        self.push_back((key, self._order, request))

    def push_back(self, entry: Entry) -> None:
        """Returns an entry of `pop` to its former position."""
        heapq.heappush(self._heaps.setdefault(entry[2].tenant, []), entry)

    def first(self, yields: Callable[[str], bool]) -> Request | None:
        """The next request: lowest key first, but tenants that yield come last. None if no request waits."""
        if len(self._heaps) == 1:
            head = self._head(next(iter(self._heaps)))
            return None if head is None else head[2]
        heads = (self._head(tenant) for tenant in list(self._heaps))
        waiting = [(yields(head[2].tenant), *head) for head in heads if head is not None]
        return min(waiting, key=lambda entry: entry[:3])[3] if waiting else None

    def pop(self, request: Request) -> Entry:
        """Removes the request that `first` returned."""
        entry = heapq.heappop(self._heaps[request.tenant])
        assert entry[2] is request
        return entry

    def _head(self, tenant: str) -> Entry | None:
        """The tenant's first entry; removes requests that have ended."""
        heap = self._heaps[tenant]
        while heap:
            if heap[0][2].status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
                return heap[0]
            heapq.heappop(heap)
        del self._heaps[tenant]
        return None
