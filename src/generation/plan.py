"""What the engine is asked to do for one request, and what reading its outputs takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptoss.config.profiles import Profile
from gptoss.engine.messages import AddRequest
from gptoss.engine.sampling_params import SamplingParams
from gptoss.generation.relaxed_schema import RelaxedSchema
from gptoss.generation.request import Beginning
from gptoss.prompt_builder import PromptTokens


@dataclass(frozen=True, slots=True)
class Round:
    """How the model continues after the results of tools that the server ran."""

    params: SamplingParams  # `seed` is not set; `max_tokens` are those of the whole answer
    tool_names: Sequence[str]
    custom_names: Sequence[str]


@dataclass(frozen=True, slots=True)
class Rounds:
    """Rounds in which the model may call tools of the server, and those in which it may not any more."""

    hosted: frozenset[str]  # names of the tools that the server runs
    calling: Round
    answering: Round


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A request's engine requests, and what its answer is read with."""

    request_id: str
    profile: Profile
    requests: Sequence[AddRequest]  # one for each choice, those of the first prompt first
    num_choices: int  # for each prompt
    has_max_tokens: bool  # whether the request limits the answer
    stop: Sequence[str]
    stream: bool = False
    relaxed: Sequence[RelaxedSchema] = ()
    cache_scope: str = ""
    # of a conversation
    prompt: PromptTokens | None = None
    begins: Beginning = "message"
    tool_names: Sequence[str] = ()
    custom_names: Sequence[str] = ()  # of those whose calls are plain text
    max_calls: int | None = None
    rounds: Rounds | None = None  # after the first one, where the server runs tools
    # of raw prompts
    echo: bool = False
    is_silent: bool = False  # the prompt is scored, and nothing is generated

    @property
    def params(self) -> SamplingParams:
        """Those of the first choice; the others differ by their seeds."""
        return self.requests[0].params

    @property
    def prompts(self) -> list[list[int]]:
        return [request.token_ids for request in self.requests[:: self.num_choices]]
