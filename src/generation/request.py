"""One request to the model, independent of the wire format.

Adapters make it; planner.py and session.py run it. Values are validated by the adapter: ranges, types, names. What
needs the vocabulary, the grammar compiler or the engine's limits is checked by the planner, which raises a
GenerationError with the path of the part at fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gptoss.config.profiles import Profile
from gptoss.engine.messages import Adapter
from gptoss.engine.sampling_params import LogitBias
from gptoss.harmony.conversation import Conversation, ToolDefinition, ToolNamespace
from gptoss.harmony.render import ReasoningEffort

# Where the answer begins: after `<|start|>assistant`; before it; within the text of the final message
Beginning = Literal["message", "turn", "final"]


@dataclass(frozen=True, slots=True)
class FunctionTool(ToolDefinition):
    """A function that the model may call."""

    strict: bool = False  # arguments follow all of the schema
    label: str = ""  # how errors name it, where the client knows it by another name


@dataclass(frozen=True, slots=True)
class ToolPolicy:
    """What the model may call, and whether it must."""

    tools: Sequence[FunctionTool] = ()
    mode: Literal["auto", "none", "required"] = "auto"
    allowed: Sequence[str] | None = None  # names; None: all of them
    max_calls: int | None = None  # in one answer; None: no limit
    builtins: Sequence[ToolNamespace] = ()  # of the system message; `allowed` has the names of their recipients
    hosted: frozenset[str] = frozenset()  # names of tools and recipients that the server runs: see tool_loop.py

    @property
    def must_call(self) -> bool:
        return self.mode == "required"

    def may_call(self, name: str) -> bool:
        return self.mode != "none" and (self.allowed is None or name in self.allowed)


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """What the final message must follow: a JSON schema, a regular expression or one of several texts."""

    kind: Literal["json", "regex", "choice"]
    value: Any  # the schema, the pattern, or the texts
    field: str  # of the client's request, for errors
    reported_as: tuple[str, str]  # kind and name in reports on what is not enforced
    name: str = ""
    description: str | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn. None: as the profile says."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: LogitBias | None = None
    seed: int | None = None  # None: a random one
    logprobs: int | None = None  # alternatives for each token of the answer; None: no logprobs
    min_tokens: int = 0
    ignore_eos: bool = False  # run up to max_tokens, without any grammar


@dataclass(frozen=True, slots=True)
class TextPrompts:
    """Raw prompts, each continued by itself: text, in which special tokens are read as such, or token ids."""

    prompts: Sequence[str | list[int]]
    echo: bool = False  # the answer begins with the prompt, with its logprobs if any are wanted


Prompt = Conversation | TextPrompts


@dataclass(frozen=True, slots=True)
class Prefill:
    """A final message that has been begun, and the reasoning before it: the answer continues its text."""

    text: str
    reasoning: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a client asks of the model."""

    request_id: str  # begins the ids of its engine requests
    prompt: Prompt
    profile: Profile  # gives what the request leaves open
    effort: ReasoningEffort | None = None
    reasoning_budget: int | None = None  # tokens of analysis; 0: none
    prefill: Prefill | None = None  # follows the conversation
    opens_turn: bool = False  # the model writes `<|start|>assistant` itself
    tools: ToolPolicy = field(default_factory=ToolPolicy)
    output_format: OutputFormat | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: Sequence[str] = ()  # strings that end the answer
    max_tokens: int | None = None  # of each choice, reasoning included
    stream: bool = False  # the client reads the answer as it is generated
    num_choices: int = 1  # for each prompt
    priority: int | None = None  # lower runs sooner
    tenant: str = ""  # shares the engine equally with other tenants
    cache_scope: str = ""  # prompts and prefixes are cached for requests of this scope alone
    cache_salt: str = ""  # divides a scope further
    adapter: Adapter | None = None  # LoRA, added to the model

    @property
    def begins(self) -> Beginning:
        if self.prefill is not None:
            return "final"
        return "turn" if self.opens_turn else "message"

    @property
    def has_schemas(self) -> bool:
        return bool(self.tools.tools or self.tools.builtins) or self.output_format is not None

    @property
    def constrained(self) -> bool:
        """Whether the answer has to be a call, or of a given format."""
        return self.tools.must_call or self.output_format is not None
