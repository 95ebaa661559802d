"""A body of /v1/responses as a plan, its oldest items cut where it asks for that."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gptoss.api.context import Reading
from gptoss.api.hosted.service import Prepared
from gptoss.api.http.errors import field_names
from gptoss.api.http.work_pool import MANY_BYTES, Stopped
from gptoss.api.responses.adapter import ReadRequest, field_name, read_request
from gptoss.api.responses.input.items import num_rendered
from gptoss.api.responses.schema import ResponsesRequest
from gptoss.api.responses.store import ResponseStore, resolve
from gptoss.api.responses.tools.hosted_history import HostedHistory, read_history
from gptoss.api.responses.tools.placed import PlacedItem
from gptoss.api.responses.tools.table import ToolTable, hosted_entries
from gptoss.api.responses.truncation import NEVER_CUT, Cuts, answer_tokens
from gptoss.generation.errors import ContextTooLongError
from gptoss.generation.hosted import Approved
from gptoss.generation.plan import Plan
from gptoss.generation.planner import check_num_messages
from gptoss.generation.tool_loop import Replan
from gptoss.harmony.bpe import Limits
from gptoss.harmony.render import HarmonyMessage

logger = logging.getLogger(__name__)
NOT_OFFERED = "This tool is not available any more."


@dataclass(frozen=True, slots=True)
class ResponsePlan:
    """A request's plan, and where its answer is stored."""

    plan: Plan
    request: ResponsesRequest
    tools: ToolTable
    inputs: list[PlacedItem]  # of this request, without what came before
    caller: str
    store: ResponseStore | None  # None: it is not to be stored
    hosted: Prepared | None = None  # what the server runs of its tools
    approved: Sequence[Approved] = ()  # calls that are run first
    replan: Replan | None = None

    def keep(self, body: dict[str, Any]) -> bool:
        """Stores the finished response. -> whether it is stored."""
        if self.store is None:
            return False
        inputs = [placed.item for placed in self.inputs]
        return self.store.add(self.caller, body, inputs, previous=self.request.previous_response_id)


async def plan_response(body: dict[str, Any], store: ResponseStore, incoming: Reading) -> ResponsePlan:
    """The plan of a Responses request; nothing has been sent to the engine yet.

    Raises ApiError or pydantic's ValidationError.
    """
    sender = incoming.sender
    with field_names(field_name):
        request = await incoming.pool.read(sender, lambda _: _read(body, incoming))
    resolved = resolve(request, store, sender.tenant)
    if resolved.uses_store:  # of unknown size
        incoming = replace(incoming, sender=replace(sender, body_bytes=MANY_BYTES))
    service = incoming.tools
    history = read_history(
        resolved.items, lambda item: service.results.get((sender.tenant, item)) if service is not None else None
    )
    hosted = await _prepare(request, history, incoming)
    try:
        planner = _Planner(request, incoming, hosted)
        approved = _offered(history.approved, hosted)
        refused = dict.fromkeys((one.origin for one in history.approved if one not in approved), NOT_OFFERED)
        tools, plan = await planner.plan_items(history.with_results(refused))
    except BaseException:
        if hosted is not None:
            hosted.chain.finish(None)
        raise

    async def replan(results: Mapping[str, str]) -> Plan:
        return (await planner.plan_items(history.with_results({**refused, **results})))[1]

    kept = store if store.enabled and request.store is not False else None
    return ResponsePlan(plan, request, tools, resolved.own, sender.tenant, kept, hosted, approved, replan)


async def _prepare(request: ResponsesRequest, history: HostedHistory, incoming: Reading) -> Prepared | None:
    """What the server runs of the request's tools; None: nothing. Raises InvalidRequest."""
    service = incoming.tools
    entries = hosted_entries(request.tools or (), service.runs) if service is not None else []
    if service is None or not entries:
        return None
    names = _names(request.tools)
    return await service.prepare(
        entries, incoming.sender.tenant, request.previous_response_id, history.known, names, history.containers
    )


def _names(tools: Sequence[Any] | None) -> list[str]:
    """The names of the client's tools."""
    return [name for tool in tools or () if isinstance(tool, Mapping) and isinstance(name := tool.get("name"), str)]


def _offered(approved: Sequence[Approved], hosted: Prepared | None) -> list[Approved]:
    """The approved calls whose tool the request offers."""
    return [one for one in approved if hosted is not None and one.name in hosted.by_name]


