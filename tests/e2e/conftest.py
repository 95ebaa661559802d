from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.support.forked_starts import ForkedStarts
from tests.support.helpers import checkpoint
from tests.support.server_process import ServerProcess, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    flags = ("--cpu-kv-cache-gib", "0.2", "--debug-endpoints")
    with running_server("--model", str(checkpoint()), *flags) as running:
        yield running
        running.wait_idle()


@pytest.fixture(scope="session")
def starts() -> Iterator[ForkedStarts]:
    forked = ForkedStarts()
    yield forked
    forked.close()


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60, _strict_response_validation=True
    ) as c:
        yield c
