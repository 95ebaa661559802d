"""The tools of one request that the server runs, their calls, and the events that report them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gptoss.generation.background import Background
from gptoss.generation.tool_sessions import SessionChain
from gptoss.generation.tool_types import ToolResult, ToolRunner
from gptoss.harmony.deltas import Kind


@dataclass(frozen=True, slots=True)
class HostedTool:
    """A tool as one request offers it."""

    runner: ToolRunner
    recipient: str  # by which the runner knows it: "browser.search", or the name of an MCP server's tool
    needs_approval: bool = False  # the answer ends with its call
    options: Mapping[str, Any] = field(default_factory=dict)
    session_id: str | None = None  # of the session that the request names
    max_uses: int | None = None  # in one answer


@dataclass(frozen=True, slots=True)
class LoopLimits:
    """What bounds an answer in which the server runs tools."""

    max_calls: int = 128
    deadline_s: float = 600.0  # after which no call begins and running ones are stopped
    call_timeout_s: float = 120.0
    max_result_bytes: int = 64 * 1024  # of what the model reads of one result


@dataclass(frozen=True, slots=True)
class HostedTools:
    """What one request's loop runs."""

    by_name: Mapping[str, HostedTool]  # by the name in the plan: of a function, or a recipient
    chain: SessionChain
    background: Background
    limits: LoopLimits = field(default_factory=LoopLimits)
    parallel: bool = True  # calls of one round run at the same time
    keeps_sessions: bool = False  # for responses that continue this one
    named: frozenset[str] = frozenset()  # tools whose sessions requests may name later: by id, which the client reads


@dataclass(slots=True, eq=False)
class HostedCall:
    """One call of a tool that the server runs."""

    index: int  # among those of the answer
    name: str  # in the plan
    tool: HostedTool
    text: str = ""
    approval_id: str | None = None  # of the request that approved it
    session_id: str = ""  # of the session that it ran in
    result: ToolResult | None = None
    call_id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    @property
    def needs_approval(self) -> bool:
        return self.tool.needs_approval and self.approval_id is None


# begun: the model writes the call; text: a piece of it; whole: it is written; cut: it never was;
# running, finished: as the server runs it
ToolState = Literal["begun", "text", "whole", "cut", "running", "finished"]


@dataclass(frozen=True, slots=True)
class ToolEvent:
    """What happens to a call. `finished` has its result in `call.result`."""

    call: HostedCall
    state: ToolState
    text: str = ""

    @property
    def visible_kind(self) -> Kind | None:
        return None


@dataclass(frozen=True, slots=True)
class Approved:
    """A call of an earlier answer that may now run. `origin`: by which the conversation knows it."""

    name: str
    text: str
    origin: str
    approval_id: str
