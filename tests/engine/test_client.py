"""The engine process as the API process holds it. What is served through it is in tests/e2e."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import zmq

from gptoss.config.errors import ConfigError
from gptoss.engine.client import engine_link
from gptoss.engine.client.client import EngineClient
from gptoss.engine.client.errors import QueueFullError
from gptoss.engine.client.streams import OpenStreams, OutputStream, refusal
from gptoss.engine.client.supervisor import EngineState, RestartPolicy
from gptoss.engine.config import EngineConfig
from gptoss.engine.core import process
from gptoss.engine.core.process import EngineProcess
from gptoss.engine.messages import AddRequest, AddRequests, FinishReason, Heartbeat, Ready, ToEngine, TokenOutput
from gptoss.engine.sampling_params import LogitBias, SamplingParams
from tests.support.helpers import checkpoint, engine_config


def test_stopping_while_the_engine_process_starts_leaves_none_behind() -> None:
    async def start_and_stop() -> None:
        client = EngineClient(engine_config(checkpoint()))
        await client.start()
        await asyncio.sleep(0.001)  # a thread has begun to start the process
        await client.stop()
        await asyncio.sleep(0.5)

    asyncio.run(start_and_stop())
    assert not multiprocessing.active_children()


def _sent(client: EngineClient) -> list[ToEngine]:
    """What the client sends from now on, as the engine reads it."""
    messages: list[ToEngine] = []
    decoder = msgspec.msgpack.Decoder(ToEngine)
    client._link.send = lambda m: messages.append(decoder.decode(msgspec.msgpack.encode(m)))  # type: ignore[method-assign]
    return messages


def test_a_bias_that_choices_share_goes_over_the_wire_once() -> None:
    bias = LogitBias.of(dict.fromkeys(range(1000), 1.0))
    params = [SamplingParams(max_tokens=5, seed=i, logit_bias=bias) for i in range(4)]
    plain = AddRequest("plain", [1], SamplingParams(max_tokens=5, seed=9))

    async def add() -> tuple[list[ToEngine], list[ToEngine]]:
        client = EngineClient(engine_config(checkpoint()))
        sent = _sent(client)
        client.state = EngineState.READY
        await client.add_requests([AddRequest(f"r{p.seed}", [1, 2], p) for p in params])
        await client.add_request(plain)
        first, sent[:] = list(sent), []
        client._handle(Ready("float32", "cpu", 1, 1, 1, 64, "reference", 0.1, 1))  # after a death
        client._link.close()
        return first, sent

    for messages in asyncio.run(add()):
        (group,) = [m for m in messages if isinstance(m, AddRequests)]
        assert group.logit_bias == bias
        assert [r.request_id for r in group.requests] == ["r0", "r1", "r2", "r3"]
        assert all(r.params.logit_bias is None for r in group.requests)
        assert [r.params.seed for r in group.requests] == [0, 1, 2, 3]
        assert [m for m in messages if isinstance(m, AddRequest)] == [plain]


def test_the_engine_gives_all_of_them_the_same_bias() -> None:
    bias = LogitBias.of({7: 1.0})
    assert bias is not None
    added: list[AddRequest] = []

    class Core:
        def add_request(self, message: AddRequest) -> TokenOutput | None:
            added.append(message)
            return TokenOutput("b", [], FinishReason.ERROR) if message.request_id == "b" else None

    class Socket:
        def __init__(self) -> None:
            requests = [AddRequest(n, [1], SamplingParams(max_tokens=1, seed=0)) for n in "ab"]
            self.messages = [msgspec.msgpack.encode(AddRequests(requests, bias))]

        def poll(self, _: int) -> bool:
            return bool(self.messages)

        def recv(self) -> bytes:
            return self.messages.pop()

    process = EngineProcess(Core(), Socket(), None, 0)  # type: ignore[arg-type]
    assert [o.request_id for o in process._receive(idle=False)] == ["b"]
    first, second = added
    assert first.params.logit_bias is second.params.logit_bias == bias


@pytest.mark.parametrize("interval_s, steps", [(0.0, 0), (0.02, 3)])
def test_an_idle_engine_keeps_warm_if_told_to(interval_s: float, steps: int) -> None:
    ran: list[float] = []

    class Core:
        class executor:
            @staticmethod
            def keep_warm() -> None:
                ran.append(time.monotonic())

    class Socket:
        def poll(self, timeout_ms: float) -> bool:
            time.sleep(min(timeout_ms, 30) / 1e3)
            return False

    process = EngineProcess(Core(), Socket(), None, 0, interval_s)  # type: ignore[arg-type]
    for _ in range(6):
        process._receive(idle=True)
    assert len(ran) >= steps and bool(ran) == bool(steps)
    assert all(b - a >= interval_s for a, b in zip(ran, ran[1:], strict=False))


def test_requests_that_come_before_an_engines_death_shows_go_on_in_the_next() -> None:
    """Its socket is gone at once, its process only a moment later."""

    async def add() -> None:
        client = EngineClient(engine_config(checkpoint()), RestartPolicy(max_resumes=1))
        client._link._send_socket = dead = zmq.Context.shadow(client._link._context.underlying).socket(zmq.PUSH)
        dead.bind("inproc://engine")  # nobody is connected
        client.state = EngineState.READY
        params = SamplingParams(max_tokens=5, seed=0, logit_bias=LogitBias.of({7: 1.0}))
        plain = AddRequest("plain", [1], msgspec.structs.replace(params, logit_bias=None))
        for request in (plain, AddRequest("biased", [1], params), AddRequest("cancelled", [1], params)):
            await client.add_request(request)
        assert client.abort("cancelled")
        client.streams.resume_or_end(1, "the engine died")
        dead.close()

        sent = _sent(client)
        client._handle(Ready("float32", "cpu", 1, 1, 1, 64, "reference", 0.1, 1))
        client._link.close()
        first, second = sent
        assert first == plain and isinstance(second, AddRequests)
        assert [r.request_id for r in second.requests] == ["biased"]

    asyncio.run(add())


def test_all_requests_are_admitted_or_none() -> None:
    async def add() -> None:
        client = EngineClient(engine_config(checkpoint(), max_num_seqs=2, max_num_waiting=1))
        sent = _sent(client)
        client.state = EngineState.READY
        params = SamplingParams(max_tokens=5, seed=0)
        with pytest.raises(QueueFullError):
            await client.add_requests([AddRequest(str(i), [1], params) for i in range(4)])
        assert not sent and not client.num_active
        await client.add_requests([AddRequest(str(i), [1], params) for i in range(3)])
        assert len(sent) == client.num_active == 3
        client._link.close()

    asyncio.run(add())


def test_a_tenant_below_its_share_is_let_in_beyond_the_bounds() -> None:
    async def add() -> None:
        client = EngineClient(engine_config(checkpoint(), max_num_seqs=2, max_num_waiting=6))
        _sent(client)
        client.state = EngineState.READY

        async def add(tenant: str, count: int) -> None:
            params, before = SamplingParams(max_tokens=5, seed=0), client.num_active
            names = [f"{tenant}{before + i}" for i in range(count)]
            await client.add_requests([AddRequest(n, [1], params, tenant=tenant) for n in names])

        await add("a", 8)
        with pytest.raises(QueueFullError):
            await add("a", 1)
        with pytest.raises(QueueFullError):
            await add("b", 5)
        await add("b", 4)
        with pytest.raises(QueueFullError):
            await add("b", 1)
        await add("c", 2)
        for stream in client.streams:
            client.discard(stream.request.request_id)
        assert not client.streams.of_tenant and not client.streams.unstarted_tokens_of
        client._link.close()

    asyncio.run(add())


class _Beating:
    """A socket of an engine that sends heartbeats, or nothing where `every_s` is 0."""

    def __init__(self, every_s: float) -> None:
        self.every_s = every_s

    async def recv(self) -> bytes:
        await asyncio.sleep(self.every_s or 3600)
        return msgspec.msgpack.encode(Heartbeat())


def _read_from(every_s: float, *, busy: bool = False, ready: bool = True) -> str | None:
    """Why the engine counts as dead within 1.5 s, None if it does not."""

    async def read() -> str | None:
        policy = RestartPolicy(step_timeout_s=0.4, heartbeat_timeout_s=0.2)
        client = EngineClient(engine_config(checkpoint()), policy)
        _sent(client)
        client.state = EngineState.READY if ready else EngineState.LOADING
        if busy:
            await client.add_request(AddRequest("a", [1], SamplingParams(max_tokens=5, seed=1)))
        socket: Any = _Beating(every_s)
        reading = client._link.read(socket, asyncio.Event(), client._handle, client._silence)
        problem = None
        with contextlib.suppress(TimeoutError):
            problem = await asyncio.wait_for(reading, 1.5)
        client._link.close()
        return problem

    return asyncio.run(read())


def test_a_stopped_engine_is_dead_even_when_it_is_idle(caplog: pytest.LogCaptureFixture) -> None:
    assert _read_from(0) == "no heartbeat within 0.4 s"
    assert [r.message for r in caplog.records] == ["no heartbeat of the engine (pid None) for 0 s: is it stopped?"]
    caplog.clear()
    assert _read_from(0.01, busy=True) == "no step within 0.4 s while work was waiting"
    assert _read_from(0.01) is None, "idle"
    assert _read_from(0, ready=False) is None, "it loads"
    assert not caplog.records


def test_an_engine_starts_again_with_files_that_were_checked() -> None:
    async def renew(renewed: Callable[[], EngineConfig]) -> EngineConfig:
        client = EngineClient(engine_config(checkpoint()), renewed=renewed)
        await client._renew()
        client._link.close()
        return client.config

    def fails() -> EngineConfig:
        raise ConfigError("no space")

    other = engine_config(checkpoint(), seed=5)
    assert asyncio.run(renew(lambda: other)) is other
    assert asyncio.run(renew(fails)).seed == 0


@pytest.mark.parametrize(
    ("backend", "before", "wanted"), [("native", None, "0"), ("native", "5", "5"), ("transformers", None, None)]
)
def test_openmp_threads_do_not_spin_next_to_those_of_the_kernels(
    monkeypatch: pytest.MonkeyPatch, backend: str, before: str | None, wanted: str | None
) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(process, "run_engine", lambda *_: seen.append(os.environ.get("GOMP_SPINCOUNT")))
    monkeypatch.setenv("GOMP_SPINCOUNT", before or "")
    if before is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    engine_link._child(engine_config(checkpoint(), backend=backend), "", "", os.getpid(), {})
    assert seen == [wanted]


def test_background_requests_take_no_capacity_of_live_ones() -> None:
    streams = OpenStreams()
    for i in range(50):
        streams.add(OutputStream(AddRequest(f"b{i}", [1] * 100, SamplingParams(max_tokens=5, seed=0), background=True)))
    assert refusal([streams], "t", 1, 10, 1, 10) is None
    assert (streams.num_unstarted, streams.num_unstarted_tokens, streams.num_background) == (0, 0, 50)
    streams.add(OutputStream(AddRequest("live", [1], SamplingParams(max_tokens=5, seed=0), tenant="t")))
    assert refusal([streams], "t", 1, 10, 1, 10) == "requests"
    for stream in streams:
        streams.remove(stream.request.request_id)
    assert (len(streams), streams.num_background, streams.of_tenant) == (0, 0, {})