def _read(body: dict[str, Any], incoming: Reading) -> ResponsesRequest:
    sent = body.get("input")
    if isinstance(sent, list) and body.get("truncation") != "auto":
        check_num_messages(num_rendered(sent), incoming.planner.limits)
    request = ResponsesRequest.model_validate(body)
    incoming.unknown_fields.check(body, request, incoming.sender.client)
    return request


@dataclass(frozen=True, slots=True)
class _Planner:
    request: ResponsesRequest
    incoming: Reading
    hosted: Prepared | None = None

    async def plan_items(self, items: Sequence[PlacedItem]) -> tuple[ToolTable, Plan]:
        """The request's tools, and the plan with these items as its conversation. Raises ApiError."""
        if self.request.truncation == "auto":
            return await self.plan_cut(items)
        read = await self.read(items)
        with field_names(read.field_name):
            return read.tools, await self.plan(read)

    async def read(self, items: Sequence[PlacedItem]) -> ReadRequest:
        """Reads the request with these items as its conversation. Raises InvalidRequest."""
        read = partial(read_request, self.request, items, self.hosted)
        return await self.incoming.pool.read(self.incoming.sender, lambda _: read())

    async def plan(self, read: ReadRequest, kept: Sequence[int] | None = None) -> Plan:
        """The plan of these items; None: of all. Raises ApiError or GenerationError."""
        sender, pool, planner = self.incoming.sender, self.incoming.pool, self.incoming.planner
        asked = await pool.read(sender, lambda _: read.generation_request(self.incoming, kept))
        plan = partial(planner.plan, asked, counts_all=self.request.truncation == "auto")
        return await pool.read(sender, plan, is_slow=asked.has_schemas)

    async def plan_cut(self, items: Sequence[PlacedItem]) -> tuple[ToolTable, Plan]:
        """The plan of the items, the oldest cut as far as the context requires it, and its tools.

        Raises ApiError.
        """
        cuts, limits = Cuts(items), self.incoming.planner.limits
        first = cuts.smallest(lambda kept: num_rendered([items[index].item for index in kept]) <= limits.max_messages)
        if first is None:
            with field_names(field_name):
                check_num_messages(num_rendered([placed.item for placed in items]), limits)
        kept = cuts.kept(first or 0)
        read = await self.read([items[index] for index in kept])
        with field_names(read.field_name):
            try:
                return read.tools, await self._plan_cut(read, cuts, first or 0)
            except ContextTooLongError as error:
                raise ContextTooLongError(f"{error.message} {NEVER_CUT}", error.path) from error

    async def _plan_cut(self, read: ReadRequest, cuts: Cuts, first: int) -> Plan:
        """The plan of the items that are left after the smallest cut that fits.

        `read`: the items after the first cut.
        """
        try:
            return await self.plan(read)
        except ContextTooLongError as error:
            counted = error.num_tokens
            if counted is None:
                raise
            cut = await self.incoming.pool.run(
                replace(self.incoming.sender, body_bytes=MANY_BYTES),
                lambda stopped: self._cut(cuts, first, read, counted, stopped),
            )
            if cut is None:
                raise
        logger.info("truncation: left out %d input items", cuts.num_cut(cut))
        return await self.plan(read, _positions(cuts.kept(cut), cuts.kept(first)))

    def _cut(self, cuts: Cuts, first: int, read: ReadRequest, num_tokens: int, stopped: Stopped) -> int | None:
        """The smallest cut that leaves enough tokens for the answer, else the largest that fits.

        None: even the largest cut does not fit. `read`: the items after the first cut; `num_tokens`: of their whole
        prompt.
        """
        lengths: dict[HarmonyMessage, int] = {}
        all_kept = cuts.kept(first)

        def measure(kept: Sequence[int]) -> int:
            conversation = read.conversation(_positions(kept, all_kept))
            return self.incoming.planner.prompt_builder.measure(conversation, lengths, Limits(stopped=stopped))

        room = self.incoming.planner.limits.max_model_len
        others = num_tokens - measure(all_kept)  # tools, formats
        limit = room - others - answer_tokens(self.request.max_output_tokens, room)
        cut = cuts.smallest(lambda kept: measure(kept) <= limit, first)
        if cut is not None:
            return cut
        largest = len(cuts) - 1
        return largest if measure(cuts.kept(largest)) + others < room else None


def _positions(kept: Sequence[int], read: Sequence[int]) -> list[int]:
    """The positions in `read` of the indices `kept`; both ascend."""
    wanted = set(kept)
    return [position for position, index in enumerate(read) if index in wanted]
