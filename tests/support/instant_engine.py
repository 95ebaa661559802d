"""The whole API in this process, with an engine that answers at once: what a model makes of a request takes no time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import uvicorn

from gptoss.api.app import create_app
from gptoss.api.http.uvicorn_server import ConnectionLimits, limited_protocol
from gptoss.config.schema import ServerConfig
from gptoss.engine.client.client import EngineClient
from gptoss.engine.client.supervisor import EngineState
from gptoss.engine.messages import AddRequest, FinishReason, Ready, TokenLogprobs, TokenOutput
from gptoss.harmony.vocabulary_files import load_vocabulary
from tests.support.helpers import checkpoint, engine_config
from tests.support.script import NEXT

MAX_MODEL_LEN = 1024


class InstantEngine(EngineClient):
    """Every generation is the same few tokens, cut at max_tokens, in one output, or one by one with a pause before each."""

    def __init__(self, answer: list[int], pause_s: float = 0.0, max_model_len: int = MAX_MODEL_LEN) -> None:
        super().__init__(engine_config(checkpoint(), max_model_len=max_model_len))
        self._answer = answer
        self._pause_s = pause_s

    @property
    def heartbeat_age_s(self) -> float:
        return 0.0

    @property
    def stall(self) -> str | None:
        return None

    async def start(self) -> None:
        self.ready = Ready("float32", "cpu", 1000, 2**20, 2**20, self.config.max_model_len, "none", 0.0, 0)
        self.state = EngineState.READY
        self._ready_event.set()

    async def add_requests(self, requests: Sequence[AddRequest]) -> list[AsyncIterator[TokenOutput]]:
        return [self._output(request) for request in requests]

    async def _output(self, request: AddRequest) -> AsyncIterator[TokenOutput]:
        ids, params = self._answer[: request.params.max_tokens], request.params
        reason = FinishReason.STOP if len(ids) == len(self._answer) else FinishReason.LENGTH
        while self._pause_s and len(ids) > 1:
            await asyncio.sleep(self._pause_s)
            one = TokenOutput(request.request_id, [ids.pop(0)], None, queue_s=0.0, prefill_s=0.0)
            if params.logprobs is not None:
                one.logprobs = [_logprobs(token, params.logprobs) for token in one.token_ids]
            yield one
        output = TokenOutput(request.request_id, ids, reason, queue_s=0.0, prefill_s=0.0)
        if params.logprobs is not None:
            output.logprobs = [_logprobs(token, params.logprobs) for token in ids]
        if params.prompt_logprobs is not None:
            wanted = request.token_ids[1:]
            output.prompt_logprobs = [_logprobs(token, params.prompt_logprobs) for token in wanted]
        yield output


def _logprobs(token_id: int, alternatives: int) -> TokenLogprobs:
    return TokenLogprobs(-0.5, [(token_id + i, -0.5 - i) for i in range(alternatives)])


@contextlib.contextmanager
def served(
    answer: str = "Hi.", pause_s: float = 0.0, *, engine: EngineClient | None = None, port: int = 0, **settings: Any
) -> Iterator[str]:
    """The URL of the API, debugging endpoints included. `settings`: keys of the configuration."""
    vocabulary = load_vocabulary(checkpoint())
    text = f"<|channel|>analysis<|message|>Hm.<|end|>{NEXT}<|channel|>final<|message|>{answer}<|return|>"
    engine = engine or InstantEngine(vocabulary.encode_with_special(text), pause_s)
    config = ServerConfig(debug_endpoints=True, warm_up=False, **settings)
    app = create_app(engine, config, vocabulary, model_id="gpt-oss-nano", model_size="nano")
    protocol = limited_protocol(ConnectionLimits())
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, lifespan="on", log_config=None))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", port))
        bound.listen()
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while not server.started:
                assert thread.is_alive() and time.monotonic() < deadline
                time.sleep(0.01)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
