"""Tools for tests of the tool loop: a runner whose calls do what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from gptoss.generation.tool_types import (
    AnswerFilter,
    SessionOptions,
    ToolCall,
    ToolResult,
    ToolUnavailableError,
)
from gptoss.harmony.conversation import ToolDefinition, ToolNamespace

QUERY = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
BROWSER = ToolNamespace(
    "browser",
    "Looks things up.",
    (ToolDefinition("search", "Searches.", QUERY), ToolDefinition("open", "Opens a page.", {"type": "object"})),
)
PYTHON = ToolNamespace("python", "Runs code.")
Behaviour = Callable[[ToolCall], Awaitable[ToolResult]]


async def echo(call: ToolCall) -> ToolResult:
    """Repeats the call."""
    return ToolResult.of_text(f"{call.recipient}: {call.text}")


async def hang(call: ToolCall) -> ToolResult:
    """Never answers."""
    await asyncio.Event().wait()
    raise AssertionError("the wait has no end")


@dataclass(eq=False)
class FakeSession:
    id: str
    is_alive: bool = True
    is_closed: bool = False
    new_filter: Callable[[], AnswerFilter | None] = lambda: None

    def answer_filter(self) -> AnswerFilter | None:
        return self.new_filter()

    async def close(self) -> None:
        assert not self.is_closed, "closed twice"
        self.is_closed = True


@dataclass(eq=False)
class FakeRunner:
    """Counts what runs and what was stopped."""

    namespace: ToolNamespace | None = BROWSER
    does: Behaviour = echo
    parallel: bool = False
    refuses: ToolUnavailableError | None = None  # to open a session
    new_filter: Callable[[], AnswerFilter | None] = lambda: None
    calls: list[ToolCall] = field(default_factory=list)
    sessions: list[FakeSession] = field(default_factory=list)
    num_running: int = 0
    most_running: int = 0
    num_stopped: int = 0

    @property
    def name(self) -> str:
        return "mcp:fake" if self.namespace is None else self.namespace.name

    @property
    def num_open(self) -> int:
        return sum(not session.is_closed for session in self.sessions)

    async def open(self, options: SessionOptions) -> FakeSession:
        await asyncio.sleep(0)
        if self.refuses is not None:
            raise self.refuses
        self.sessions.append(FakeSession(f"cntr_{len(self.sessions)}", new_filter=self.new_filter))
        return self.sessions[-1]

    async def call(self, call: ToolCall, session: object) -> ToolResult:
        assert session in self.sessions and not session.is_closed  # type: ignore[attr-defined]
        self.calls.append(call)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            return await self.does(call)
        except asyncio.CancelledError:
            self.num_stopped += 1
            raise
        finally:
            self.num_running -= 1

    async def close(self) -> None:
        assert not self.num_open
