"""Sends the same requests without HTTP.

The app runs in this process, its engine in a child.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import queue
import sys
import threading
from collections.abc import Generator, Iterator, MutableMapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from gptoss import launcher, logging_setup
from gptoss.cached_files import CacheError
from gptoss.cli.remote.connection import Connection, refusal
from gptoss.cli.remote.errors import Unreachable, UsageError
from gptoss.config.errors import ConfigError
from gptoss.config.sources import DEFAULT_CONFIG_FILE, load_flags
from gptoss.config.text import without_secrets
from gptoss.engine.client.errors import EngineError
from gptoss.harmony.vocabulary_files import VocabularyError

NAME = "this process"
CLOSE_S = 10.0
# of a server that others use; this one has no other clients
OPEN_ACCESS: dict[str, Any] = {
    "api_key": None,
    "api_keys_file": None,
    "require_api_key": False,
    "requests_per_minute": 0,
    "tokens_per_minute": 0,
    "max_concurrent_requests": 0,
    "warm_up": False,
}
Message = MutableMapping[str, Any]


@contextmanager
def local_connection(model: str | None, config_file: str | None, timeout_s: float) -> Iterator[Connection]:
    """Yields a connection to an engine of this process once it is ready, and ends the engine.

    `model` and `config_file`: as for `gptoss serve`, whose environment variables hold too.

    Raises:
        UsageError: the configuration is wrong, or the model cannot be loaded.
    """
    try:
        config, origin, _ = load_flags({"model": model, "config": config_file})
        if origin.get("log_level") == str(DEFAULT_CONFIG_FILE):
            config = dataclasses.replace(config, log_level="warning")
        logging_setup.configure(config.log_level, config.log_format)
        connection = LocalConnection(dataclasses.replace(config, **OPEN_ACCESS), timeout_s)
    except (CacheError, ConfigError, EngineError, VocabularyError) as error:
        raise UsageError(without_secrets(str(error))) from None
    try:
        yield connection
    finally:
        connection.close()


class LocalConnection(Connection):
    """A connection whose requests go to the app as ASGI calls, on an event loop in a thread."""

    def __init__(self, config: Any, timeout_s: float) -> None:
        """Loads the model. Raises what the launcher raises."""
        super().__init__("http://127.0.0.1", timeout_s=timeout_s)
        self.url = NAME
        self._ready: Future[tuple[Any, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=self._run, args=(config,), name="engine", daemon=True)
        if sys.stderr.isatty():
            sys.stderr.write("loading the model ...\r")
        self._thread.start()
        self._app, self._loop, self._end = self._ready.result()
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[K")

    def close(self) -> None:
        """Ends the engine."""
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(CLOSE_S)

    def _run(self, config: Any) -> None:
        try:
            asyncio.run(self._serve(config))
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)

    async def _serve(self, config: Any) -> None:
        end = asyncio.Event()
        async with launcher.local_app(config, []) as app:
            self._ready.set_result((app, asyncio.get_running_loop(), end))
            await end.wait()

    def _open(self, method: str, path: str, body: Any, accept: tuple[int, ...]) -> Any:
        response = _Response(self._app, self._loop, method, path, body, self.timeout_s)
        if response.status != 200 and response.status not in accept:
            with response:
                text = response.read()
            raise refusal(NAME, response.status, response.headers.get("retry-after"), text)
        return response


class _Response(io.RawIOBase):
    """An answer that is read as it is written. Closing it disconnects the client from the app."""

    def __init__(
        self, app: Any, loop: asyncio.AbstractEventLoop, method: str, path: str, body: Any, timeout_s: float
    ) -> None:
        """Returns once status and headers are there. Raises Unreachable."""
        self._loop, self._timeout_s = loop, timeout_s
        self._messages: queue.Queue[Message | None] = queue.Queue()
        self._gone = asyncio.Event()
        self._left = b""
        data = b"" if body is None else json.dumps(body).encode()
        self._call = asyncio.run_coroutine_threadsafe(self._answer(app, _scope(method, path, data), data), loop)
        try:
            start = self._next()
        except BaseException:
            self.close()
            raise
        if start is None:
            self._call.result()
            raise Unreachable("the request ended without an answer")
        self.status = int(start["status"])
        self.headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}

    async def _answer(self, app: Any, scope: dict[str, Any], data: bytes) -> None:
        body: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]

        async def receive() -> Message:
            if body:
                return body.pop()
            await self._gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self._messages.put(message)

        try:
            await app(scope, receive, send)
        finally:
            self._messages.put(None)

    def _next(self) -> Message | None:
        try:
            return self._messages.get(timeout=self._timeout_s)
        except queue.Empty:
            raise Unreachable(f"no answer within {self._timeout_s:g} s") from None

    def readable(self) -> bool:
        return True

    def readall(self) -> bytes:
        return b"".join(self._parts())

    def read(self, size: int | None = -1) -> bytes:
        return self.readall()

    def _parts(self) -> Generator[bytes, None, None]:
        while (message := self._next()) is not None:
            if part := message.get("body"):
                yield part
            if not message.get("more_body"):
                return

    def __iter__(self) -> Iterator[bytes]:
        for part in self._parts():
            *lines, self._left = (self._left + part).split(b"\n")
            yield from (line + b"\n" for line in lines)
        if self._left:
            yield self._left

    def close(self) -> None:
        if not self.closed:
            self._loop.call_soon_threadsafe(self._gone.set)
        super().close()


def _scope(method: str, path: str, data: bytes) -> dict[str, Any]:
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [*headers, (b"content-length", str(len(data)).encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
