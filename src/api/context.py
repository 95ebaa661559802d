"""What every route may use, made once by the app factory."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import Depends, Request

from gptoss import __version__
from gptoss.api.access.access import Access
from gptoss.api.access.api_keys import ANONYMOUS, Caller, tenant_of
from gptoss.api.http.body import read_json_object
from gptoss.api.http.errors import ApiError, InvalidRequest, NotFound, from_engine
from gptoss.api.http.fields import SamplingFields
from gptoss.api.http.work_pool import INLINE_BYTES, Sender, Stopped, WorkPool
from gptoss.api.telemetry.metrics import Metrics
from gptoss.api.telemetry.relaxations import warn_relaxed
from gptoss.api.telemetry.request_accounting import RequestAccounting
from gptoss.api.telemetry.request_record import RequestRecord
from gptoss.api.telemetry.request_tracker import RequestTracker
from gptoss.api.telemetry.unknown_fields import UnknownFields
from gptoss.config.profiles import Profile
from gptoss.config.schema import ServerConfig
from gptoss.engine.client.client import EngineClient
from gptoss.engine.client.errors import EngineError
from gptoss.generation import session
from gptoss.generation.plan import Plan
from gptoss.generation.planner import PlanLimits, Planner
from gptoss.generation.request import GenerationRequest, TextPrompts
from gptoss.generation.session import Choice, Generation, VisibleDelta
from gptoss.harmony.conversation import Conversation
from gptoss.harmony.vocabulary_files import Vocabulary
from gptoss.prompt_builder import PromptBuilder, PromptTokens

T = TypeVar("T")
C = TypeVar("C", bound=Choice[VisibleDelta])


class StoredResponses(Protocol):
    """What the reports show of the response store."""

    @property
    def num_bytes(self) -> int: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class ServerContext:
    config: ServerConfig
    engine: EngineClient
    prompt_builder: PromptBuilder
    vocabulary: Vocabulary
    metrics: Metrics
    model_id: str
    model_size: str
    model_repetition_guard: int  # the model's own, where the configuration has none
    model_names: frozenset[str]  # the id and its aliases
    profiles: Mapping[str, Profile]
    access: Access
    tracker: RequestTracker
    stored_responses: StoredResponses
    unknown_fields: UnknownFields
    pool: WorkPool = field(default_factory=WorkPool)
    warm: asyncio.Event = field(default_factory=asyncio.Event)  # set once the warm-up is over

    @property
    def profile(self) -> Profile:
        """The server's own; a request may name another."""
        return self.profiles[self.config.profile]

    @property
    def repetition_guard(self) -> int:
        """Maximum consecutive repeats of a token run; 0 disables the guard."""
        set_to = self.config.repetition_guard
        return self.model_repetition_guard if set_to is None else set_to

    @property
    def max_model_len(self) -> int:
        ready = self.engine.ready
        return ready.max_model_len if ready is not None else self.engine.config.max_model_len

    @property
    def tags(self) -> dict[str, str]:
        """What is loaded: labels of the metrics, and part of every report."""
        ready = self.engine.ready
        return {
            "model_id": self.model_id,
            "model_size": self.model_size,
            "dtype": ready.dtype if ready is not None else self.engine.config.dtype,
            "gpu_mode": ready.gpu_mode if ready is not None else self.engine.config.gpu_mode,
            "prompt_version": self.prompt_builder.version,
            "profile": self.profile.name,
        }

    @property
    def dense_dtype(self) -> str:
        """The type of the attention's and the output head's matrices; the engine refuses one that it does not have."""
        chosen = self.engine.config.dense_dtype
        return self.tags["dtype"] if chosen == "auto" else chosen

    @property
    def system_fingerprint(self) -> str:
        """Changes when the server could answer the same request differently."""
        text = f"{__version__} {sorted(self.tags.items())} {self.dense_dtype}"
        return "fp_" + hashlib.blake2b(text.encode(), digest_size=5).hexdigest()

    @property
    def planner(self) -> Planner:
        config = self.config
        limits = PlanLimits(
            self.max_model_len, config.guided_harmony, config.guided_tool_arguments, self.repetition_guard
        )
        return Planner(limits, self.vocabulary, self.prompt_builder)

    def profile_of(self, model: str, name: str | None = None) -> Profile:
        """`name`, else the suffix of `model:profile`, else the server's own. Raises InvalidRequest or NotFound."""
        base, _, suffix = model.rpartition(":")
        has_suffix = suffix in self.profiles and base in self.model_names
        if not has_suffix and model not in self.model_names:
            text = f"The model '{model}' does not exist. This server serves {self.model_id!r}."
            raise NotFound(text, "model", "model_not_found")
        if name is None:
            return self.profiles[suffix] if has_suffix else self.profile
        if name not in self.profiles:
            raise InvalidRequest(f"Unknown profile {name!r}; there are {', '.join(self.profiles)}.", "profile")
        return self.profiles[name]

    def generation_request(
        self,
        fields: SamplingFields,
        prompt: Conversation | TextPrompts,
        caller: Caller | None,
        *,
        id_prefix: str,
        profile: str | None = None,
        logprobs: int | None = None,
        **own: Any,
    ) -> GenerationRequest:
        """What all endpoints read alike; `own`: the other fields of the GenerationRequest."""
        return GenerationRequest(
            request_id=id_prefix + secrets.token_hex(12),
            prompt=prompt,
            profile=self.profile_of(fields.model, profile),
            sampling=fields.sampling(logprobs),
            stop=fields.stop or (),
            num_choices=fields.n or 1,
            priority=fields.priority,
            tenant=tenant_of(caller),
            cache_scope=self.access.keys.cache_scope(caller),
            cache_salt=fields.cache_salt or "",
            **own,
        )

    async def plan(self, request: GenerationRequest, sender: Sender, *, counts_all: bool = False) -> Plan:
        """`counts_all`: see Planner.plan. Raises GenerationError, or what `read` raises."""
        planner = self.planner

        def work(stopped: Stopped) -> Plan:
            return planner.plan(request, stopped, counts_all=counts_all)

        if sender.body_bytes < INLINE_BYTES and request.has_schemas:  # which take a while to compile
            plan = await asyncio.to_thread(work, _never)
        else:
            plan = await self.read(sender, work)
        warn_relaxed(plan.relaxed)
        return plan

    async def start(
        self, plan: Plan, choices: Sequence[C], record: RequestRecord, *, streams: bool
    ) -> Generation[C, Any]:
        """Admits every choice, or none. Raises EngineError or RateLimited."""
        record.stream = streams
        shown_text = self.vocabulary.decode if self.config.log_content else None
        accounting = RequestAccounting(
            record, self.access.limits, self.tracker, self.metrics, lambda: self.tags, shown_text
        )
        return await session.start(plan, choices, self.engine, accounting, self._remember)

    def _remember(self, token_ids: Sequence[int], scope: str, prompt: PromptTokens) -> None:
        self.prompt_builder.remember(token_ids, scope, after=prompt)

    async def read(self, sender: Sender, work: Callable[[Stopped], T]) -> T:
        """The result of work on a request's body, without holding up other requests. Raises ClientGone, or RateLimited
        where the caller has too much of it."""
        if sender.body_bytes < INLINE_BYTES:
            return work(_never)
        return await self.pool.run(sender, work)


