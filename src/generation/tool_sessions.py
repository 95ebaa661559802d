"""Sessions of tools: opened by the first call, kept for later responses, closed when idle.

A session belongs to a tenant. It is found by the id of the response that used it last, or by its own id where a request
names it. When there are too many, the one that has been idle longest makes way: first of the tenant that is at its own
limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptoss.generation.background import Background
from gptoss.generation.tool_types import (
    AnswerFilter,
    SessionOptions,
    ToolRunner,
    ToolSession,
    ToolUnavailableError,
)
from gptoss.lru_cache import LruCache

MAX_KEYS = 256  # response ids by which one session is found
MAX_EXPIRED = 10_000  # response ids whose sessions are gone
GONE = "The session of this tool has expired; its state is lost. The next call starts a new one."


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """How many sessions there may be, and for how long."""

    max_sessions: int = 64
    max_per_tenant: int = 16
    idle_s: float = 1200.0


@dataclass(slots=True, eq=False)
class Held:
    """A session and who uses it."""

    runner: ToolRunner
    session: ToolSession
    tenant: str
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)
    keys: dict[str, None] = field(default_factory=dict)  # response ids by which it is found, the oldest first
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @contextlib.asynccontextmanager
    async def used(self) -> AsyncIterator[None]:
        """Waits until the session may be called."""
        if self.runner.parallel:
            yield
            return
        async with self.turn:
            yield


class ToolSessions:
    """The sessions of a server."""

    def __init__(self, limits: SessionLimits, background: Background) -> None:
        self.limits, self.background = limits, background
        self._held: set[Held] = set()
        self._by_key: dict[tuple[str, str, str], Held] = {}  # tenant, tool, response id
        self._expired: LruCache[tuple[str, str, str], None] = LruCache(MAX_EXPIRED)
        self._opening = 0
        self._opening_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    def count(self, tool: str) -> int:
        """The number of live sessions of a tool."""
        return sum(one.runner.name == tool for one in self._held)

    def chain(self, tenant: str, previous: str | None) -> SessionChain:
        """The sessions of a request. `previous`: id of the response that it continues."""
        return SessionChain(self, tenant, previous)

    def of_response(self, tenant: str, response_id: str | None) -> list[Held]:
        """The sessions by which a response may be continued."""
        return [one for one in self._held if one.tenant == tenant and response_id in one.keys]

    def find(self, tenant: str, tool: str, response_id: str) -> Held | None:
        """The session that a response used. Raises ToolUnavailableError, once, if it has expired."""
        key = (tenant, tool, response_id)
        held = self._by_key.get(key)
        if held is not None and not held.session.is_alive:
            self._drop(held)
            held = None
        if held is None and key in self._expired:
            self._expired.pop(key)
            raise ToolUnavailableError(GONE, "gone")
        return held

    def find_by_id(self, tenant: str, tool: str, session_id: str) -> Held:
        """The session of this id. Raises ToolUnavailableError."""
        for held in self._held:
            if held.session.id == session_id and held.tenant == tenant and held.runner.name == tool:
                if held.session.is_alive:
                    return held
                self._drop(held)
                break
        raise ToolUnavailableError(f"There is no container {session_id!r}: it has expired, or never was.", "gone")

    async def open(self, runner: ToolRunner, tenant: str, options: Mapping[str, Any]) -> Held:
        """Opens a session. Raises ToolUnavailableError."""
        self._make_room(tenant)
        self._opening += 1
        self._opening_of[tenant] = self._opening_of.get(tenant, 0) + 1
        try:
            session = await runner.open(SessionOptions(tenant=tenant, options=options))
        finally:
            self._opening -= 1
            self._opening_of[tenant] -= 1
            if not self._opening_of[tenant]:
                del self._opening_of[tenant]
        held = Held(runner, session, tenant)
        self._held.add(held)
        return held

    def carry_on(self, tenant: str, previous: str, response_id: str) -> None:
        """Lets sessions of a response be found by one that continues it without tools."""
        for held in self.of_response(tenant, previous):
            self.keep(held, response_id)

    def keep(self, held: Held, response_id: str) -> None:
        """Lets the session be found by this response."""
        held.keys[response_id] = None
        if len(held.keys) > MAX_KEYS:
            oldest = next(iter(held.keys))
            del held.keys[oldest], self._by_key[held.tenant, held.runner.name, oldest]
        self._by_key[held.tenant, held.runner.name, response_id] = held

    def release(self, held: Held) -> None:
        """Ends a use. A session that no response finds is closed."""
        held.users -= 1
        held.last_used = time.monotonic()
        if not held.users and (not held.keys or not held.session.is_alive):
            self._drop(held)

    def close_idle(self) -> None:
        """Closes what has been idle too long."""
        latest = time.monotonic() - self.limits.idle_s
        for held in [one for one in self._held if not one.users and one.last_used < latest]:
            self._drop(held)

    async def sweep(self) -> None:
        """Closes idle sessions until it is cancelled."""
        while True:
            await asyncio.sleep(min(10.0, self.limits.idle_s / 4))
            self.close_idle()

    def close(self) -> None:
        """Closes all sessions in the background."""
        for held in [*self._held]:
            self._drop(held)

    def _make_room(self, tenant: str) -> None:
        limits = self.limits
        own = sum(one.tenant == tenant for one in self._held) + self._opening_of.get(tenant, 0)
        if own >= limits.max_per_tenant:
            self._evict([one for one in self._held if one.tenant == tenant], f"{own} of this key")
        elif len(self._held) + self._opening >= limits.max_sessions:
            self._evict([*self._held], f"{len(self._held)}")

    def _evict(self, among: list[Held], count: str) -> None:
        idle = [one for one in among if not one.users]
        if not idle:
            raise ToolUnavailableError(f"Too many tool sessions are in use: {count}. Try again later.", "limit")
        self._drop(min(idle, key=lambda one: one.last_used))

    def _drop(self, held: Held) -> None:
        if held not in self._held:
            return
        self._held.remove(held)
        for response_id in held.keys:
            key = (held.tenant, held.runner.name, response_id)
            if self._by_key.get(key) is held:
                del self._by_key[key]
                self._expired.put(key, None)
        self.background.spawn(held.session.close())


class SessionChain:
    """The sessions that one request uses. `finish` releases them."""

    def __init__(self, sessions: ToolSessions, tenant: str, previous: str | None) -> None:
        self._sessions, self._tenant, self._previous = sessions, tenant, previous
        self._used: dict[str, Held] = {}  # by tool
        self._unshared: dict[ToolRunner, Held] = {}  # sessions that hold no state
        self._locks: dict[ToolRunner, asyncio.Lock] = {}
        self._finished = False
        self._closed_with: list[Callable[[], Coroutine[Any, Any, None]]] = []

    def also_close(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Has something closed when the request ends."""
        self._closed_with.append(close)

    async def get(self, runner: ToolRunner, options: Mapping[str, Any], session_id: str | None = None) -> Held:
        """The session of a tool: that of the chain, or a new one. Raises ToolUnavailableError."""
        async with self._locks.setdefault(runner, asyncio.Lock()):
            held = self._used.get(runner.name) or self._unshared.get(runner)
            if held is not None and held.session.is_alive:
                return held
            if runner.namespace is None:
                session = await runner.open(SessionOptions(tenant=self._tenant, options=options))
                held = self._unshared[runner] = Held(runner, session, self._tenant)
                return held
            if held is not None:
                self._release(self._used.pop(runner.name))
            return await self._enter(runner, options, session_id)

    async def _enter(self, runner: ToolRunner, options: Mapping[str, Any], session_id: str | None) -> Held:
        sessions = self._sessions
        if session_id is not None:
            held = sessions.find_by_id(self._tenant, runner.name, session_id)
        else:
            previous = self._previous
            found = sessions.find(self._tenant, runner.name, previous) if previous is not None else None
            held = found if found is not None else await sessions.open(runner, self._tenant, options)
        held.users += 1
        if self._finished:  # meanwhile
            self._release(held)
            raise ToolUnavailableError("The request has ended.")
        self._used[runner.name] = held
        return held

    def answer_filters(
        self, runners: Iterable[ToolRunner], named: Mapping[str, str] | None = None
    ) -> list[AnswerFilter]:
        """New filters for a text of the final answer, of the sessions of these tools.

        `named`: ids of sessions that the request names, by tool.
        """
        before = {one.runner.name: one for one in self._sessions.of_response(self._tenant, self._previous)}
        known = before | self._named(named or {}) | self._used
        sessions = [known[runner.name].session for runner in runners if runner.name in known]
        return [made for session in sessions if (made := session.answer_filter()) is not None]

    def _named(self, ids: Mapping[str, str]) -> dict[str, Held]:
        found = {}
        for tool, session_id in ids.items():
            with contextlib.suppress(ToolUnavailableError):
                found[tool] = self._sessions.find_by_id(self._tenant, tool, session_id)
        return found

    def has(self, runner: ToolRunner, session_id: str) -> bool:
        """Whether there is a live session of this id."""
        try:
            self._sessions.find_by_id(self._tenant, runner.name, session_id)
        except ToolUnavailableError:
            return False
        return True

    def finish(self, response_id: str | None, named: Collection[str] = ()) -> None:
        """Releases the sessions, and keeps them for responses that continue this one. Idempotent.

        `response_id`: None: nothing can continue it. `named`: tools whose sessions are kept for requests that name
        them.
        """
        if self._finished:
            return
        self._finished = True
        if response_id is not None:
            for held in {*self._used.values(), *self._sessions.of_response(self._tenant, self._previous)}:
                self._sessions.keep(held, response_id)
        for name, held in self._used.items():
            if name in named:
                self._sessions.keep(held, held.session.id)
            self._release(held)
        for held in self._unshared.values():
            self._sessions.background.spawn(held.session.close())
        for close in self._closed_with:
            self._sessions.background.spawn(close())
        self._used, self._unshared = {}, {}

    def _release(self, held: Held) -> None:
        self._sessions.release(held)
