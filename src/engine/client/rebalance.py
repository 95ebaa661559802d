"""Which waiting request moves from one engine to another that has room for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptoss.engine.client.client import EngineClient
from gptoss.engine.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Move:
    request_id: str
    source: EngineClient
    target: EngineClient


def live_move(serving: Sequence[EngineClient], config: EngineConfig) -> Move | None:
    """Moves a live request from an engine with more than it may run to one that runs fewer.

    `serving`: at least one engine. `config`: of each of them.
    """
    idle = min(serving, key=lambda engine: engine.streams.num_live)
    busy = max(serving, key=lambda engine: engine.streams.num_live)
    if idle.streams.num_live < config.max_num_seqs < busy.streams.num_live:
        return _move(_first_waiting(busy, config.priority_ageing_s), busy, idle)
    return None


def background_move(serving: Sequence[EngineClient], config: EngineConfig) -> Move | None:
    """Moves a background request from an engine with live requests to one without.

    `serving`, `config`: as for `live_move`.
    """
    idle = min(serving, key=lambda engine: (engine.streams.num_live, engine.streams.num_background))
    busy = max(serving, key=lambda engine: (engine.streams.num_live > 0) * engine.stats.num_background_waiting)
    if not idle.streams.num_live and idle.streams.num_background < config.max_num_seqs and busy is not idle:
        return _move(_last_background(busy), busy, idle)
    return None


def _move(request_id: str | None, source: EngineClient, target: EngineClient) -> Move | None:
    return None if request_id is None else Move(request_id, source, target)


def _first_waiting(engine: EngineClient, ageing_s: float) -> str | None:
    """The id of the live request that the engine would admit next; None if it has admitted all."""
    unstarted = [stream for stream in engine.streams if not stream.started and not stream.aborted]
    unstarted.sort(key=lambda stream: stream.added + stream.request.priority * ageing_s)
    waiting = unstarted[max(0, len(unstarted) - engine.stats.num_waiting) :]
    return waiting[0].request.request_id if waiting else None


def _last_background(engine: EngineClient) -> str | None:
    """The id of the background request that came last, if one waits for live requests to end."""
    if not engine.streams.num_live or not engine.stats.num_background_waiting:
        return None
    mine = [s for s in engine.streams if s.request.background and not s.output_ids and not s.aborted]
    return mine[-1].request.request_id if mine else None