def _never() -> bool:
    return False


async def read_body(request: Request, context: ServerContext) -> dict[str, Any]:
    """The request's JSON object. Raises what `read_json_object` and `WorkPool.run` raise."""
    return await read_json_object(request, context.config, lambda work: context.pool.run(sender_of(request), work))


def sender_of(request: Request) -> Sender:
    """To be called when the body has been read. Without keys senders differ by their address."""
    state = request.state
    caller = getattr(state, "caller", None)
    owner = ANONYMOUS if caller is None else caller.name
    if owner == ANONYMOUS and request.client is not None:
        owner = f"{owner} {request.client.host}"
    return Sender(owner, getattr(state, "body_bytes", 0), request.receive)


def caller_of(request: Request) -> Caller | None:
    """Who sends the request; None where no middleware has identified a caller."""
    caller: Caller | None = getattr(request.state, "caller", None)
    return caller


def new_record(request: Request) -> RequestRecord:
    """The record of a request that arrives now."""
    state = request.state
    return RequestRecord(
        endpoint=request.url.path,
        request_id=getattr(state, "request_id", ""),
        caller=caller_of(request),
        allowance=getattr(state, "allowance", None),
        trace_headers=tuple(
            (name, request.headers[name]) for name in ("traceparent", "tracestate") if name in request.headers
        ),
    )


@contextlib.contextmanager
def counted_rejections(context: ServerContext) -> Iterator[None]:
    """For what happens before a request runs: what ends it here is counted, and the engine's refusals become HTTP's."""
    try:
        yield
    except (ApiError, ValueError):
        context.metrics.reject()
        raise
    except EngineError as error:
        context.metrics.reject()
        raise from_engine(error) from error
    except Exception:  # a bug, which becomes a 500
        context.metrics.fail()
        raise


def get_context(request: Request) -> ServerContext:
    context: ServerContext = request.app.state.context
    return context


Context = Annotated[ServerContext, Depends(get_context)]
