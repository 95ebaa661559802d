"""Calls of tools for clients of the MCP server, each with the session that its client's calls share."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass

from gptoss.generation.background import Background
from gptoss.generation.tool_run import run_call
from gptoss.generation.tool_sessions import Held, SessionLimits, ToolSessions
from gptoss.generation.tool_types import ToolCall, ToolResult, ToolRunner, ToolUnavailableError

CLIENTS = "mcp"  # a client that may call the server may call it for all
DRAIN_S = 8.0


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What one call may take."""

    timeout_s: float = 125.0
    max_result_bytes: int = 65_536


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a call, and the id of the session that it ran in; empty where none could be had."""

    result: ToolResult
    session_id: str = ""


class SharedSessions:
    """Sessions by what identifies a client: its connection, or the session id that it sends."""

    def __init__(self, sessions: SessionLimits, calls: CallLimits) -> None:
        self._background = Background()
        self._sessions = ToolSessions(sessions, self._background)
        self._calls = calls
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._sweeping = asyncio.get_running_loop().create_task(self._sessions.sweep())

    async def close(self) -> None:
        """Ends all sessions."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._sessions.close()
        await self._background.drain(DRAIN_S)

    async def call(
        self, runner: ToolRunner, recipient: str, text: str, client: str | None, session_id: str | None
    ) -> Answer:
        """Runs a call in the session of this id; else in the client's; else in a new one."""
        deadline = time.monotonic() + self._calls.timeout_s
        try:
            held = await self._held(runner, client, session_id)
        except ToolUnavailableError as error:
            return Answer(ToolResult.failed(error.kind, error.message))
        try:
            call_id = f"call_{secrets.token_hex(12)}"
            call = ToolCall(
                recipient=recipient,
                text=text,
                call_id=call_id,
                deadline=deadline,
                max_bytes=self._calls.max_result_bytes,
            )
            async with held.used():
                result = await run_call(runner, call, held.session, self._background)
            return Answer(result, held.session.id)
        finally:
            self._sessions.release(held)

    async def _held(self, runner: ToolRunner, client: str | None, session_id: str | None) -> Held:
        """The session, which counts as used. Raises ToolUnavailableError."""
        if session_id is not None:
            held = self._sessions.find_by_id(CLIENTS, runner.name, session_id)
            held.users += 1
            return held
        key = client or secrets.token_hex(16)
        lock = self._locks.setdefault((runner.name, key), asyncio.Lock())
        try:
            async with lock:
                held = self._sessions.find(CLIENTS, runner.name, key) or await self._open(runner, key)
                held.users += 1
                return held
        finally:
            if not lock.locked():
                self._locks.pop((runner.name, key), None)

    async def _open(self, runner: ToolRunner, key: str) -> Held:
        held = await self._sessions.open(runner, CLIENTS, {})
        self._sessions.keep(held, key)
        return held
