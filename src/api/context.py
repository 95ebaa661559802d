"""What every route may use, made once by the app factory."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from typing import Annotated, Protocol, TypeVar

from fastapi import Depends, Request

from gptoss import __version__
from gptoss.api.access.access import Access
from gptoss.api.access.api_keys import ApiKeys, Caller, tenant_of
from gptoss.api.hosted.service import ToolService
from gptoss.api.http.profiles import Profiles
from gptoss.api.http.sender import ANONYMOUS, Sender, client_of
from gptoss.api.http.work_pool import WorkPool
from gptoss.api.telemetry.metrics import Metrics
from gptoss.api.telemetry.request_accounting import RequestAccounting
from gptoss.api.telemetry.request_record import RequestRecord
from gptoss.api.telemetry.request_tracker import RequestTracker
from gptoss.api.telemetry.tracing import Tracing
from gptoss.api.telemetry.unknown_fields import UnknownFields
from gptoss.config.profiles import Profile
from gptoss.config.schema import ServerConfig
from gptoss.engine.client.pool import AnyEngine
from gptoss.generation.planner import PlanLimits, Planner
from gptoss.generation.session import Choice, VisibleDelta
from gptoss.generation.tool_loop import Runtime
from gptoss.harmony.vocabulary_files import Vocabulary
from gptoss.prompt_builder import PromptBuilder

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
    engine: AnyEngine
    prompt_builder: PromptBuilder
    vocabulary: Vocabulary
    metrics: Metrics
    model_size: str
    model_repetition_guard: int  # the model's own, where the configuration has none
    profiles: Profiles
    access: Access
    tracker: RequestTracker
    stored_responses: StoredResponses
    unknown_fields: UnknownFields
    tools: ToolService
    pool: WorkPool = field(default_factory=WorkPool)
    warm: asyncio.Event = field(default_factory=asyncio.Event)  # set once the warm-up is over

    @property
    def profile(self) -> Profile:
        """The server's own; a request may name another."""
        return self.profiles.default

    @property
    def model_id(self) -> str:
        return self.profiles.model_id

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
        """The type of the matrices of attention and output head.

        The engine rejects a type that it does not have.
        """
        chosen = self.engine.config.dense_dtype
        return self.tags["dtype"] if chosen == "auto" else chosen

    @property
    def lm_head_dtype(self) -> str:
        """The type of the output head's matrix."""
        chosen = self.engine.config.lm_head_dtype
        return self.dense_dtype if chosen == "auto" else "fp8_e4m3"

    @property
    def kv_cache_dtype(self) -> str:
        """The type of the KV cache."""
        return "fp8_e4m3" if self.engine.config.has_fp8_cache else self.tags["dtype"]

    @property
    def system_fingerprint(self) -> str:
        """Changes when the server could answer the same request differently."""
        text = (
            f"{__version__} {sorted(self.tags.items())} {self.dense_dtype} {self.kv_cache_dtype} {self.lm_head_dtype}"
        )
        return "fp_" + hashlib.blake2b(text.encode(), digest_size=5).hexdigest()

    def planner(self) -> Planner:
        """Of the limits that hold now."""
        config, guard = self.config, self.config.repetition_guard
        guard = self.model_repetition_guard if guard is None else guard
        limits = PlanLimits(self.max_model_len, config.guided_harmony, config.guided_tool_arguments, guard)
        return Planner(limits, self.vocabulary, self.prompt_builder)

    def runtime(self, accounting: RequestAccounting, *, joins_messages: bool) -> Runtime:
        """What the rounds of an answer are run with. `joins_messages`: see ChatChoice."""
        remember = self.prompt_builder.remember
        return Runtime(self.vocabulary, self.engine, accounting, remember, self.max_model_len, joins_messages)

    def incoming(self, request: Request) -> Incoming:
        """What a request needs that has just arrived."""
        state, caller = request.state, caller_of(request)
        record = RequestRecord(
            endpoint=request.url.path,
            request_id=getattr(state, "request_id", ""),
            caller=caller,
            allowance=getattr(state, "allowance", None),
            trace_headers=tuple(
                (name, request.headers[name]) for name in ("traceparent", "tracestate") if name in request.headers
            ),
        )
        tenant = tenant_of(caller)
        address = f" {request.client.host}" if tenant == ANONYMOUS and request.client is not None else ""
        shown_text = self.vocabulary.decode if self.config.log_content else None
        sender = Sender(
            owner=tenant + address,
            receive=request.receive,
            client=client_of(request),
            tenant=tenant,
            cache_scope=self.access.keys.cache_scope(caller),
        )
        return Incoming(
            sender,
            self.planner(),
            self.pool,
            self.profiles,
            self.unknown_fields,
            self.tools,
            RequestAccounting(record, self.access.limits, self.tracker, self.metrics, lambda: self.tags, shown_text),
        )

    def reading(self, sender: Sender) -> Reading:
        """What a request needs that did not arrive over HTTP."""
        return Reading(sender, self.planner(), self.pool, self.profiles, self.unknown_fields, None)


@dataclass(frozen=True, slots=True)
class Reading:
    """One request: who sent it, and what reads and plans it."""

    sender: Sender
    planner: Planner
    pool: WorkPool
    profiles: Profiles
    unknown_fields: UnknownFields
    tools: ToolService | None  # None: the server runs none for it


@dataclass(frozen=True, slots=True)
class Incoming(Reading):
    """A request that arrived over HTTP, and what counts it."""

    accounting: RequestAccounting


def create_context(
    engine: AnyEngine,
    config: ServerConfig,
    vocabulary: Vocabulary,
    stored_responses: StoredResponses,
    *,
    callers: list[Caller] | None = None,
    model_id: str,
    model_size: str,
    repetition_guard: int = 0,
    aliases: frozenset[str] = frozenset(),
    tracing: Tracing | None = None,
) -> ServerContext:
    """Returns the context of one app.

    `callers`: the keys, if they have been read already. Raises ConfigError.
    """
    profiles, names = config.all_profiles(), aliases | {model_id}
    engine.adapters.reserved = lambda: names | profiles.keys()
    metrics, access = Metrics(), Access(ApiKeys(config, callers))
    return ServerContext(
        config=config,
        engine=engine,
        prompt_builder=_prompt_builder(vocabulary, config),
        vocabulary=vocabulary,
        metrics=metrics,
        model_size=model_size,
        model_repetition_guard=repetition_guard,
        profiles=Profiles(profiles, profiles[config.profile], model_id, names, engine.adapters),
        access=access,
        tracker=RequestTracker(engine, metrics, access, tracing),
        stored_responses=stored_responses,
        unknown_fields=UnknownFields(config.unknown_fields),
        tools=ToolService(config, vocabulary),
    )


def _prompt_builder(vocabulary: Vocabulary, config: ServerConfig) -> PromptBuilder:
    return PromptBuilder(
        vocabulary,
        current_date=config.current_date,
        cache_bytes=config.prompt_cache_bytes,
        cache_ttl_s=config.prompt_cache_ttl_s,
        replay_generated_ids=(
            not config.resolved("batch_invariant")
            if config.replay_generated_ids is None
            else config.replay_generated_ids
        ),
    )


def caller_of(request: Request) -> Caller | None:
    """Who sends the request; None where no middleware has identified a caller."""
    caller: Caller | None = getattr(request.state, "caller", None)
    return caller


def get_context(request: Request) -> ServerContext:
    context: ServerContext = request.app.state.context
    return context


Context = Annotated[ServerContext, Depends(get_context)]
