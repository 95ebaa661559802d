"""A tool loop over a scripted engine, with fake tools and an accounting that records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptoss.config.profiles import PROFILES
from gptoss.generation.background import Background
from gptoss.generation.hosted import Approved, HostedTool, HostedTools, LoopLimits
from gptoss.generation.plan import Plan
from gptoss.generation.planner import PlanLimits, Planner
from gptoss.generation.request import FunctionTool, GenerationRequest, ToolPolicy
from gptoss.generation.session import Usage
from gptoss.generation.tool_loop import Runtime, ToolLoop
from gptoss.generation.tool_sessions import SessionLimits, ToolSessions
from gptoss.harmony.conversation import Conversation, UserMessage
from gptoss.harmony.conversation import ToolResult as HistoryResult
from gptoss.prompt_builder import PromptBuilder
from tests.support.script import Line, Script
from tests.support.tools import FakeRunner
from tests.support.vocabulary import public_vocabulary

VOCABULARY = public_vocabulary()
HELLO = Conversation((UserMessage("Hello"),))
CLIENT = FunctionTool("mine", "Runs at the client.", {"type": "object"})


@dataclass
class Accounting:
    """Records what is counted."""

    is_cancelled: bool = False
    tools: list[tuple[str, str, str | None]] = field(default_factory=list)
    followed: list[Sequence[str]] = field(default_factory=list)
    ended: list[tuple[Usage, Any]] = field(default_factory=list)
    refusal: str | None = None
    stop: Callable[[], None] | None = None

    def admit(self, plan: Plan) -> None: ...

    def begin(self, plan: Plan) -> None: ...

    def arrived(self, output: Any, num_tokens: int) -> None: ...

    def shown(self, kind: str) -> None: ...

    def follow(self, request_ids: Sequence[str]) -> None:
        self.followed.append(request_ids)

    def on_cancel(self, stop: Callable[[], None] | None) -> None:
        self.stop = stop

    def take_tool_call(self) -> str | None:
        return self.refusal

    def tool_ended(self, tool: str, function: str, seconds: float, failure: str | None) -> None:
        self.tools.append((tool, function, failure))

    def end(self, usage: Usage, choices: Any, prompts: Any) -> None:
        self.ended.append((usage, choices[0].finish_reason))


@dataclass
class Setting:
    """A loop with one runner, and everything that it uses."""

    lines: Sequence[Line]
    runner: FakeRunner = field(default_factory=FakeRunner)
    limits: LoopLimits = field(default_factory=LoopLimits)
    session_limits: SessionLimits = field(default_factory=SessionLimits)
    max_model_len: int = 8000
    mode: Any = "auto"
    parallel: bool = True
    needs_approval: bool = False
    max_tokens: int | None = None
    keeps_sessions: bool = False

    def __post_init__(self) -> None:
        self.engine = Script(self.lines, VOCABULARY)
        self.background, self.accounting = Background(), Accounting()
        self.sessions = ToolSessions(self.session_limits, self.background)
        self.planner = Planner(
            PlanLimits(self.max_model_len), VOCABULARY, PromptBuilder(VOCABULARY, current_date="2026-01-01")
        )

    def request(self, conversation: Conversation = HELLO) -> GenerationRequest:
        space = self.runner.namespace
        functions = [FunctionTool("fake__find", "Finds.", {"type": "object"})] if space is None else []
        hosted = frozenset(space.recipients) if space is not None else frozenset({"fake__find"})
        policy = ToolPolicy([CLIENT, *functions], self.mode, builtins=[space] if space else (), hosted=hosted)
        profile = PROFILES["balanced"]
        return GenerationRequest(
            request_id="r", prompt=conversation, profile=profile, tools=policy, max_tokens=self.max_tokens
        )

    def loop(self, previous: str | None = None, conversation: Conversation = HELLO) -> ToolLoop:
        asked = self.request(conversation)
        plan = self.planner.plan(asked)
        by_name = {
            name: HostedTool(self.runner, name.removeprefix("fake__"), self.needs_approval)
            for name in asked.tools.hosted
        }
        tools = HostedTools(
            by_name,
            self.sessions.chain("alice", previous),
            self.background,
            self.limits,
            self.parallel,
            self.keeps_sessions,
        )
        runtime = Runtime(
            VOCABULARY, self.engine, self.accounting, self.planner.prompt_builder.remember, self.max_model_len
        )

        async def replan(results: Any) -> Plan:
            messages = [
                HistoryResult(results[one.call_id], one.call_id) if isinstance(one, HistoryResult) else one
                for one in conversation.messages
            ]
            return self.planner.plan(self.request(Conversation(tuple(messages))))

        return ToolLoop(plan, tools, runtime, replan)

    async def run(self, loop: ToolLoop | None = None, approved: Sequence[Approved] = ()) -> list[Any]:
        loop = loop or self.loop()
        await loop.begin(approved)
        found = [event async for batch in loop.events() for _, events in batch for event in events]
        await self.nothing_is_left()
        return found

    async def nothing_is_left(self) -> None:
        await self.background.drain(2.0)
        assert not self.background and self.runner.num_running == 0
        assert len(self.accounting.ended) <= 1 or self.keeps_sessions
        if not self.keeps_sessions:
            assert self.runner.num_open == 0 == len(self.sessions)

    def prompt(self, number: int) -> str:
        return VOCABULARY.decode(self.engine.requests[number].token_ids)
